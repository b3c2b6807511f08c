"""Self-attention for tokens that are distributed over ranks.

An attention core mixes tokens. This file collects the queries, keys and values that the core needs, and sends each
output to the rank that holds its token and the gate of the coarse branch. `parallelisms.sequence` describes how ranks
share tokens, by Ulysses or with gathered keys and values.

Shape suffixes: B batch, L tokens of the core's call, R a rank's tokens with padding, U without, H all heads, h a rank's
heads, D head dim, P ranks, N tiles of the call, T a rank's tiles with padding, X rows of tokens and of tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import titan_kernels
import torch
import torch.distributed as dist
from titan_kernels import Tiles
from torch import Tensor

from titan_distill.attention.dense import AttentionCall, AttentionCore
from titan_distill.parallelisms import collectives
from titan_distill.parallelisms.sequence import SequenceParallel, TokenShards


@dataclass(frozen=True, eq=False)
class ShardedAttention:
    """Self-attention with a core, for tokens that are all on this rank or distributed over sequence ranks.

    Attributes:
        core: attention core, which mixes the tokens.
        sequence: distribution of the tokens. Default: all tokens are on this rank, without padding.
    """

    core: AttentionCore
    sequence: SequenceParallel | None = None

    def __call__(self, call: AttentionCall) -> Tensor:
        """Returns [B, R, H, D] for the queries, keys, values and gate of this rank's tokens. Rows of padding are
        zero."""
        if self.sequence is None:
            return _attend(self.core, call)
        shards, group = self.sequence.shards(call.layout), self.sequence.group
        if group is None:
            return shards.pad(_attend(self.core, _unpadded(call, shards)), 1)
        if self.sequence.method == "ulysses":
            return _ulysses(self.core, call, shards, group)
        return _gathered(self.core, call, shards, group)


def _attend(core: AttentionCore, call: AttentionCall) -> Tensor:
    return add_coarse(*core.mix(call), call.gate_BLHD, call.layout.tiles(call.queries))


def add_coarse(fine_BLHD: Tensor, coarse_BNHD: Tensor | None, gate_BLHD: Tensor | None, tiles: Tiles) -> Tensor:
    """Returns the fine output plus, for a sparse core, the gated coarse output."""
    if coarse_BNHD is None or gate_BLHD is None:
        assert coarse_BNHD is gate_BLHD, "a block has a gate exactly where its core is sparse"
        return fine_BLHD
    return titan_kernels.add_coarse(fine_BLHD, coarse_BNHD, gate_BLHD, tiles)


def _unpadded(call: AttentionCall, shards: TokenShards) -> AttentionCall:
    q_BLHD, k_BLHD, v_BLHD = (shards.unpad(x, 1) for x in (call.q_BLHD, call.k_BSHD, call.v_BSHD))
    gate_BLHD = None if call.gate_BLHD is None else shards.unpad(call.gate_BLHD, 1)
    return AttentionCall(q_BLHD, k_BLHD, v_BLHD, call.layout, gate_BLHD, call.num_selected)


def _ulysses(core: AttentionCore, call: AttentionCall, shards: TokenShards, group: dist.ProcessGroup) -> Tensor:
    """Computes attention over all tokens for this rank's heads: Ulysses (Jacobs et al., 2309.14509)."""
    # One message for all three.
    qkv_3BRHD = torch.stack((call.q_BLHD, call.k_BSHD, call.v_BSHD))
    by_head_P3BRhD = qkv_3BRHD.unflatten(3, (group.size(), -1)).movedim(3, 0)
    by_token_P3BRhD = collectives.all_to_all(by_head_P3BRhD, group)
    q_BLhD, k_BLhD, v_BLhD = shards.unpad(by_token_P3BRhD.movedim(0, 2).flatten(2, 3), 2).unbind(0)
    whole = AttentionCall(q_BLhD, k_BLhD, v_BLhD, call.layout, num_selected=call.num_selected)
    fine_BLhD, coarse_BNhD = core.mix(whole)

    by_token_PBXhD = _by_rank(shards.pad(fine_BLhD, 1), group)
    if coarse_BNhD is not None:
        by_tile_PBThD = _by_rank(shards.tiles.pad(coarse_BNhD, 1), group)
        by_token_PBXhD = torch.cat((by_token_PBXhD, by_tile_PBThD), dim=2)
    mixed_BXHD = collectives.all_to_all(by_token_PBXhD, group).movedim(0, 2).flatten(2, 3)
    if coarse_BNhD is None or call.gate_BLHD is None:
        return mixed_BXHD
    own = group.rank()
    fine_BUHD, gate_BUHD = (x[:, : shards.lengths[own]] for x in (mixed_BXHD, call.gate_BLHD))
    coarse_BNHD = mixed_BXHD[:, shards.padded_length :][:, : shards.tiles.lengths[own]]
    return shards.pad_run(add_coarse(fine_BUHD, coarse_BNHD, gate_BUHD, call.layout.tiles(shards.tile_run(own))), 1)


def _by_rank(runs: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Splits equal runs along dim 1 into a new dim 0, the rank that receives each run."""
    return runs.unflatten(1, (group.size(), -1)).movedim(1, 0)


def _gathered(core: AttentionCore, call: AttentionCall, shards: TokenShards, group: dist.ProcessGroup) -> Tensor:
    """Computes attention of this rank's queries over all keys and values, which it gathers."""
    gathered_2BLHD = collectives.gather_for_parts(torch.stack((call.k_BSHD, call.v_BSHD)), 2, group)
    k_BLHD, v_BLHD = shards.unpad(gathered_2BLHD, 2).unbind(0)
    length, run = shards.lengths[group.rank()], shards.tile_run(group.rank())
    gate_BUHD = None if call.gate_BLHD is None else call.gate_BLHD[:, :length]
    q_BUHD = call.q_BLHD[:, :length]
    own = AttentionCall(q_BUHD, k_BLHD, v_BLHD, call.layout, gate_BUHD, call.num_selected, run)
    return shards.pad_run(_attend(core, own), 1)
