"""Order of samples of a mixture: several sets with weights, and buckets of several shapes.

A *part* is the rows of one set in one bucket, in the `SampleOrder` of their own. Two endless sequences of labels join
the parts. Within a bucket, one says which part the next sample comes from: in each epoch a part has
`weight × rows` samples, so with weight 1 each row occurs once. Over the buckets, the other says which bucket the next
global batch comes from. Batch k of a bucket has the bucket's samples `k N` to `(k + 1) N - 1` (N samples in a global
batch), and it belongs to the epoch in which its last sample does: the samples that an epoch leaves over open the
bucket's first batch of the next one.

Trade-off: a sequence of labels is not one permutation of an epoch, which would have millions of entries, but one per
block of `BLOCK` labels, each with its exact share of every label. So the place of a label has a closed form, and a run
resumes anywhere without a count of what came before.

The order is a pure function of seed, data, weights, shapes, N and the number of the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from titan_distill.data.order import Integers, SampleOrder, permutation

BLOCK = 65_536
"""Labels that are permuted together."""

_MANY_EPOCHS = 2**40


@dataclass(frozen=True)
class Interleaving:
    """Endless sequence of the labels 0, 1, ... in epochs.

    Attributes:
        totals: how often each label occurs before an epoch. No number falls from one epoch to the next.
        key: key of the permutations.
    """

    totals: Callable[[int], tuple[int, ...]]
    key: str

    def locate(self, position: int) -> tuple[int, int]:
        """Returns the label at a position, and how often it occurs before that."""
        epoch = self._epoch(position)
        before = self.totals(epoch)
        counts = tuple(after - start for after, start in zip(self.totals(epoch + 1), before, strict=True))
        block, at = divmod(position - sum(before), BLOCK)
        labels, occurrences = _block(counts, block, f"{self.key} {epoch} {block}")
        label = int(labels[at])
        return label, before[label] + int(occurrences[at])

    def _epoch(self, position: int) -> int:
        epoch = position * _MANY_EPOCHS // sum(self.totals(_MANY_EPOCHS))  # right, or beside it
        while sum(self.totals(epoch)) > position:
            epoch -= 1
        while sum(self.totals(epoch + 1)) <= position:
            epoch += 1
        return epoch


@functools.lru_cache(maxsize=8)
def _block(counts: tuple[int, ...], block: int, key: str) -> tuple[Integers, Integers]:
    """Returns the labels of a block, and how often each has occurred before in the epoch."""
    first, end = _split(counts, block * BLOCK), _split(counts, min((block + 1) * BLOCK, sum(counts)))
    sizes = np.subtract(end, first)
    labels = np.repeat(np.arange(len(counts)), sizes)
    occurrences = np.concatenate([np.arange(*ends) for ends in zip(first, end, strict=True)])
    order = permutation(len(labels), key)
    labels = labels[order]
    placed = np.empty_like(occurrences)
    placed[np.argsort(labels, kind="stable")] = occurrences  # each label's occurrences in their order
    return labels, placed


def _split(counts: Sequence[int], position: int) -> list[int]:
    """Returns how often each label occurs before a position of an epoch: its share, as a whole number.

    Each label takes its rounded share of what the labels before it have left, so the numbers add up to `position`, and
    none falls when the position rises.
    """
    rest, total = position, sum(counts)
    parts = []
    for count in counts:
        part = (2 * count * rest + total) // (2 * total) if total else 0
        parts.append(part)
        rest, total = rest - part, total - count
    return parts


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of one set that have one shape.

    Attributes:
        order: order of the part's rows, counted from 0.
        rows: dataset rows of the part, ascending; None for all rows of a set.
        first_row: dataset row of the set's first row.
        weight: passes over the part per epoch.
    """

    order: SampleOrder
    rows: Integers | None
    first_row: int
    weight: Fraction

    def total(self, epoch: int) -> int:
        """Returns the number of samples before an epoch."""
        return int(self.weight * self.order.num_rows * epoch)

    def row(self, index: int) -> int:
        """Returns the dataset row of the part's sample `index`."""
        row = self.order.row(index)
        return self.first_row + (row if self.rows is None else int(self.rows[row]))


@dataclass(frozen=True)
class Bucket:
    """Endless sequence of samples of one shape."""

    parts: tuple[Part, ...]
    key: str

    def totals(self, epoch: int) -> tuple[int, ...]:
        """Returns the number of samples of each part before an epoch."""
        return tuple(part.total(epoch) for part in self.parts)

    def row(self, position: int) -> int:
        """Returns the dataset row of sample `position` of the bucket."""
        if len(self.parts) == 1:
            return self.parts[0].row(position)
        part, index = Interleaving(self.totals, self.key).locate(position)
        return self.parts[part].row(index)


@dataclass(frozen=True)
class MixedOrder:
    """Maps each sample id of a run to a dataset row. The ids `i N` to `(i + 1) N - 1` are global batch i, whose samples
    are of one bucket."""

    buckets: tuple[Bucket, ...]
    global_batch_size: int
    key: str

    def row(self, sample_id: int) -> int:
        """Returns the row of `sample_id`."""
        batch, index = divmod(sample_id, self.global_batch_size)
        bucket, number = _bucket(self, batch)
        return self.buckets[bucket].row(number * self.global_batch_size + index)

    def bucket(self, sample_id: int) -> int:
        """Returns the number of the bucket of `sample_id`."""
        return _bucket(self, sample_id // self.global_batch_size)[0]

    def totals(self, epoch: int) -> tuple[int, ...]:
        """Returns the number of global batches of each bucket before an epoch."""
        return tuple(sum(bucket.totals(epoch)) // self.global_batch_size for bucket in self.buckets)


@functools.lru_cache(maxsize=4)
def _bucket(order: MixedOrder, batch: int) -> tuple[int, int]:
    """Returns the bucket of a global batch, and the batch's number in the bucket."""
    if len(order.buckets) == 1:
        return 0, batch
    return Interleaving(order.totals, order.key).locate(batch)
