"""Video sparse attention: the attention core of a sparse role, and its sparsity schedule.

A model trained with dense attention becomes sparse gradually: every `schedule_interval` steps the sparsity grows by
`schedule_rate` until it reaches its target. The arithmetic uses exact fractions of the decimals that the user wrote.
With floats, a schedule to 0.95 in steps of 0.05 would stop at 0.90, and one tile too many would be selected where (1 -
sparsity) × tiles is a whole number.

At low sparsity the irregular memory access of the kernels costs more than the skipped tiles save. Below `crossover` the
fine branch therefore uses dense attention over all tiles. The coarse branch and its gate do not change at the
crossover.

All blocks of a role share one core. The schedule changes the number of tiles to read, which is an argument of the
blocks' forward. The compiler turns an argument into a variable of one graph; for an attribute of a module it would make
one graph per value.

Shape suffixes: B batch, L query tokens, S key tokens, H heads, D head dim, N query tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import titan_kernels
import torch
from torch import Tensor

from titan_distill.attention.dense import AttentionCall, dense_attention
from titan_distill.config.sections import SparseAttentionConfig
from titan_distill.parallelisms.activation_checkpoint import register_attention, register_selection

register_attention(torch.ops.titan_kernels.vsa_forward.default)
register_selection(torch.ops.titan_kernels.block_topk.default)


def exact(decimal: float) -> Fraction:
    """Returns the decimal number that was written, as a fraction; the float is only the nearest binary number."""
    return Fraction(str(decimal))


@dataclass(frozen=True)
class SparsitySchedule:
    """Schedule of the sparsity over training steps.

    Attributes:
        target: final sparsity: fraction of key tiles that a query tile skips.
        rate: sparsity added every `interval` steps, starting at 0. A rate of 0 uses the target from the first step.
        interval: number of training steps between two changes.
    """

    target: Fraction
    rate: Fraction
    interval: int

    @classmethod
    def of(cls, config: SparseAttentionConfig) -> SparsitySchedule:
        return cls(exact(config.sparsity), exact(config.schedule_rate), config.schedule_interval)

    def at(self, step: int) -> Fraction:
        """Returns the sparsity of a step, counted from 0 at the start of the run."""
        if not self.rate:
            return self.target
        return min(step // self.interval * self.rate, self.target)


@dataclass(frozen=True)
class TilesRead:
    """Numbers of tiles in one forward of a sparse core. They determine its cost.

    Attributes:
        num_tiles: tiles of the whole grid.
        num_selected: key tiles that the fine branch reads per query tile; all while it is dense.
        num_lists: query blocks that select tiles; 0 while the fine branch is dense.
    """

    num_tiles: int
    num_selected: int
    num_lists: int


class SparseAttention:
    """Attention core of a sparse role. The role's blocks have a gate, `to_gate_compress`, for the coarse branch."""

    def __init__(self, config: SparseAttentionConfig) -> None:
        self.schedule = SparsitySchedule.of(config)
        self.crossover = exact(config.crossover)
        self.tiles_per_list = config.tiles_per_list
        self.start_step(0)

    def start_step(self, step: int) -> None:
        """Sets the sparsity to the schedule's value at a training step."""
        self.sparsity = self.schedule.at(step)
        self.is_dense = self.sparsity < self.crossover

    def num_selected(self, num_tiles: int) -> int:
        """Returns the number of key tiles that the fine branch reads per query tile: (1 - sparsity) × `num_tiles`,
        rounded up, at least 1."""
        return num_tiles if self.is_dense else max(1, math.ceil((1 - self.sparsity) * num_tiles))

    def selection(self, num_tiles: int) -> int | None:
        """Returns `AttentionCall.num_selected` for a grid of `num_tiles`: None while the fine branch is dense."""
        return None if self.is_dense else self.num_selected(num_tiles)

    def tiles_read(self, num_tiles: int) -> TilesRead:
        """Returns the tiles that one forward reads on a grid of `num_tiles`."""
        num_lists = 0 if self.is_dense else -(-num_tiles // self.tiles_per_list)
        return TilesRead(num_tiles, self.num_selected(num_tiles), num_lists)

    def mix(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Returns the fine output [B, L, H, D] and the coarse output [B, N, H, D] with one row per query tile; see
        `AttentionCore`."""
        q_BLHD, k_BSHD, v_BSHD = call.q_BLHD, call.k_BSHD, call.v_BSHD
        if call.num_selected is None:
            fine_BLHD = dense_attention(q_BLHD, k_BSHD, v_BSHD)
            coarse_BNHD = titan_kernels.coarse_branch(q_BLHD, k_BSHD, v_BSHD, call.layout, call.queries)
        else:
            fine_BLHD, coarse_BNHD = titan_kernels.branches(
                q_BLHD, k_BSHD, v_BSHD, call.layout, call.num_selected,
                queries=call.queries, tiles_per_list=self.tiles_per_list,
            )  # fmt: skip
        # Rounded like the fine output also where it need not travel: the same numbers in every layout.
        return fine_BLHD, coarse_BNHD.to(q_BLHD.dtype)
