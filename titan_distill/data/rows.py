"""Base class of datasets that tolerate bad rows.

A bad row is detected when it is read: it is damaged, or does not fit the run. Up to `max_bad_rows` of them
are logged, and each is replaced by the next good row. The replacement depends only on the files, so every layout and
every resumed run trains on the same data.

The first rows are read when a run starts, and by `--check`: data that does not fit is told in seconds, not after the
weights are loaded and a teacher is sampled.
"""

from __future__ import annotations

import logging
import textwrap
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import torch

from titan_distill.data.location import Location, location
from titan_distill.data.order import ORDER_VERSION, GroupSizes, SampleOrder

logger = logging.getLogger(__name__)

Row = TypeVar("Row", covariant=True)


class BadRowError(ValueError):
    """A row can't be used. The message names file, row and fault."""


class RowOrder(Protocol):
    """Order of a run's samples."""

    def row(self, sample_id: int) -> int:
        """Returns the row of a sample."""


class RowDataset(torch.utils.data.Dataset[Row]):
    """Map-style dataset of the rows of `path`.

    Args:
        path: file or folder, used in messages.
        max_bad_rows: largest number of distinct bad rows that this process tolerates. None for data that is not
            data.path: it tolerates none, and messages do not mention the key.

    Raises:
        BadRowError: while indexing, at the first bad row beyond `max_bad_rows`.
    """

    digest: str
    """SHA-256 of the names (within `path`), sizes and row counts of the files, and of what their rows are indexed by:
    footers or prompts. It is equal for a copy elsewhere. The content of the rows is not read."""

    order_version: int = ORDER_VERSION
    """Version of the order in which a run reads the rows (`SampleOrder`). A resume sets its checkpoint's."""

    def __init__(self, path: str | Location, max_bad_rows: int | None = None) -> None:
        self.path: Location = location(path)
        self.bad_rows: dict[int, str] = {}
        self._max_bad_rows = max_bad_rows

    @property
    def set_digests(self) -> set[str]:
        """Digests of the sets that the rows come from."""
        return {self.digest}

    @property
    @abstractmethod
    def files(self) -> set[str]:
        """Files that the rows are read from, with links resolved."""

    @property
    @abstractmethod
    def has_latents(self) -> bool:
        """Whether rows have latents, or videos from which latents are encoded."""

    @property
    def group_sizes(self) -> GroupSizes | None:
        """Sizes of the groups of rows that are read together; None if each row is read alone."""
        return None

    def order(self, seed: int, global_batch_size: int) -> RowOrder:
        """Returns the order of a run's samples."""
        return SampleOrder(len(self), seed, self.group_sizes, self.order_version)

    def shape(self, index: int) -> tuple[int, ...] | None:
        """Returns the shape of the latents of row `index` in a dataset with several; None if it has one."""
        return None

    def replacements(self, index: int) -> Iterable[int]:
        """Yields row `index` and the rows that may replace it, nearest first: those after it and, after the last row,
        the first ones."""
        num_rows = len(self)
        return (row % num_rows for row in range(index, index + num_rows))

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def first_rows(self) -> Sequence[int]:
        """Indices of the rows that `check_first_rows` reads: few, so that they take seconds."""

    def check_first_rows(self) -> None:
        """Reads the first rows. Raises `BadRowError` if more of them are bad than are tolerated, or all of several."""
        faults: dict[int, BadRowError] = {}
        for index in self.first_rows:
            try:
                self.read(index)
            except BadRowError as error:
                faults[index] = error
        # Several rows that are all bad, or the only one, are data for another run. However many bad rows are tolerated,
        # there is no good one to go on with.
        if faults and len(faults) == len(self.first_rows) and (len(faults) > 1 or len(self) == 1):
            raise next(iter(faults.values()))
        for index, fault in faults.items():
            self._tolerate(index, fault)

    @abstractmethod
    def read(self, index: int) -> Row:
        """Reads row `index`, 0 <= index < len(self). Raises `BadRowError` if the row is bad."""

    def __getitem__(self, index: int) -> Row:
        """Returns row `index` or, if it is bad and tolerated, the next good row of `replacements`."""
        for row in self.replacements(index):
            try:
                return self.read(row)
            except BadRowError as error:
                self._tolerate(row, error)
        raise BadRowError(
            f"all {len(self)} rows of {self.path} are bad, each for the reason in the log; correct or name other data"
        )

    def _tolerate(self, index: int, error: BadRowError) -> None:
        if index in self.bad_rows:
            return
        if self._max_bad_rows is None:
            raise error
        if len(self.bad_rows) >= self._max_bad_rows:
            allowed = f"allows {self._max_bad_rows}" if self._max_bad_rows else "allows no bad row"
            raise BadRowError(
                f"{error}; data.max_bad_rows = {self._max_bad_rows} {allowed}: correct the data or raise it"
            ) from error
        self.bad_rows[index] = str(error)
        logger.warning(
            "bad row %d of at most %d, the next good row replaces it: %s", len(self.bad_rows), self._max_bad_rows, error
        )


def brief(value: object, width: int = 200) -> str:
    """Returns a value as one short printable line. Messages of readers have several lines and contain bytes of the
    file."""
    words = textwrap.shorten(str(value), width, placeholder=" ...")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in words)
