"""Dataset of several sets with weights and of buckets: rows of several shapes, of which each global batch has one.

Rows are numbered over all sets, one after the other. A row's bucket is the shape of its latents, which is read for all
rows at the start, from one small column. Rows without latents are in the first bucket. The order of samples is
`interleaving.MixedOrder`; a bad row is replaced by the next good one of its set and bucket.

Memory: each set has a cache of its own, so a process needs up to `CACHE_BYTES + FOOTER_BYTES` per set, and with buckets
8 bytes per row.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from titan_distill.data.interleaving import Bucket, MixedOrder, Part
from titan_distill.data.order import GroupSizes, Integers, SampleOrder
from titan_distill.data.parquet import LatentRow, ParquetDataset
from titan_distill.data.rows import BadRowError, RowDataset

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of one set in one bucket."""

    source: int
    bucket: int
    rows: Integers | None  # in the set, ascending; None for all


class MixedDataset(RowDataset[LatentRow]):
    """Map-style view of several sets, as one.

    Args:
        sets: the sets, opened without a tolerance for bad rows of their own.
        weights: passes over each set per epoch.
        shapes: shapes of the latents [C, F, H, W] of the buckets; empty if all rows have one shape.
        max_bad_rows: see `RowDataset`.

    Raises:
        BadRowError: more rows than are tolerated have latents of other shapes.
    """

    def __init__(
        self,
        sets: Sequence[ParquetDataset],
        weights: Sequence[float],
        shapes: Sequence[Shape] = (),
        max_bad_rows: int | None = None,
    ) -> None:
        super().__init__(sets[0].path, max_bad_rows)
        self.sets, self.shapes = tuple(sets), tuple(map(tuple, shapes))
        self._weights = [Fraction(str(weight)) for weight in weights]
        self._ends = list(itertools.accumulate(map(len, sets)))
        self._parts = self._by_shape() if shapes else [_Rows(source, 0, None) for source in range(len(sets))]
        identity = (*(part.digest for part in sets), *map(str, self._weights), *map(str, self.shapes))
        self.digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def set_digests(self) -> set[str]:
        return {part.digest for part in self.sets}

    @property
    def files(self) -> set[str]:
        return {file for part in self.sets for file in part.files}

    @property
    def has_latents(self) -> bool:
        return all(part.has_latents for part in self.sets)

    @property
    def first_rows(self) -> Sequence[int]:
        return [self._first_row(source) + row for source, part in enumerate(self.sets) for row in part.first_rows]

    def check_buckets(self) -> None:
        """Raises ValueError if no row has the shape of a bucket."""
        for bucket, shape in enumerate(self.shapes):
            if not any(rows.bucket == bucket for rows in self._parts):
                paths = ", ".join(str(part.path) for part in self.sets)
                raise ValueError(
                    f"no row of {paths} has latents of {list(shape)}; remove this bucket or add rows of it"
                )

    def read(self, index: int) -> LatentRow:
        source = bisect.bisect_right(self._ends, index)
        return self.sets[source].read(index - self._first_row(source))

    def order(self, seed: int, global_batch_size: int) -> MixedOrder:
        buckets: list[list[Part]] = [[] for _ in range(max(1, len(self.shapes)))]
        for number, part in enumerate(self._parts):
            groups = self.sets[part.source].group_sizes
            sizes = groups if part.rows is None else _sizes_of(groups, part.rows)
            own = SampleOrder(int(sizes.num_rows.sum()), f"{seed}, part {number}", sizes, self.order_version)
            first, weight = self._first_row(part.source), self._weights[part.source]
            buckets[part.bucket].append(Part(own, part.rows, first, weight))
        joined = tuple(Bucket(tuple(parts), f"order of sets {seed} {at}") for at, parts in enumerate(buckets))
        return MixedOrder(joined, global_batch_size, f"order of buckets {seed}")

    def shape(self, index: int) -> Shape | None:
        """Returns the shape of the bucket of row `index`; None without buckets."""
        return self.shapes[self._part_of(index)[0].bucket] if self.shapes else None

    def replacements(self, index: int) -> Iterable[int]:
        part, at = self._part_of(index)
        first = self._first_row(part.source)
        num_rows = len(self.sets[part.source]) if part.rows is None else len(part.rows)
        for number in range(at, at + num_rows):
            row = number % num_rows
            yield first + (row if part.rows is None else int(part.rows[row]))

    def _part_of(self, index: int) -> tuple[_Rows, int]:
        """Returns the part of a row, and the row's number in it."""
        source = bisect.bisect_right(self._ends, index)
        row = index - self._first_row(source)
        for part in self._parts:
            if part.source != source:
                continue
            if part.rows is None:
                return part, row
            at = int(np.searchsorted(part.rows, row))
            if at < len(part.rows) and part.rows[at] == row:
                return part, at
        raise AssertionError(f"row {index} is in no bucket")

    def _first_row(self, source: int) -> int:
        return self._ends[source - 1] if source else 0

    def _by_shape(self) -> list[_Rows]:
        found: list[_Rows] = []
        for source, part in enumerate(self.sets):
            shapes_N4 = part.latent_shapes()
            remaining = np.ones(len(part), bool)
            for bucket, shape in enumerate(self.shapes):
                is_of = (shapes_N4 == np.array(shape)).all(1)
                if bucket == 0:
                    is_of |= (shapes_N4 == 0).all(1)  # no latents
                remaining &= ~is_of
                if is_of.any():
                    found.append(_Rows(source, bucket, np.flatnonzero(is_of)))
            for row in np.flatnonzero(remaining).tolist():
                listed = ", ".join(str(list(shape)) for shape in self.shapes)
                error = BadRowError(
                    f"{part.place(row)}: latents of {shapes_N4[row].tolist()}, but the buckets have {listed}"
                )
                self._tolerate(self._first_row(source) + row, error)
        # By bucket, so that the order of the config's list is the order of the parts.
        return sorted(found, key=lambda rows: (rows.bucket, rows.source))


def _sizes_of(groups: GroupSizes, rows: Integers) -> GroupSizes:
    """Returns the sizes of the row groups that have some of `rows`, with the number of those rows alone."""
    ends = np.cumsum(groups.num_rows)
    num_rows = np.bincount(np.searchsorted(ends, rows, side="right"), minlength=len(ends)).astype(np.int64)
    return GroupSizes(num_rows[num_rows > 0], groups.num_bytes[num_rows > 0])
