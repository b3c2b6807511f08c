"""Unrolling: the calls, FLOPs and memory of a causal role that generates samples segment by segment.

Through its linear layers, all segments of a sample cost as much as the whole sample. Attention costs what it reads: on
average half of the sequence, and never more than the window. There are as many calls as segments, and each gathers the
weights. Two things take memory beside activations: the KV cache with 2 L T d numbers for L layers, T tokens and width d
(6.04 GB per sample at 1.3B, 480p, 81 frames in bf16), and, for blocks without activation checkpointing, the copies in
which the attention of each segment joins the cache with its own keys and values. A role that sees whole samples has one
segment and no cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from titan_distill.attention.causal import Segmentation
from titan_distill.methods.base import Passes
from titan_distill.planner.memory import LocalForward


@dataclass(frozen=True)
class Unrolling:
    """The calls that generate or read one sample, or a longer rollout.

    Attributes:
        segmentation: the segments of a causal role's videos; None for other roles.
        by_segment: whether each segment is a call of its own.
        num_positions: positions along the sequence, over all segments.
        tokens_per_position: tokens at one position.
    """

    segmentation: Segmentation | None
    by_segment: bool
    num_positions: int
    tokens_per_position: int

    @classmethod
    def of(cls, segmentation: Segmentation | None, grid: tuple[int, int, int], passes: Passes) -> Unrolling:
        """The calls of `passes` for samples with a `grid` of tokens along (positions, height, width)."""
        num_positions = grid[0]
        if segmentation is not None and passes.segments:
            num_more = max(0, passes.segments - len(segmentation.lengths(num_positions)))
            num_positions += num_more * segmentation.length
        by_segment = segmentation is not None and passes.segments is not None
        return cls(segmentation, by_segment, num_positions, grid[1] * grid[2])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions in each call."""
        if self.segmentation is None or not self.by_segment:
            return (self.num_positions,)
        return self.segmentation.lengths(self.num_positions)

    @property
    def num_tokens(self) -> int:
        """Tokens in all calls."""
        return self.num_positions * self.tokens_per_position

    @property
    def num_keys(self) -> float | None:
        """Tokens that a token reads, on average. None for all."""
        if self.segmentation is None:
            return None
        return self.segmentation.num_keys(self.num_positions) * self.tokens_per_position

    def longest_call(self, sample: LocalForward, num_positions: int) -> LocalForward:
        """The longest call, from the forward of a whole `sample` of `num_positions`."""
        return replace(sample, num_tokens=-(-sample.num_tokens * max(self.lengths) // num_positions))

    def cache_bytes(self, forward: LocalForward) -> float:
        """Bytes of the KV cache when it is largest, in this rank's heads."""
        return self._bytes(forward, self._num_cached(self.num_positions))

    def copied_bytes(self, forward: LocalForward) -> float:
        """Bytes of the keys and values before each segment, once per segment that reads them."""
        starts = [sum(self.lengths[:index]) for index in range(len(self.lengths))]
        return self._bytes(forward, sum(map(self._num_cached, starts)))

    def _num_cached(self, num_positions: int) -> int:
        return self.segmentation.num_cached(num_positions) if self.segmentation and self.by_segment else 0

    def _bytes(self, forward: LocalForward, num_positions: int) -> float:
        tokens = num_positions * self.tokens_per_position
        numbers = 2 * forward.architecture.num_layers * forward.samples * tokens * forward.width
        return forward.compute_bytes * numbers / (forward.sequence * forward.tensor)
