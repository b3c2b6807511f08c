"""Video sparse attention: the attention core of a sparse role, and its sparsity schedule.

A model trained with dense attention becomes sparse step by step: every `schedule_interval` steps the sparsity grows
by `schedule_rate` until it reaches its target. All arithmetic is exact, in fractions of the decimals that the user
wrote. In floats 0.95 by 0.05 stops at 0.90, and one tile too many is selected wherever (1 - sparsity) x tiles should
have been whole.

At low sparsity the kernels' irregular access costs more than the skipped tiles save. Below `crossover` the fine branch
therefore runs dense, which is the mathematics of sparsity 0; the coarse branch and its gate stay, so nothing jumps but
the selection.

The core is one object shared by all blocks of a role. The number of tiles to read, which the schedule changes,
reaches the blocks as an argument of their forward: the compiler makes such a number a variable of one graph, where it
would make an attribute of a module a constant, and a graph for each of its values.

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
    """The number that was written, rather than the binary one nearest to it."""
    return Fraction(str(decimal))


@dataclass(frozen=True)
class SparsitySchedule:
    """Sparsity over training steps.

    Attributes:
        target: final sparsity: fraction of key tiles that a query tile skips.
        rate: sparsity added every `interval` steps; 0 starts at the target.
        interval: training steps.
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


@dataclass(frozen=True)
class TilesRead:
    """The numbers of tiles that one forward of a sparse core reads; its cost depends on nothing else.

    Attributes:
        num_tiles: tiles of the whole grid.
        num_selected: key tiles that the fine branch reads per query tile; all of them while it runs dense.
        num_lists: query blocks that choose their tiles; 0 while the fine branch runs dense.
    """

    num_tiles: int
    num_selected: int
    num_lists: int


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

    def num_selected(self, num_tiles: int) -> int:
        """Key tiles that the fine branch reads per query tile: (1 - sparsity) of all, rounded up, at least one."""
        return num_tiles if self.is_dense else max(1, math.ceil((1 - self.sparsity) * num_tiles))

    def selection(self, num_tiles: int) -> int | None:
        """`AttentionCall.num_selected` for a grid of `num_tiles`: None while the fine branch runs dense."""
        return None if self.is_dense else self.num_selected(num_tiles)

    def tiles_read(self, num_tiles: int) -> TilesRead:
        """The tiles read by one forward on a grid of `num_tiles`."""
        num_lists = 0 if self.is_dense else -(-num_tiles // self.tiles_per_list)
        return TilesRead(num_tiles, self.num_selected(num_tiles), num_lists)

    def mix(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """The fine output [B, L, H, D] and the coarse one [B, N, H, D], one row per query tile; see `AttentionCore`."""
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
