"""What a causal role costs, for the planner: work, calls and memory of making samples segment by segment.

Through its linear layers a segment-wise forward of a sample is as dear as a whole one; attention costs what is read, on
average half of the sequence and never more than the window. There are as many calls as segments, and each gathers
weights. Two things are held beside activations: keys and values of what is in memory, 2 L T d numbers for L layers, T
tokens and width d (6.04 GB a sample at 1.3B, 480p, 81 frames in bf16), and, where blocks are not checkpointed, the
copies in which each segment's attention joined them to its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from titan_distill.attention.causal import Segmentation
from titan_distill.methods.base import Passes
from titan_distill.planner.memory import LocalForward


@dataclass(frozen=True)
class Unrolling:
    """A sample, or a longer rollout, as a causal role makes it."""

    segmentation: Segmentation
    num_positions: int
    tokens_per_position: int

    @classmethod
    def of(cls, segmentation: Segmentation, grid: tuple[int, int, int], passes: Passes) -> Unrolling:
        """``grid``: tokens of a sample, along (positions, height, width)."""
        own, tokens = segmentation.lengths(grid[0]), grid[1] * grid[2]
        num_more = max(0, (passes.segments or 0) - len(own))
        return cls(segmentation, grid[0] + num_more * segmentation.length, tokens)

    @property
    def num_calls(self) -> int:
        return len(self.segmentation.lengths(self.num_positions))

    @property
    def num_tokens(self) -> int:
        return self.num_positions * self.tokens_per_position

    @property
    def num_keys(self) -> float:
        """Tokens that a token reads, on average."""
        return self.segmentation.num_keys(self.num_positions) * self.tokens_per_position

    def one_call(self, forward: LocalForward, num_positions: int) -> LocalForward:
        """The longest segment, given the ``forward`` of a whole sample of ``num_positions``."""
        longest = max(self.segmentation.lengths(self.num_positions))
        return replace(forward, num_tokens=-(-forward.num_tokens * longest // num_positions))

    def memory_bytes(self, forward: LocalForward) -> float:
        """Keys and values in memory when they are most, of this rank's heads."""
        tokens = self.segmentation.num_cached(self.num_positions) * self.tokens_per_position
        return self._bytes(forward, tokens)

    def copied_bytes(self, forward: LocalForward) -> float:
        """Keys and values of all segments' prefixes, once for each segment that read them."""
        positions, start = 0, 0
        for length in self.segmentation.lengths(self.num_positions):
            positions += self.segmentation.num_cached(start)
            start += length
        return self._bytes(forward, positions * self.tokens_per_position)

    def _bytes(self, forward: LocalForward, tokens: int) -> float:
        """Of keys and values in all layers."""
        numbers = 2 * forward.architecture.num_layers * forward.samples * tokens * forward.width
        return forward.compute_bytes * numbers / (forward.sequence * forward.tensor)
