"""Block-causal attention: a segment of the sequence attends to itself and to the segments before it, never to later
ones.

A video can therefore be generated segment by segment. The keys and values of a finished segment do not depend on later
segments. They are computed once and cached, so the forward of the next segment has only that segment's tokens as input.
Within a segment attention is bidirectional, as in the model that training starts from.

The tokens of a causal model are ordered frame by frame (its tiles are one frame long), so every segment is one
contiguous run of tokens. A segment attends to at most two runs: the *attention sink*, which is the first tokens of the
sequence, and a *window* that ends with the segment itself. So no mask is needed. A forward over the whole sequence
computes one dense attention per segment, with half the FLOPs of a masked attention and with the same fused kernels.

The KV cache is immutable: a forward takes the keys and values of the cached positions and, if it is to write, returns
its own. A block with activation checkpointing therefore recomputes the same values in the backward, even if the cache
has grown in between.

Shape suffixes: B batch, L query tokens, S key tokens, T text tokens, H heads (this rank's), D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titan_distill.attention.dense import AttentionCall, dense_attention

KeysAndValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Segmentation:
    """Segments of a sequence, and the earlier positions that each one attends to. Units are positions (latent frames).

    Attributes:
        length: positions per segment.
        single_first: whether the first segment is one position long.
        window: largest number of positions in the KV cache, the attention sink included; 0 caches all.
        sink: length of the attention sink: the first positions of the sequence, never evicted from the KV cache.
    """

    length: int = 3
    single_first: bool = False
    window: int = 0
    sink: int = 0

    def lengths(self, num_positions: int) -> tuple[int, ...]:
        """Returns the lengths of the segments of a whole sequence. Raises ValueError if they do not fill it."""
        first = int(self.single_first)
        if num_positions not in self.nearest(num_positions):
            raise ValueError(
                f"a sequence of {num_positions} is not a whole number of segments, "
                f"{'one of 1, then ' * first}of {self.length} each; make it "
                f"{' or '.join(map(str, self.nearest(num_positions)))}"
            )
        return (1,) * first + (self.length,) * ((num_positions - first) // self.length)

    def nearest(self, num_positions: int) -> list[int]:
        """Returns the valid sequence lengths nearest to `num_positions`: the number itself, or the next one below and
        above."""
        first = int(self.single_first)
        count = max(0, num_positions - first) // self.length
        below = first + count * self.length
        return [below] if below == num_positions > 0 else [length for length in (below, below + self.length) if length]

    def describe(self) -> str:
        """Returns a phrase for the banner."""
        first = "1, then of " if self.single_first else ""
        window = f", KV cache of {self.window} with an attention sink of {self.sink}" if self.window else ""
        return f"segments of {first}{self.length}{window}"

    def cached(self, num_before: int) -> tuple[int, int]:
        """Returns which of `num_before` finished positions are cached: the number of sink positions, and the first
        position of the window."""
        if not self.window or num_before <= self.window:
            return 0, 0
        return self.sink, num_before - (self.window - self.sink)

    def num_cached(self, num_before: int) -> int:
        """Returns the number of positions that are cached after `num_before` finished ones."""
        return min(num_before, self.window) if self.window else num_before

    def runs(self, num_positions: int, tokens_per_position: int) -> tuple[Run, ...]:
        """Returns the tokens that each segment of a whole sequence attends to."""
        runs, start = [], 0
        for length in self.lengths(num_positions):
            sink, first = self.cached(start)
            run = (start, start + length, sink, first)
            runs.append(Run(*(tokens_per_position * position for position in run)))
            start += length
        return tuple(runs)

    def num_keys(self, num_positions: int) -> float:
        """Returns the mean number of positions that one position attends to in a forward over the whole sequence."""
        read, start = 0, 0
        for length in self.lengths(num_positions):
            read += length * (self.num_cached(start) + length)
            start += length
        return read / num_positions


@dataclass(frozen=True)
class Run:
    """One segment: its tokens `start` to `stop` attend to tokens 0 to `sink` and `first` to `stop` (ends exclusive)."""

    start: int
    stop: int
    sink: int
    first: int

    def keys(self, x_BSHD: Tensor) -> Tensor:
        recent = x_BSHD[:, self.first : self.stop]
        return torch.cat((x_BSHD[:, : self.sink], recent), dim=1) if self.sink else recent


@dataclass(frozen=True, eq=False)
class CausalAttention:
    """Attention core of one layer for one forward, over all segments at once or over the segment that follows the KV
    cache.

    Attributes:
        runs: tokens that each segment attends to; empty for a single segment, which attends to the cache and itself.
        cached: keys and values of the cached positions, in order.
        written: receives the keys and values of this forward, by position; None writes nothing.
    """

    runs: tuple[Run, ...] = ()
    cached: tuple[KeysAndValues, ...] = ()
    written: list[tuple[KeysAndValues, ...]] | None = None

    def mix(self, call: AttentionCall) -> tuple[Tensor, None]:
        """Returns the output [B, L, H, D] of all tokens of the layout; see `AttentionCore`."""
        assert call.num_selected is None and call.queries is None, "causal attention is dense, and ranks see all tokens"
        q_BLHD, k_BSHD, v_BSHD = call.q_BLHD, call.k_BSHD, call.v_BSHD
        if self.written is not None:
            self.written.append(by_position(k_BSHD, v_BSHD, call.layout.grid[0]))
        if self.runs:
            segments = [
                dense_attention(q_BLHD[:, run.start : run.stop], run.keys(k_BSHD), run.keys(v_BSHD))
                for run in self.runs
            ]
            return torch.cat(segments, dim=1), None
        if self.cached:
            k_BSHD = torch.cat([*(k for k, _ in self.cached), k_BSHD], dim=1)
            v_BSHD = torch.cat([*(v for _, v in self.cached), v_BSHD], dim=1)
        return dense_attention(q_BLHD, k_BSHD, v_BSHD), None


def by_position(k_BSHD: Tensor, v_BSHD: Tensor, num_positions: int) -> tuple[KeysAndValues, ...]:
    """Returns copies of the keys and values of each position. A view would keep the memory of all positions
    allocated."""
    keys, values = (x.unflatten(1, (num_positions, -1)).unbind(1) for x in (k_BSHD, v_BSHD))
    return tuple((k.clone(), v.clone()) for k, v in zip(keys, values, strict=True))


@dataclass(eq=False)
class TextCache:
    """Keys and values [B, T, H, D] of the text in one layer, which are the same for every segment.

    Only forwards without gradient use them. A forward with gradient computes them again, so that their weights are
    trained.
    """

    keys_and_values: KeysAndValues | None = None


@dataclass(frozen=True, eq=False)
class KVCache:
    """KV cache of sequences that are generated segment by segment.

    Each position has separate tensors. Forwards that wait for their backward hold caches of different lengths, and
    these caches share the tensors of their common positions.

    Attributes:
        segmentation: segments of the sequences; its window and attention sink determine the cached positions.
        num_positions: number of finished positions; the next segment begins at this index.
        layers: each layer's keys and values [B, S, H, D] of the cached positions, in order.
        texts: each layer's cache of the text; the first forward without gradient fills it.
        written: receives each layer's keys and values of the next forward, by position; None writes nothing.
    """

    segmentation: Segmentation
    num_positions: int
    layers: tuple[tuple[KeysAndValues, ...], ...]
    texts: tuple[TextCache, ...]
    written: list[tuple[KeysAndValues, ...]] | None = None

    @classmethod
    def empty(cls, segmentation: Segmentation, num_layers: int) -> KVCache:
        return cls(segmentation, 0, ((),) * num_layers, tuple(TextCache() for _ in range(num_layers)))

    @property
    def num_cached(self) -> int:
        """Number of cached positions."""
        return len(self.layers[0])

    def cores(self) -> list[CausalAttention]:
        """Returns one attention core per layer, for a forward of the next segment."""
        return [CausalAttention(cached=cached, written=self.written) for cached in self.layers]

    def writable(self) -> KVCache:
        """Returns the same cache for one forward that writes its keys and values; `extended` then adds them."""
        return replace(self, written=[])

    def extended(self) -> KVCache:
        """Returns the cache with the segment that the last forward wrote, and without the positions that the window
        evicts."""
        assert self.written and len(self.written) == len(self.layers), "one entry per layer"
        total = self.num_positions + len(self.written[0])
        sink, first = self.segmentation.cached(total)
        layers = []
        for cached, written in zip(self.layers, self.written, strict=True):
            found = (*cached, *written)
            layers.append((*found[:sink], *found[len(found) - (total - first) :]))
        return replace(self, num_positions=total, layers=tuple(layers), written=None)

    @property
    def num_bytes(self) -> int:
        """Returns the bytes of all cached tensors."""
        texts = [text.keys_and_values for text in self.texts if text.keys_and_values is not None]
        pairs = [pair for cached in self.layers for pair in cached]
        return sum(tensor.untyped_storage().nbytes() for pair in (*pairs, *texts) for tensor in pair)
