"""Sequence parallelism: the ranks of an axis share the tokens of a sample.

Tokens are in tile order, and a rank holds a run of whole tiles. Everything but attention is token-wise and needs
nothing from others. Attention has two ways to see all tokens:

- *Ulysses*: one all-to-all turns "some tokens, all heads" into "all tokens, some heads" and another turns back. Its
  traffic falls with the number of ranks, but that number must divide the heads.
- *all-gather*: each rank keeps its queries and gathers all keys and values. It moves more bytes, and any number of
  ranks will do.

Runs differ in length (a boundary lies at the tile nearest to an even split, and edge tiles are ragged), and collectives
want equal slices, so runs are padded to the longest with zeros. Attention drops the padding before it looks at tokens
and puts it back afterwards: no mask, and a token's result does not depend on the number of ranks. Padded rows travel
through norms and linear layers, and are dropped at the end; nothing that is kept ever reads them.

A sparse core has a coarse output too, one row a tile: it travels with the fine one, in the same message and a 64th of
its size, to where the gate is. The gate itself, as large as the queries, never travels.

Shape suffixes: B batch, L all tokens, R a rank's tokens with padding, U without, H heads, D head dim, P ranks, N tiles,
T a rank's tiles with padding, X rows of tokens and of tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from titan_kernels import TileLayout
from torch import Tensor

from titan_distill.attention.dense import AttentionCore
from titan_distill.attention.placement import Placement, add_coarse
from titan_distill.parallelisms import collectives

Method = Literal["ulysses", "all_gather"]


def choose_method(
    num_heads: int, sequence: int, tensor: int, asked: Literal["auto", "ulysses", "all_gather"] = "auto"
) -> Method:
    """What was asked for; for ``auto``, Ulysses where it can be had: where sequence × tensor ranks divide the heads."""
    if asked != "auto":
        return asked
    return "all_gather" if num_heads % (sequence * tensor) else "ulysses"


def tile_bounds(layout: TileLayout, num_ranks: int, join: int = 1) -> list[int]:
    """The tile with which each rank's run begins, and at the end the number of tiles.

    The bound before rank i is the tile start nearest to an even split of the tokens, among those with a multiple of
    ``join`` tiles before them. Raises ValueError when there are fewer runs of ``join`` tiles than ranks.
    """
    starts = [*layout.start.tolist(), layout.num_tokens]
    cuts = [*range(0, layout.num_tiles, join), layout.num_tiles]
    if len(cuts) - 1 < num_ranks:
        raise ValueError(
            f"{describe_tiles(layout.num_tiles, join)} of tokens can't be shared by {num_ranks} sequence ranks; lower "
            f"parallelism.sequence to {len(cuts) - 1} or less"
        )
    bounds = [0]
    for rank in range(1, num_ranks):
        even = rank * layout.num_tokens / num_ranks
        # Every rank gets a tile, those still to come too.
        allowed = [cut for cut in cuts[rank : len(cuts) - (num_ranks - rank)] if cut > bounds[-1]]
        bounds.append(min(allowed, key=lambda cut: abs(starts[cut] - even)))
    return [*bounds, layout.num_tiles]


def describe_tiles(num_tiles: int, join: int = 1) -> str:
    """What runs are made of, for errors."""
    return f"{num_tiles} tiles" if join == 1 else f"{-(-num_tiles // join)} groups of {join} tiles"


def token_bounds(layout: TileLayout, num_ranks: int, join: int = 1) -> list[int]:
    """Where each rank's run of whole tiles begins, and at the end the number of tokens. Raises as ``tile_bounds``."""
    starts = [*layout.start.tolist(), layout.num_tokens]
    return [starts[tile] for tile in tile_bounds(layout, num_ranks, join)]


