"""Block-causal attention: a segment of the sequence reads itself and the segments before it, never those behind.

That is what lets a video be made piece by piece. A finished segment's keys and values don't depend on what follows, so
they are computed once and kept; each further segment is a forward over its own tokens only. Within a segment attention
goes both ways, as the bidirectional model that it starts from has it.

Tokens of a causal model lie frame after frame (tiles of one frame), so that every segment is one run of tokens whatever
its length, and what it reads is at most two runs: the *sink*, the very first tokens, and a *window* that ends with
the segment itself. No mask is needed. A forward over the whole sequence is one dense attention a segment, with half the
work that a masked one would do, and runs on the same fused kernels everywhere.

The memory of a layer is a value, never a buffer that is written in place: a forward gets the keys and values of its
prefix, and one that shall be remembered hands out its own. What a checkpointed block recomputes in the backward is
then what it computed in the forward, whatever was remembered in between.

Shape suffixes: B batch, L query tokens, S key tokens, T text tokens, H heads (this rank's), D head dim, N query tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from titan_kernels import TileLayout
from torch import Tensor

from titan_distill.attention.dense import dense_attention

KeysAndValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Segmentation:
    """How a sequence is cut into segments, and how far back each one looks. Units are positions: frames of latents.

    Attributes:
        length: positions of a segment.
        single_first: the first segment is one position long.
        window: positions that the memory holds at most, the sink included; 0 holds all.
        sink: of these, the first ones of the sequence, which are never forgotten.
    """

    length: int = 3
    single_first: bool = False
    window: int = 0
    sink: int = 0

    def lengths(self, num_positions: int) -> tuple[int, ...]:
        """The segments of a whole sequence. Raises ValueError where they don't fill it."""
        first = int(self.single_first)
        if num_positions not in self.nearest(num_positions):
            raise ValueError(
                f"a sequence of {num_positions} is no whole number of segments, "
                f"{'one of 1, then ' * first}of {self.length} each; make it {self.describe_nearest(num_positions)}"
            )
        return (1,) * first + (self.length,) * ((num_positions - first) // self.length)

    def nearest(self, num_positions: int) -> list[int]:
        """The lengths of whole sequences next to ``num_positions``: itself, or one below and one above."""
        first = int(self.single_first)
        count = max(0, num_positions - first) // self.length
        below = first + count * self.length
        return [below] if below == num_positions > 0 else [length for length in (below, below + self.length) if length]

    def describe(self) -> str:
        """How, for people."""
        first = "1, then of " if self.single_first else ""
        window = f", memory of {self.window} with the first {self.sink}" if self.window else ""
        return f"segments of {first}{self.length}{window}"

    def describe_nearest(self, num_positions: int) -> str:
        return " or ".join(map(str, self.nearest(num_positions)))

    def remembered(self, num_before: int) -> tuple[int, int]:
        """Of ``num_before`` finished positions: how many of the first, and from which on, are still in memory."""
        if not self.window or num_before <= self.window:
            return 0, 0
        return self.sink, num_before - (self.window - self.sink)

    def num_remembered(self, num_before: int) -> int:
        """How many of ``num_before`` finished positions are in memory."""
        return min(num_before, self.window) if self.window else num_before

    def runs(self, num_positions: int, tokens_per_position: int) -> tuple[Run, ...]:
        """What the segments of a whole sequence read, in tokens."""
        runs, start = [], 0
        for length in self.lengths(num_positions):
            sink, first = self.remembered(start)
            run = (start, start + length, sink, first)
            runs.append(Run(*(tokens_per_position * position for position in run)))
            start += length
        return tuple(runs)

    def num_keys(self, num_positions: int) -> float:
        """Positions that one position reads in a forward over the whole sequence, on average."""
        read, start = 0, 0
        for length in self.lengths(num_positions):
            read += length * (self.num_remembered(start) + length)
            start += length
        return read / num_positions


@dataclass(frozen=True)
class Run:
    """Tokens ``start`` to ``stop`` read tokens 0 to ``sink`` and ``first`` to ``stop``."""

    start: int
    stop: int
    sink: int
    first: int

    def keys(self, x_BSHD: Tensor) -> Tensor:
        recent = x_BSHD[:, self.first : self.stop]
        return torch.cat((x_BSHD[:, : self.sink], recent), dim=1) if self.sink else recent


@dataclass(frozen=True, eq=False)
class CausalAttention:
    """The attention core of one layer for one forward, over all segments at once or over one behind a prefix.

    Attributes:
        runs: what each segment reads; empty for one segment, which reads the prefix and itself.
        prefix: keys and values in memory, in pieces.
        kept: receives this forward's own keys and values; None where they are not to be remembered.
    """

    runs: tuple[Run, ...] = ()
    prefix: tuple[KeysAndValues, ...] = ()
    kept: list[KeysAndValues] | None = None

    def mix(
        self,
        q_BLHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        layout: TileLayout,
        num_selected: int | None,
        queries: range | None = None,
    ) -> tuple[Tensor, None]:
        """The output [B, L, H, D] of all tokens of the layout; see `AttentionCore`."""
        assert num_selected is None and queries is None, "a causal role is dense, and its ranks see all tokens"
        if self.kept is not None:
            self.kept.append((k_BSHD, v_BSHD))
        if self.runs:
            segments = [
                dense_attention(q_BLHD[:, run.start : run.stop], run.keys(k_BSHD), run.keys(v_BSHD))
                for run in self.runs
            ]
            return torch.cat(segments, dim=1), None
        if self.prefix:
            k_BSHD = torch.cat([*(k for k, _ in self.prefix), k_BSHD], dim=1)
            v_BSHD = torch.cat([*(v for _, v in self.prefix), v_BSHD], dim=1)
        return dense_attention(q_BLHD, k_BSHD, v_BSHD), None


@dataclass(eq=False)
class TextMemory:
    """One layer's keys and values [B, T, H, D] of the text, which are the same for every segment.

    They serve only forwards without gradient: through one that has a gradient they must be computed, or the weights
    that make them would never learn.
    """

    keys_and_values: KeysAndValues | None = None


@dataclass(frozen=True, eq=False)
class Piece:
    """Neighbouring positions in memory: each layer's keys and values [B, S, H, D]."""

    num_positions: int
    layers: tuple[KeysAndValues, ...]

    def part(self, start: int, stop: int) -> Piece:
        """The positions from ``start`` to ``stop`` of these, copied: a view would keep all of them alive."""
        if (start, stop) == (0, self.num_positions):
            return self
        tokens = self.layers[0][0].shape[1] // self.num_positions
        cut = slice(start * tokens, stop * tokens)
        return Piece(stop - start, tuple((k[:, cut].clone(), v[:, cut].clone()) for k, v in self.layers))


@dataclass(frozen=True, eq=False)
class Memory:
    """What a stream of segments has remembered.

    Each segment stays a tensor of its own. Forwards whose backward is still to come hold memories of different length,
    and these share their pieces.

    Attributes:
        segmentation: of the sequence.
        num_positions: finished so far; the next segment begins at this position.
        pieces: what is in memory, in order.
        texts: one a layer, filled by the first forward without gradient.
    """

    segmentation: Segmentation
    num_positions: int
    pieces: tuple[Piece, ...]
    texts: tuple[TextMemory, ...]

    @classmethod
    def empty(cls, segmentation: Segmentation, num_layers: int) -> Memory:
        return cls(segmentation, 0, (), tuple(TextMemory() for _ in range(num_layers)))

    @property
    def num_remembered(self) -> int:
        """Positions whose keys and values are here."""
        return sum(piece.num_positions for piece in self.pieces)

    def cores(self, kept: list[KeysAndValues] | None = None) -> Iterator[CausalAttention]:
        """One a layer, for a forward of the next segment; its keys and values are appended to ``kept``."""
        for layer in range(len(self.texts)):
            yield CausalAttention(prefix=tuple(piece.layers[layer] for piece in self.pieces), kept=kept)

    def extended(self, kept: list[KeysAndValues], num_positions: int) -> Memory:
        """With a finished segment of ``num_positions``, and without what the window no longer holds."""
        assert len(kept) == len(self.texts), "one entry a layer"
        total = self.num_positions + num_positions
        layers = tuple((_compact(k), _compact(v)) for k, v in kept)
        pieces = (*self.pieces, Piece(num_positions, layers))
        sink, first = self.segmentation.remembered(total)
        return replace(self, num_positions=total, pieces=_forget(pieces, sink, total - first))

    @property
    def num_bytes(self) -> int:
        """Of everything remembered, as it is stored."""
        texts = [text.keys_and_values for text in self.texts if text.keys_and_values is not None]
        pairs = [pair for piece in self.pieces for pair in piece.layers]
        return sum(tensor.untyped_storage().nbytes() for pair in (*pairs, *texts) for tensor in pair)


def _forget(pieces: tuple[Piece, ...], num_first: int, num_last: int) -> tuple[Piece, ...]:
    """The first and the last so many positions of ``pieces``; all of them where that is all."""
    total, start, left = sum(piece.num_positions for piece in pieces), 0, []
    for piece in pieces:
        length = piece.num_positions
        first_stop, last_start = min(length, num_first - start), max(0, total - num_last - start)
        if last_start <= max(0, first_stop):
            left.append(piece)
        else:
            parts = ((0, first_stop), (last_start, length))
            left += [piece.part(begin, end) for begin, end in parts if end > begin]
        start += length
    return tuple(left)


def _compact(x: Tensor) -> Tensor:
    """``x`` without whatever else it is a view of."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
