"""Attention of tokens that the ranks of the sequence axis share: Ulysses, or gathered keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from titan_kernels import TileLayout
from torch import Tensor

from titan_distill.attention.dense import AttentionCore
from titan_distill.attention.placement import LocalAttention, Placement, add_coarse
from titan_distill.parallelisms import collectives
from titan_distill.parallelisms.sequence import SequenceParallel


@dataclass(frozen=True, eq=False)
class PaddedAttention:
    """One rank has all tokens, and padding."""

    parallel: SequenceParallel
    core: AttentionCore

    def __call__(
        self,
        q_BRHD: Tensor,
        k_BRHD: Tensor,
        v_BRHD: Tensor,
        layout: TileLayout,
        gate_BRHD: Tensor | None,
        num_selected: int | None,
    ) -> Tensor:
        shards = self.parallel.shards(layout)
        q_BLHD, k_BLHD, v_BLHD = (shards.unpad(x, 1) for x in (q_BRHD, k_BRHD, v_BRHD))
        gate_BLHD = None if gate_BRHD is None else shards.unpad(gate_BRHD, 1)
        fine_BLHD, coarse_BNHD = self.core.mix(q_BLHD, k_BLHD, v_BLHD, layout, num_selected)
        return shards.pad(add_coarse(fine_BLHD, coarse_BNHD, gate_BLHD, layout.tiles()), 1)


@dataclass(frozen=True, eq=False)
class UlyssesAttention:
    """All tokens and some heads: Ulysses (Jacobs et al., 2309.14509)."""

    parallel: SequenceParallel
    core: AttentionCore

    def __call__(
        self,
        q_BRHD: Tensor,
        k_BRHD: Tensor,
        v_BRHD: Tensor,
        layout: TileLayout,
        gate_BRHD: Tensor | None,
        num_selected: int | None,
    ) -> Tensor:
        group = self.parallel.group
        assert group is not None
        shards, own = self.parallel.shards(layout), group.rank()
        # One message for all three.
        qkv_3BRHD = torch.stack((q_BRHD, k_BRHD, v_BRHD))
        by_head_P3BRhD = qkv_3BRHD.unflatten(3, (group.size(), -1)).movedim(3, 0)
        by_token_P3BRhD = collectives.all_to_all(by_head_P3BRhD, group)
        qkv_3BLhD = shards.unpad(by_token_P3BRhD.movedim(0, 2).flatten(2, 3), 2)
        q_BLhD, k_BLhD, v_BLhD = qkv_3BLhD.unbind(0)
        fine_BLhD, coarse_BNhD = self.core.mix(q_BLhD, k_BLhD, v_BLhD, layout, num_selected)

        by_token_PBXhD = _by_rank(shards.pad(fine_BLhD, 1), group)
        if coarse_BNhD is not None:
            by_tile_PBThD = _by_rank(shards.tiles.pad(coarse_BNhD, 1), group)
            by_token_PBXhD = torch.cat((by_token_PBXhD, by_tile_PBThD), dim=2)
        mixed_BXHD = collectives.all_to_all(by_token_PBXhD, group).movedim(0, 2).flatten(2, 3)
        if coarse_BNhD is None or gate_BRHD is None:
            return mixed_BXHD
        fine_BUHD = mixed_BXHD[:, : shards.lengths[own]]
        coarse_BNHD = mixed_BXHD[:, shards.padded_length :][:, : shards.tiles.lengths[own]]
        gate_BUHD = gate_BRHD[:, : shards.lengths[own]]
        tiles = layout.tiles(shards.tile_run(own))
        return shards.pad_run(add_coarse(fine_BUHD, coarse_BNHD, gate_BUHD, tiles), 1)


def _by_rank(runs: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Equal runs along dim 1, with the rank they go to as dim 0."""
    return runs.unflatten(1, (group.size(), -1)).movedim(1, 0)


@dataclass(frozen=True, eq=False)
class GatheredAttention:
    """Own queries, all keys and values."""

    parallel: SequenceParallel
    core: AttentionCore

    def __call__(
        self,
        q_BRHD: Tensor,
        k_BRHD: Tensor,
        v_BRHD: Tensor,
        layout: TileLayout,
        gate_BRHD: Tensor | None,
        num_selected: int | None,
    ) -> Tensor:
        group = self.parallel.group
        assert group is not None
        shards, own = self.parallel.shards(layout), group.rank()
        gathered_2BLHD = collectives.gather_for_parts(torch.stack((k_BRHD, v_BRHD)), 2, group)
        k_BLHD, v_BLHD = shards.unpad(gathered_2BLHD, 2).unbind(0)
        length, run = shards.lengths[own], shards.tile_run(own)
        fine_BUHD, coarse_BNHD = self.core.mix(q_BRHD[:, :length], k_BLHD, v_BLHD, layout, num_selected, run)
        gate_BUHD = None if gate_BRHD is None else gate_BRHD[:, :length]
        return shards.pad_run(add_coarse(fine_BUHD, coarse_BNHD, gate_BUHD, layout.tiles(run)), 1)


def place(parallel: SequenceParallel | None, core: AttentionCore) -> Placement:
    """Attention of a rank's tokens among all tokens, computed by `core`; None: all tokens are here."""
    if parallel is None:
        return LocalAttention(core)
    if parallel.group is None:
        return PaddedAttention(parallel, core)
    return UlyssesAttention(parallel, core) if parallel.method == "ulysses" else GatheredAttention(parallel, core)
