"""Order of samples: a pure function of seed, data and sample id, the same for any ranks, workers and micro-batches.

Sample `g` of a run, counted over all ranks from 0, is at position `g % num_rows` of epoch `g // num_rows`. An epoch is
a permutation of all rows, so each row occurs once. There are two kinds:

- *Whole*: one random permutation of the rows. It is used for up to `WHOLE_ROWS` rows, and for data whose rows are read
  alone, such as a table of videos.
- *Windowed*: for more rows of parquet files. The row groups are permuted over the whole dataset, that sequence is cut
  into windows, and the rows of a window are permuted. A window has `WINDOW_BYTES` of row groups, or one that is larger;
  a row counts as at least `WINDOW_BYTES / WHOLE_ROWS`, so a window of small rows has `WHOLE_ROWS` of them.

Trade-off: the smallest unit that parquet can read is a row group. A whole permutation of a large dataset would read a
group of hundreds of rows for each row. In the windowed order a reader that can hold two windows reads each group once
per epoch, and the price is that rows of one group are at most a window apart. The order is as random as the whole
permutation where a group has one row, which is how `write_rows` stores rows of 1 MiB or more.

The order has a version. A checkpoint records it, and a resumed run keeps it: version 1 is always whole.
"""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from titan_distill.diffusion.noise import keyed_generator

ORDER_VERSION = 2
"""Version of the order of a new run."""
WHOLE_ROWS = 65_536
"""Largest number of rows of which each epoch is a whole permutation in any version."""
WINDOW_BYTES = 128 * 2**20
"""Size of a window, in bytes of its uncompressed row groups."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class GroupSizes:
    """Sizes of the row groups of a dataset, in the order of their rows."""

    num_rows: Integers
    num_bytes: Integers  # uncompressed, all columns


@dataclass(frozen=True)
class SampleOrder:
    """Maps each sample id of a run to a dataset row.

    `groups` is None for data whose rows are read alone. `seed` is that of the run or, for a part of a mixture, a text
    with it. Raises ValueError for a version that is not known.
    """

    num_rows: int
    seed: int | str
    groups: GroupSizes | None = None
    version: int = ORDER_VERSION

    def __post_init__(self) -> None:
        check_version(self.version)

    def row(self, sample_id: int) -> int:
        """Returns the row of `sample_id`. Every row occurs once per epoch, in an order keyed by (seed, epoch)."""
        epoch, position = divmod(sample_id, self.num_rows)
        if self.groups is None or self.version == 1 or self.num_rows <= WHOLE_ROWS:
            return int(_whole(self.num_rows, self.seed, epoch)[position])
        windows = _windows(self.groups, self.seed, epoch)
        number = bisect.bisect_right(windows.row_ends, position)
        start = int(windows.row_ends[number - 1]) if number else 0
        return int(_rows_of_window(self.groups, self.seed, epoch, number)[position - start])


def check_version(version: int) -> None:
    """Raises ValueError for an order that is not known."""
    if version not in range(1, ORDER_VERSION + 1):
        raise ValueError(
            f"the order of samples has version {version}, but this titan_distill knows 1 to {ORDER_VERSION}; use the "
            "version that wrote the checkpoint, or a newer one"
        )


@dataclass(frozen=True)
class _Windows:
    """The windows of an epoch: window i has the row groups `groups[group_ends[i - 1]:group_ends[i]]`."""

    groups: Integers  # all groups, permuted
    group_ends: Integers
    row_ends: Integers  # positions in the epoch at which the windows end


# Two epochs meet in a batch; a dataset smaller than the batch spans a few more; a mixture has several parts.
_NUM_CACHED = 16


@functools.lru_cache(_NUM_CACHED)
def _whole(num_rows: int, seed: int | str, epoch: int) -> Integers:
    return permutation(num_rows, f"epoch permutation {seed} {epoch}")


@functools.lru_cache(_NUM_CACHED)
def _windows(sizes: GroupSizes, seed: int | str, epoch: int) -> _Windows:
    groups = permutation(len(sizes.num_rows), f"order of row groups {seed} {epoch}")
    costs = np.maximum(sizes.num_bytes, sizes.num_rows * (WINDOW_BYTES // WHOLE_ROWS))[groups]
    # The window in which a group ends. So a window exceeds its size by less than its first group.
    window_of_group = (np.cumsum(costs) - 1) // WINDOW_BYTES
    group_ends = np.append(np.flatnonzero(np.diff(window_of_group)) + 1, len(groups))
    row_ends = np.cumsum(sizes.num_rows[groups])[group_ends - 1]
    return _Windows(groups, group_ends, row_ends)


@functools.lru_cache(_NUM_CACHED)
def _rows_of_window(sizes: GroupSizes, seed: int | str, epoch: int, number: int) -> Integers:
    windows = _windows(sizes, seed, epoch)
    groups = windows.groups[windows.group_ends[number - 1] if number else 0 : windows.group_ends[number]]
    ends = np.cumsum(sizes.num_rows)[groups]
    rows = np.concatenate([np.arange(end - size, end) for end, size in zip(ends, sizes.num_rows[groups], strict=True)])
    return rows[permutation(len(rows), f"order in a window {seed} {epoch} {number}")]


def permutation(length: int, key: str) -> Integers:
    """Returns a random permutation of the numbers below `length`, a function of `key`."""
    return torch.randperm(length, generator=keyed_generator(key)).numpy()
