"""Sequence parallelism: the ranks of an axis share the tokens of a sample.

Tokens are in tile order, and each rank holds a contiguous run of whole tiles. All operations except attention are
token-wise and need no communication. Attention has two ways to reach all tokens:

- *Ulysses*: an all-to-all turns "some tokens, all heads" into "all tokens, some heads", and a second one turns the
  result back. Its traffic per rank falls with the number of ranks, which must divide the number of heads.
- *all-gather*: each rank has its own queries and gathers all keys and values. It moves more bytes, and works with any
  number of ranks.

Runs differ in length, because each boundary is at the tile nearest to an even split and tiles at the edge are smaller.
Collectives need slices of equal size, so runs are padded with zeros to the longest run. Attention removes the padding
first and adds it back afterwards. So it needs no mask, and a token's result does not depend on the number of ranks.
Rows of padding pass through norms and linear layers and are dropped at the end.

Sparse attention also has a coarse output with one row per tile. It is sent together with the fine output, in the same
message, to the rank that holds the gate, and has 1/64 of the fine output's size. The gate is as large as the queries
and is not sent.

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
    """Returns the method `asked` for. For `auto` this is Ulysses if sequence × tensor ranks divide the heads, and
    all-gather otherwise."""
    if asked != "auto":
        return asked
    return "all_gather" if num_heads % (sequence * tensor) else "ulysses"


def tile_bounds(layout: TileLayout, num_ranks: int, join: int = 1) -> list[int]:
    """Returns the index of the first tile of each rank's run, followed by the number of tiles.

    Rank i begins at the tile nearest to an even split of the tokens, among the tiles whose index is a multiple of
    `join`. Raises ValueError if there are fewer groups of `join` tiles than ranks.
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
    """Returns a phrase for errors: the number of tiles, or of groups of `join` tiles, that can be distributed."""
    return f"{num_tiles} tiles" if join == 1 else f"{-(-num_tiles // join)} groups of {join} tiles"


def token_bounds(layout: TileLayout, num_ranks: int, join: int = 1) -> list[int]:
    """Returns the index of the first token of each rank's run, followed by the number of tokens. Raises ValueError like
    `tile_bounds`."""
    starts = [*layout.start.tolist(), layout.num_tokens]
    return [starts[tile] for tile in tile_bounds(layout, num_ranks, join)]


@dataclass(frozen=True)
class Runs:
    """Cut of a sequence of rows into one contiguous run per rank.

    The length of padded runs is a multiple of `multiple`, so that tensor ranks can cut them further.
    """

    bounds: tuple[int, ...]
    multiple: int = 1

    @property
    def lengths(self) -> list[int]:
        """Number of rows of each rank, without padding."""
        return [end - start for start, end in zip(self.bounds[:-1], self.bounds[1:], strict=True)]

    @property
    def padded_length(self) -> int:
        """Number of rows that every rank holds, padding included."""
        return -(-max(self.lengths) // self.multiple) * self.multiple

    @property
    def is_padded(self) -> bool:
        return any(length < self.padded_length for length in self.lengths)

    def pad(self, x: Tensor, dim: int) -> Tensor:
        """Returns all runs one after the other, each padded with zeros."""
        if not self.is_padded:
            return x
        return torch.cat([self.pad_run(run, dim) for run in x.split(self.lengths, dim=dim)], dim=dim)

    def unpad(self, x: Tensor, dim: int) -> Tensor:
        """Removes the padding: the inverse of `pad`."""
        if not self.is_padded:
            return x
        runs = zip(x.split(self.padded_length, dim=dim), self.lengths, strict=True)
        return torch.cat([run.narrow(dim, 0, length) for run, length in runs], dim=dim)

    def pad_run(self, run: Tensor, dim: int) -> Tensor:
        """Pads one rank's rows with zeros."""
        missing = self.padded_length - run.shape[dim]
        return run if not missing else F.pad(run, (0, 0) * (run.ndim - 1 - dim % run.ndim) + (0, missing))


@dataclass(frozen=True)
class TokenShards(Runs):
    """Cut of the tokens of one grid into runs for the sequence ranks. Each run of tokens is a run of whole `tiles`."""

    tiles: Runs = field(kw_only=True)

    @classmethod
    def of(cls, layout: TileLayout, num_ranks: int, multiple: int = 1, join: int = 1) -> TokenShards:
        """Cuts the tokens of `layout`. Padded runs have a multiple of `multiple` tokens and begin after a multiple of
        `join` tiles."""
        tiles = Runs(tuple(tile_bounds(layout, num_ranks, join)))
        return cls(tuple(token_bounds(layout, num_ranks, join)), multiple, tiles=tiles)

    def tile_run(self, rank: int) -> range:
        """Returns the tiles of a rank's tokens."""
        return range(self.tiles.bounds[rank], self.tiles.bounds[rank + 1])


@dataclass(frozen=True, eq=False)
class SequenceParallel:
    """Distribution of a sample's tokens over the sequence ranks, as one rank uses it.

    Attributes:
        group: process group of the sequence ranks; None for one rank, which pads to `multiple` as well.
        method: the way in which attention reaches all tokens.
        multiple: divisor of the length of padded runs.
        join: number of tiles that must be on one rank, because attention reads them with one list.
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
        """Returns this rank's run of tokens, padded. The gradient of `x` is complete on every rank."""
        padded = self.shards(layout).pad(x, dim)
        return padded if self.group is None else collectives.shard(padded, dim, self.group)

    def gather(self, x: Tensor, layout: TileLayout, dim: int = 1) -> Tensor:
        """Returns the tokens of all ranks, replicated."""
        whole = x if self.group is None else collectives.gather(x, dim, self.group)
        return self.shards(layout).unpad(whole, dim)
