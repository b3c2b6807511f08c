"""Block-causal attention: a segment of the sequence reads itself and the segments before it, never later ones.

So a video can be made segment by segment. The keys and values of a finished segment don't depend on later ones: they
are computed once and cached, and each further segment is a forward over its own tokens only. Within a segment attention
goes both ways, as in the bidirectional model that training starts from.

Tokens of a causal model lie frame after frame (tiles of one frame), so that every segment is one run of tokens whatever
its length. It reads at most two runs: the *attention sink*, the very first tokens, and a *window* that ends with the
segment itself. No mask is needed. A forward over the whole sequence is one dense attention per segment, with half the
arithmetic of a masked one, and runs on the same fused kernels everywhere.

The KV cache is a value, never a buffer that is written in place: a forward gets the keys and values of the cached
positions, and one that writes hands out its own. So a checkpointed block recomputes in the backward what it computed in
the forward, whatever was cached in between.

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
    """The segments of a sequence, and how far back each one looks. Units are positions: frames of latents.

    Attributes:
        length: positions per segment.
        single_first: the first segment is one position long.
        window: most positions in the KV cache, the attention sink included; 0 caches all.
        sink: attention sink: the first positions of the sequence, never evicted from the KV cache.
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
                f"a sequence of {num_positions} is not a whole number of segments, "
                f"{'one of 1, then ' * first}of {self.length} each; make it "
                f"{' or '.join(map(str, self.nearest(num_positions)))}"
            )
        return (1,) * first + (self.length,) * ((num_positions - first) // self.length)

    def nearest(self, num_positions: int) -> list[int]:
        """Lengths of whole sequences next to `num_positions`: itself, or one below and one above."""
        first = int(self.single_first)
        count = max(0, num_positions - first) // self.length
        below = first + count * self.length
        return [below] if below == num_positions > 0 else [length for length in (below, below + self.length) if length]

    def describe(self) -> str:
        """One phrase for the banner."""
        first = "1, then of " if self.single_first else ""
        window = f", KV cache of {self.window} with an attention sink of {self.sink}" if self.window else ""
        return f"segments of {first}{self.length}{window}"

    def cached(self, num_before: int) -> tuple[int, int]:
        """The cached ones of `num_before` finished positions: the number of first ones, and the start of the last."""
        if not self.window or num_before <= self.window:
            return 0, 0
        return self.sink, num_before - (self.window - self.sink)

    def num_cached(self, num_before: int) -> int:
        """The number of cached positions after `num_before` finished ones."""
        return min(num_before, self.window) if self.window else num_before

    def runs(self, num_positions: int, tokens_per_position: int) -> tuple[Run, ...]:
        """The tokens that each segment of a whole sequence reads."""
        runs, start = [], 0
        for length in self.lengths(num_positions):
            sink, first = self.cached(start)
            run = (start, start + length, sink, first)
            runs.append(Run(*(tokens_per_position * position for position in run)))
            start += length
        return tuple(runs)

    def num_keys(self, num_positions: int) -> float:
        """Mean number of positions that one position reads in a forward over the whole sequence."""
        read, start = 0, 0
        for length in self.lengths(num_positions):
            read += length * (self.num_cached(start) + length)
            start += length
        return read / num_positions


@dataclass(frozen=True)
class Run:
    """Tokens `start` to `stop` read tokens 0 to `sink` and `first` to `stop`."""

    start: int
    stop: int
    sink: int
    first: int

    def keys(self, x_BSHD: Tensor) -> Tensor:
        recent = x_BSHD[:, self.first : self.stop]
        return torch.cat((x_BSHD[:, : self.sink], recent), dim=1) if self.sink else recent


@dataclass(frozen=True, eq=False)
class CausalAttention:
    """The attention core of one layer for one forward, over all segments at once or over one behind the KV cache.

    Attributes:
        runs: what each segment reads; empty for one segment, which reads the cache and itself.
        cached: keys and values of the cached positions, in order.
        written: receives the keys and values of this forward, by position; None writes nothing.
    """

    runs: tuple[Run, ...] = ()
    cached: tuple[KeysAndValues, ...] = ()
    written: list[tuple[KeysAndValues, ...]] | None = None

    def mix(self, call: AttentionCall) -> tuple[Tensor, None]:
        """The output [B, L, H, D] of all tokens of the layout; see `AttentionCore`."""
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
    """Keys and values of each position, copied: a view would keep those of all other positions alive."""
    keys, values = (x.unflatten(1, (num_positions, -1)).unbind(1) for x in (k_BSHD, v_BSHD))
    return tuple((k.clone(), v.clone()) for k, v in zip(keys, values, strict=True))


@dataclass(eq=False)
class TextCache:
    """One layer's keys and values [B, T, H, D] of the text, which are the same for every segment.

    They serve only forwards without gradient: a forward with gradient computes them, so that their weights learn.
    """

    keys_and_values: KeysAndValues | None = None


@dataclass(frozen=True, eq=False)
class KVCache:
    """The KV cache of sequences that are made segment by segment.

    Each position has tensors of its own: forwards whose backward is still to come hold caches of different length, and
    these share their positions.

    Attributes:
        segmentation: of the sequences; its window and attention sink say which positions stay.
        num_positions: positions finished so far; the next segment begins at this one.
        layers: each layer's keys and values [B, S, H, D] of the cached positions, in order.
        texts: each layer's cache of the text, filled by the first forward without gradient.
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
        """Positions whose keys and values are here."""
        return len(self.layers[0])

    def cores(self) -> list[CausalAttention]:
        """One per layer, for a forward of the next segment."""
        return [CausalAttention(cached=cached, written=self.written) for cached in self.layers]

    def writable(self) -> KVCache:
        """The same cache for one forward that writes its keys and values; `extended` takes them up."""
        return replace(self, written=[])

    def extended(self) -> KVCache:
        """The cache after the forward of a finished segment, without the positions that the window evicts."""
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
        """Bytes of everything cached, as it is stored."""
        texts = [text.keys_and_values for text in self.texts if text.keys_and_values is not None]
        pairs = [pair for cached in self.layers for pair in cached]
        return sum(tensor.untyped_storage().nbytes() for pair in (*pairs, *texts) for tensor in pair)