@dataclass(frozen=True)
class Runs:
    """Rows that lie one after the other, cut into a run for each rank.

    ``multiple``: padded runs are a multiple of this, for what cuts them further.
    """

    bounds: tuple[int, ...]
    multiple: int = 1

    @property
    def lengths(self) -> list[int]:
        """Rows of each rank, without padding."""
        return [end - start for start, end in zip(self.bounds[:-1], self.bounds[1:], strict=True)]

    @property
    def padded_length(self) -> int:
        """Rows that every rank holds."""
        return -(-max(self.lengths) // self.multiple) * self.multiple

    @property
    def is_padded(self) -> bool:
        return any(length < self.padded_length for length in self.lengths)

    def pad(self, x: Tensor, dim: int) -> Tensor:
        """All runs one after the other, each padded with zeros."""
        if not self.is_padded:
            return x
        return torch.cat([self.pad_run(run, dim) for run in x.split(self.lengths, dim=dim)], dim=dim)

    def unpad(self, x: Tensor, dim: int) -> Tensor:
        """The inverse of ``pad``."""
        if not self.is_padded:
            return x
        runs = zip(x.split(self.padded_length, dim=dim), self.lengths, strict=True)
        return torch.cat([run.narrow(dim, 0, length) for run, length in runs], dim=dim)

    def pad_run(self, run: Tensor, dim: int) -> Tensor:
        """One rank's rows, padded with zeros."""
        missing = self.padded_length - run.shape[dim]
        return run if not missing else F.pad(run, (0, 0) * (run.ndim - 1 - dim % run.ndim) + (0, missing))


@dataclass(frozen=True)
class TokenShards(Runs):
    """How the tokens of one grid are spread over sequence ranks: runs of tokens, which are runs of whole ``tiles``."""

    tiles: Runs = field(kw_only=True)

    @classmethod
    def of(cls, layout: TileLayout, num_ranks: int, multiple: int = 1, join: int = 1) -> TokenShards:
        """Runs of ``multiple`` tokens when padded, which begin after a multiple of ``join`` tiles."""
        tiles = Runs(tuple(tile_bounds(layout, num_ranks, join)))
        return cls(tuple(token_bounds(layout, num_ranks, join)), multiple, tiles=tiles)

    def tile_run(self, rank: int) -> range:
        """The tiles of a rank's tokens."""
        return range(self.tiles.bounds[rank], self.tiles.bounds[rank + 1])


@dataclass(frozen=True, eq=False)
class SequenceParallel:
    """What one rank does with the tokens of a sample.

    Attributes:
        group: the sequence axis; None for one rank, which still pads where ``multiple`` asks for it.
        method: how attention sees all tokens.
        multiple: padded runs are a multiple of this.
        join: runs begin after a multiple of this many tiles, which attention looks at together.
    """

    group: dist.ProcessGroup | None
    method: Method
    multiple: int = 1
    join: int = 1
    _shards: dict[TileLayout, TokenShards] = field(default_factory=dict)

    @property
    def num_ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    def shards(self, layout: TileLayout) -> TokenShards:
        if layout not in self._shards:
            self._shards[layout] = TokenShards.of(layout, self.num_ranks, self.multiple, self.join)
        return self._shards[layout]

    def shard(self, x: Tensor, layout: TileLayout, dim: int = 1) -> Tensor:
        """This rank's run of tokens, padded; the gradient of ``x`` is whole on every rank."""
        padded = self.shards(layout).pad(x, dim)
        return padded if self.group is None else collectives.shard(padded, dim, self.group)

    def gather(self, x: Tensor, layout: TileLayout, dim: int = 1) -> Tensor:
        """All tokens of all ranks, replicated."""
        whole = x if self.group is None else collectives.gather(x, dim, self.group)
        return self.shards(layout).unpad(whole, dim)

    def placement(self, core: AttentionCore) -> Placement:
        """Attention of a rank's tokens among all tokens, computed by ``core``."""
        if self.group is None:
            return PaddedAttention(self, core)
        return UlyssesAttention(self, core) if self.method == "ulysses" else GatheredAttention(self, core)


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
