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

Shape suffixes: B batch, L all tokens, R a rank's tokens with padding, H heads, D head dim, P ranks.
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
from titan_distill.parallelisms import collectives

Method = Literal["ulysses", "all_gather"]


def choose_method(
    num_heads: int, sequence: int, tensor: int, asked: Literal["auto", "ulysses", "all_gather"] = "auto"
) -> Method:
    """What was asked for; for ``auto``, Ulysses where it can be had: where sequence × tensor ranks divide the heads."""
    if asked != "auto":
        return asked
    return "all_gather" if num_heads % (sequence * tensor) else "ulysses"


def token_bounds(layout: TileLayout, num_ranks: int) -> list[int]:
    """Where each rank's run of whole tiles begins, and at the end the number of tokens.

    The bound before rank i is the tile start nearest to an even split. Raises ValueError when there are fewer tiles
    than ranks.
    """
    starts = [*layout.start.tolist(), layout.num_tokens]
    if layout.num_tiles < num_ranks:
        raise ValueError(
            f"{layout.num_tiles} tiles of tokens can't be shared by {num_ranks} sequence ranks; lower "
            f"parallelism.sequence to {layout.num_tiles} or less"
        )
    bounds = [0]
    for rank in range(1, num_ranks):
        even = rank * layout.num_tokens / num_ranks
        # Every rank gets a tile, those still to come too.
        allowed = [s for s in starts[rank : len(starts) - (num_ranks - rank)] if s > bounds[-1]]
        bounds.append(min(allowed, key=lambda start: abs(start - even)))
    return [*bounds, layout.num_tokens]


@dataclass(frozen=True)
class TokenShards:
    """How the tokens of one grid are spread over ``num_ranks`` sequence ranks.

    ``multiple``: padded runs are a multiple of this, for what cuts them further.
    """

    bounds: tuple[int, ...]
    multiple: int = 1

    @classmethod
    def of(cls, layout: TileLayout, num_ranks: int, multiple: int = 1) -> TokenShards:
        return cls(tuple(token_bounds(layout, num_ranks)), multiple)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each rank, without padding."""
        return [end - start for start, end in zip(self.bounds[:-1], self.bounds[1:], strict=True)]

    @property
    def padded_length(self) -> int:
        """Tokens that every rank holds."""
        return -(-max(self.lengths) // self.multiple) * self.multiple

    @property
    def is_padded(self) -> bool:
        return any(length < self.padded_length for length in self.lengths)

    def pad(self, x: Tensor, dim: int) -> Tensor:
        """All runs one after the other, each padded with zeros."""
        if not self.is_padded:
            return x
        return torch.cat([self._padded(run, dim) for run in x.split(self.lengths, dim=dim)], dim=dim)

    def unpad(self, x: Tensor, dim: int) -> Tensor:
        """The inverse of ``pad``."""
        if not self.is_padded:
            return x
        runs = zip(x.split(self.padded_length, dim=dim), self.lengths, strict=True)
        return torch.cat([run.narrow(dim, 0, length) for run, length in runs], dim=dim)

    def _padded(self, run: Tensor, dim: int) -> Tensor:
        missing = self.padded_length - run.shape[dim]
        return F.pad(run, (0, 0) * (run.ndim - 1 - dim % run.ndim) + (0, missing))


@dataclass(frozen=True, eq=False)
class SequenceParallel:
    """What one rank does with the tokens of a sample.

    Attributes:
        group: the sequence axis; None for one rank, which still pads where ``multiple`` asks for it.
        method: how attention sees all tokens.
        multiple: padded runs are a multiple of this.
    """

    group: dist.ProcessGroup | None
    method: Method
    multiple: int = 1
    _shards: dict[TileLayout, TokenShards] = field(default_factory=dict)

    @property
    def num_ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    def shards(self, layout: TileLayout) -> TokenShards:
        if layout not in self._shards:
            self._shards[layout] = TokenShards.of(layout, self.num_ranks, self.multiple)
        return self._shards[layout]

    def shard(self, x: Tensor, layout: TileLayout, dim: int = 1) -> Tensor:
        """This rank's run of tokens, padded; the gradient of ``x`` is whole on every rank."""
        padded = self.shards(layout).pad(x, dim)
        return padded if self.group is None else collectives.shard(padded, dim, self.group)

    def gather(self, x: Tensor, layout: TileLayout, dim: int = 1) -> Tensor:
        """All tokens of all ranks, replicated."""
        whole = x if self.group is None else collectives.gather(x, dim, self.group)
        return self.shards(layout).unpad(whole, dim)

    def attention(self, core: AttentionCore) -> AttentionCore:
        """Attention of a rank's tokens among all tokens, computed by ``core``."""
        if self.group is None:
            return PaddedAttention(self, core)
        return UlyssesAttention(self, core) if self.method == "ulysses" else GatheredAttention(self, core)


@dataclass(frozen=True, eq=False)
class PaddedAttention:
    """One rank has all tokens, and padding."""

    parallel: SequenceParallel
    core: AttentionCore

    def __call__(self, q_BRHD: Tensor, k_BRHD: Tensor, v_BRHD: Tensor, layout: TileLayout | None) -> Tensor:
        assert layout is not None
        shards = self.parallel.shards(layout)
        q_BLHD, k_BLHD, v_BLHD = (shards.unpad(x, 1) for x in (q_BRHD, k_BRHD, v_BRHD))
        return shards.pad(self.core(q_BLHD, k_BLHD, v_BLHD, layout), 1)


@dataclass(frozen=True, eq=False)
class UlyssesAttention:
    """All tokens and some heads: Ulysses (Jacobs et al., 2309.14509)."""

    parallel: SequenceParallel
    core: AttentionCore

    def __call__(self, q_BRHD: Tensor, k_BRHD: Tensor, v_BRHD: Tensor, layout: TileLayout | None) -> Tensor:
        group = self.parallel.group
        assert layout is not None and group is not None
        shards = self.parallel.shards(layout)
        # One message for all three.
        qkv_3BRHD = torch.stack((q_BRHD, k_BRHD, v_BRHD))
        by_head_P3BRhD = qkv_3BRHD.unflatten(3, (group.size(), -1)).movedim(3, 0)
        by_token_P3BRhD = collectives.all_to_all(by_head_P3BRhD, group)
        qkv_3BLhD = shards.unpad(by_token_P3BRhD.movedim(0, 2).flatten(2, 3), 2)
        q_BLhD, k_BLhD, v_BLhD = qkv_3BLhD.unbind(0)
        mixed_BLhD = self.core(q_BLhD, k_BLhD, v_BLhD, layout)
        by_token_PBRhD = shards.pad(mixed_BLhD, 1).unflatten(1, (group.size(), -1)).movedim(1, 0)
        by_head_PBRhD = collectives.all_to_all(by_token_PBRhD, group)
        return by_head_PBRhD.movedim(0, 2).flatten(2, 3)


@dataclass(frozen=True, eq=False)
class GatheredAttention:
    """Own queries, all keys and values; for cores that do not need to know where the queries lie."""

    parallel: SequenceParallel
    core: AttentionCore

    def __call__(self, q_BRHD: Tensor, k_BRHD: Tensor, v_BRHD: Tensor, layout: TileLayout | None) -> Tensor:
        group = self.parallel.group
        assert layout is not None and group is not None
        gathered_2BLHD = collectives.gather_for_parts(torch.stack((k_BRHD, v_BRHD)), 2, group)
        k_BLHD, v_BLHD = self.parallel.shards(layout).unpad(gathered_2BLHD, 2).unbind(0)
        return self.core(q_BRHD, k_BLHD, v_BLHD, layout)
