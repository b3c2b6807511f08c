"""Unrolling: the calls, FLOPs and memory of a causal role that generates samples segment by segment.

In the linear layers, all segments of a sample together cost as much as the whole sample. The cost of attention depends
on the tokens read: on average half of the sequence, and never more than the window. There is one call per segment, and
each call gathers the weights. Two things take memory in addition to activations: the KV cache with 2 L T d numbers for
L layers, T tokens and width d (6.04 GB per sample at 1.3B, 480p, 81 frames in bf16), and, for blocks without activation
checkpointing, a copy per segment of the cache concatenated with the segment's own keys and values. A role that
processes whole samples has one segment and no cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from titan_distill.attention.causal import Segmentation
from titan_distill.methods.base import Passes
from titan_distill.planner.memory import LocalForward


@dataclass(frozen=True)
class Unrolling:
    """Calls in which a role generates or reads one sample, or a rollout longer than a sample.

    Attributes:
        segmentation: the segments of a causal role's videos; None for other roles.
        by_segment: whether there is one call per segment.
        num_positions: positions along the sequence (latent frames), over all segments.
        tokens_per_position: tokens at one position.
    """

    segmentation: Segmentation | None
    by_segment: bool
    num_positions: int
    tokens_per_position: int

    @classmethod
    def of(cls, segmentation: Segmentation | None, grid: tuple[int, int, int], passes: Passes) -> Unrolling:
        """Returns the calls of `passes` for samples with a `grid` of tokens along (positions, height, width)."""
        num_positions = grid[0]
        if segmentation is not None and passes.segments:
            num_more = max(0, passes.segments - len(segmentation.lengths(num_positions)))
            num_positions += num_more * segmentation.length
        by_segment = segmentation is not None and passes.segments is not None
        return cls(segmentation, by_segment, num_positions, grid[1] * grid[2])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of positions in each call."""
        if self.segmentation is None or not self.by_segment:
            return (self.num_positions,)
        return self.segmentation.lengths(self.num_positions)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all calls together."""
        return self.num_positions * self.tokens_per_position

    @property
    def num_keys(self) -> float | None:
        """Mean number of tokens that a token attends to. None if it attends to all."""
        if self.segmentation is None:
            return None
        return self.segmentation.num_keys(self.num_positions) * self.tokens_per_position

    def longest_call(self, sample: LocalForward, num_positions: int) -> LocalForward:
        """Returns the longest call of the network, given `sample`, one forward over all `num_positions` tokens."""
        return replace(sample, num_tokens=-(-sample.num_tokens * max(self.lengths) // num_positions))

    def cache_bytes(self, forward: LocalForward) -> float:
        """Returns the bytes of the KV cache in this rank's heads when it is largest."""
        return self._bytes(forward, self._num_cached(self.num_positions))

    def copied_bytes(self, forward: LocalForward) -> float:
        """Returns the bytes of the copies of cached keys and values: one copy per segment that reads them."""
        starts = [sum(self.lengths[:index]) for index in range(len(self.lengths))]
        return self._bytes(forward, sum(map(self._num_cached, starts)))

    def _num_cached(self, num_positions: int) -> int:
        return self.segmentation.num_cached(num_positions) if self.segmentation and self.by_segment else 0

    def _bytes(self, forward: LocalForward, num_positions: int) -> float:
        tokens = num_positions * self.tokens_per_position
        numbers = 2 * forward.architecture.num_layers * forward.samples * tokens * forward.width
        return forward.compute_bytes * numbers / (forward.sequence * forward.tensor)
