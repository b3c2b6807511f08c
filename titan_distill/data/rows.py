"""Base of datasets, some of whose rows may turn out to be bad.

A bad row is found when it is read. Up to `max_bad_rows` of them are named in the log, and each is replaced by the next
good one. That depends on the files alone, so every layout and every resumed run trains on the same data.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from pathlib import Path
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

Row = TypeVar("Row", covariant=True)


class BadRowError(ValueError):
    """A row that can't be used; the message names file, row and fault."""


class RowDataset(torch.utils.data.Dataset[Row]):
    """Map-style dataset of the rows of `path`.

    Args:
        path: file or folder, for messages.
        max_bad_rows: how many distinct bad rows this process may meet.

    Raises:
        BadRowError: from indexing, at the first bad row beyond `max_bad_rows`.
    """

    def __init__(self, path: str | Path, max_bad_rows: int = 0) -> None:
        self.path = Path(path)
        self.bad_rows: dict[int, str] = {}
        self._max_bad_rows = max_bad_rows

    @property
    @abstractmethod
    def has_latents(self) -> bool:
        """Whether rows bring latents, or what latents are made of."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Row:
        """Row `index` itself, 0 <= index < len(self); raises `BadRowError` if it is bad."""

    def __getitem__(self, index: int) -> Row:
        """Row `index`, or the next good one after it (wrapping around) where bad rows are tolerated."""
        for row in range(index, index + len(self)):
            try:
                return self.read(row % len(self))
            except BadRowError as error:
                self._tolerate(row % len(self), error)
        raise BadRowError(f"all {len(self)} rows of {self.path} are bad: see the log for each, and write them again")

    def _tolerate(self, index: int, error: BadRowError) -> None:
        if index in self.bad_rows:
            return
        if len(self.bad_rows) >= self._max_bad_rows:
            raise error
        self.bad_rows[index] = str(error)
        logger.warning(
            "bad row %d of at most %d, the next good row replaces it: %s", len(self.bad_rows), self._max_bad_rows, error
        )
