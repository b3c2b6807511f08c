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
through norms and linear layers, and are dropped at the end; no result ever reads them.

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

from titan_distill.parallelisms import collectives

Method = Literal["ulysses", "all_gather"]


def choose_method(
    num_heads: int, sequence: int, tensor: int, asked: Literal["auto", "ulysses", "all_gather"] = "auto"
) -> Method:
    """The method that was asked for; for `auto`, Ulysses where sequence × tensor ranks divide the heads."""
    if asked != "auto":
        return asked
    return "all_gather" if num_heads % (sequence * tensor) else "ulysses"


def tile_bounds(layout: TileLayout, num_ranks: int, join: int = 1) -> list[int]:
    """The tile with which each rank's run begins, and at the end the number of tiles.

    The bound before rank i is the tile start nearest to an even split of the tokens, among those with a multiple of
    `join` tiles before them. Raises ValueError when there are fewer runs of `join` tiles than ranks.
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
    """A phrase for errors: the tiles, or groups of tiles, that runs are made of."""
    return f"{num_tiles} tiles" if join == 1 else f"{-(-num_tiles // join)} groups of {join} tiles"


def token_bounds(layout: TileLayout, num_ranks: int, join: int = 1) -> list[int]:
    """The first token of each rank's run of whole tiles, and at the end the number of tokens. Raises as
    `tile_bounds`."""
    starts = [*layout.start.tolist(), layout.num_tokens]
    return [starts[tile] for tile in tile_bounds(layout, num_ranks, join)]


@dataclass(frozen=True)
class Runs:
    """Rows that lie one after the other, cut into a run for each rank.

    `multiple`: padded runs are a multiple of this, for what cuts them further.
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
        """The inverse of `pad`."""
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
    """The tokens of one grid spread over sequence ranks: runs of tokens, which are runs of whole `tiles`."""

    tiles: Runs = field(kw_only=True)

    @classmethod
    def of(cls, layout: TileLayout, num_ranks: int, multiple: int = 1, join: int = 1) -> TokenShards:
        """Runs of `multiple` tokens when padded, which begin after a multiple of `join` tiles."""
        tiles = Runs(tuple(tile_bounds(layout, num_ranks, join)))
        return cls(tuple(token_bounds(layout, num_ranks, join)), multiple, tiles=tiles)

    def tile_run(self, rank: int) -> range:
        """The tiles of a rank's tokens."""
        return range(self.tiles.bounds[rank], self.tiles.bounds[rank + 1])


@dataclass(frozen=True, eq=False)
class SequenceParallel:
    """The sharing of a sample's tokens among sequence ranks, seen from one rank.

    Attributes:
        group: the sequence axis; None for one rank, which still pads where `multiple` asks for it.
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
        """This rank's run of tokens, padded; the gradient of `x` is whole on every rank."""
        padded = self.shards(layout).pad(x, dim)
        return padded if self.group is None else collectives.shard(padded, dim, self.group)

    def gather(self, x: Tensor, layout: TileLayout, dim: int = 1) -> Tensor:
        """All tokens of all ranks, replicated."""
        whole = x if self.group is None else collectives.gather(x, dim, self.group)
        return self.shards(layout).unpad(whole, dim)
