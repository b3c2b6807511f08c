"""Video sparse attention as a role's attention core, and the schedule by which it becomes sparse.

A model trained with dense attention is led to sparsity step by step: every `schedule_interval` steps the sparsity grows
by `schedule_rate` until it reaches its target. All arithmetic is exact, in fractions of the decimals that the user
wrote. In floats 0.95 by 0.05 stops at 0.90, and one tile too many is selected wherever (1 - sparsity) x tiles should
have been whole.

At low sparsity the kernels' irregular work costs more than it saves. Below `crossover` the fine branch therefore runs
dense, which is the mathematics of sparsity 0; the coarse branch and its gate stay, so nothing jumps but the selection.

The core is one object shared by all blocks of a role, and its sparsity is plain integers: a step of the schedule
changes what the blocks' next forward reads, and compiles nothing.

Shape suffixes: B batch, L query tokens, S key tokens, H heads, D head dim, T query tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import titan_kernels
from titan_kernels import TileLayout
from torch import Tensor

from titan_distill.attention.dense import dense_attention

if TYPE_CHECKING:
    from titan_distill.config_sections import SparseAttentionConfig


def exact(decimal: float) -> Fraction:
    """The number that was written, rather than the binary one nearest to it."""
    return Fraction(str(decimal))


@dataclass(frozen=True)
class SparsitySchedule:
    """Sparsity over training steps.

    Attributes:
        target: sparsity in the end, the share of key tiles that a query tile does not attend to.
        rate: what is added every `interval` steps; 0 starts at the target.
        interval: steps.
    """

    target: Fraction
    rate: Fraction
    interval: int

    @classmethod
    def of(cls, config: SparseAttentionConfig) -> SparsitySchedule:
        return cls(exact(config.sparsity), exact(config.schedule_rate), config.schedule_interval)

    def at(self, step: int) -> Fraction:
        """Sparsity of the given step, counted from 0 at the very start of the run."""
        if not self.rate:
            return self.target
        return min(step // self.interval * self.rate, self.target)


def num_selected(sparsity: Fraction, num_tiles: int) -> int:
    """Key tiles that each query tile attends to: (1 - sparsity) of `num_tiles`, rounded up, at least one."""
    return max(1, _ceil((1 - sparsity) * num_tiles))


def _ceil(fraction: Fraction) -> int:
    return -(-fraction.numerator // fraction.denominator)


class SparseAttention:
    """The attention core of a sparse role. Its blocks own a gate, `to_gate_compress`, for the coarse branch."""

    def __init__(self, config: SparseAttentionConfig) -> None:
        self.schedule = SparsitySchedule.of(config)
        self.crossover = exact(config.crossover)
        self.tiles_per_list = config.tiles_per_list
        self.start_step(0)

    def start_step(self, step: int) -> None:
        """Follows the schedule to a training step."""
        self.sparsity = self.schedule.at(step)
        self.is_dense = self.sparsity < self.crossover
        # What blocks read: the compiler knows integers, and follows them without a new graph for each.
        self._kept, self._of = (1 - self.sparsity).as_integer_ratio()

    def num_selected(self, num_tiles: int) -> int:
        """Key tiles that the fine branch of each query tile reads now."""
        return num_tiles if self.is_dense else max(1, -(-self._kept * num_tiles // self._of))

    def mix(
        self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, layout: TileLayout, queries: range | None = None
    ) -> tuple[Tensor, Tensor]:
        """The fine output [B, L, H, D] and the coarse one [B, T, H, D], one row a query tile.

        `queries` are the tiles whose tokens `q_BLHD` holds; all by default.
        """
        if self.is_dense:
            fine_BLHD = dense_attention(q_BLHD, k_BSHD, v_BSHD)
            return fine_BLHD, titan_kernels.coarse_branch(q_BLHD, k_BSHD, v_BSHD, layout, queries)
        return titan_kernels.branches(
            q_BLHD,
            k_BSHD,
            v_BSHD,
            layout,
            self.num_selected(layout.num_tiles),
            queries=queries,
            tiles_per_list=self.tiles_per_list,
        )
