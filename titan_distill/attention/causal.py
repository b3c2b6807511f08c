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
from dataclasses import dataclass, field

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
        prefix: keys and values of the segments in memory.
        kept: receives this forward's own keys and values; None where they are not to be remembered.
    """

    runs: tuple[Run, ...] = ()
    prefix: KeysAndValues | None = None
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
        if self.prefix is not None:
            k_BSHD, v_BSHD = (torch.cat(pair, dim=1) for pair in zip(self.prefix, (k_BSHD, v_BSHD), strict=True))
        return dense_attention(q_BLHD, k_BSHD, v_BSHD), None


@dataclass(eq=False)
class TextMemory:
    """One layer's keys and values [B, T, H, D] of the text, which are the same for every segment.

    They serve only forwards without gradient: through one that has a gradient they must be computed, or the weights
    that make them would never learn.
    """

    keys_and_values: KeysAndValues | None = None


@dataclass(frozen=True, eq=False)
class Memory:
    """What a stream of segments has remembered: per layer keys and values [B, S, H, D] of video, and of text.

    Attributes:
        segmentation: of the sequence.
        num_positions: finished so far; the next segment begins at this position.
        layers: of the positions that are in memory; empty at the start.
        texts: filled by the first forward without gradient.
    """

    segmentation: Segmentation
    num_layers: int
    num_positions: int = 0
    layers: tuple[KeysAndValues, ...] = ()
    texts: tuple[TextMemory, ...] = field(default=())

    @classmethod
    def empty(cls, segmentation: Segmentation, num_layers: int) -> Memory:
        return cls(segmentation, num_layers, texts=tuple(TextMemory() for _ in range(num_layers)))

    @property
    def num_remembered(self) -> int:
        """Positions whose keys and values are here."""
        return self.segmentation.num_remembered(self.num_positions)

    def cores(self, kept: list[KeysAndValues] | None = None) -> Iterator[CausalAttention]:
        """One a layer, for a forward of the next segment; its keys and values are appended to ``kept``."""
        for index in range(self.num_layers):
            yield CausalAttention(prefix=self.layers[index] if self.layers else None, kept=kept)

    def extended(self, kept: list[KeysAndValues], num_positions: int) -> Memory:
        """With a finished segment of ``num_positions``, and without what the window no longer holds."""
        assert len(kept) == self.num_layers, "one entry a layer"
        total = self.num_positions + num_positions
        tokens = kept[0][0].shape[1] // num_positions
        before, after = self.num_remembered, self.segmentation.num_remembered(total)
        sink = min(self.segmentation.sink, after) if before + num_positions > after else 0

        def extend(old: Tensor | None, new: Tensor) -> Tensor:
            parts = [new] if old is None else [old, new]
            if before + num_positions > after:
                joined = torch.cat(parts, dim=1)
                recent = joined[:, joined.shape[1] - (after - sink) * tokens :]
                parts = [joined[:, : sink * tokens], recent]
            # Always a copy: a view would keep alive all that it is cut from.
            return torch.cat(parts, dim=1)

        layers = tuple(
            (extend(old_k, new_k), extend(old_v, new_v))
            for (old_k, old_v), (new_k, new_v) in zip(
                self.layers or [(None, None)] * self.num_layers, kept, strict=True
            )
        )
        return Memory(self.segmentation, self.num_layers, total, layers, self.texts)

    @property
    def num_bytes(self) -> int:
        """Of everything remembered, as it is stored."""
        texts = [text.keys_and_values for text in self.texts if text.keys_and_values is not None]
        tensors = [tensor for pair in (*self.layers, *texts) for tensor in pair]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
