"""The segment stream of a causal Wan role.

Its context is the `KVCache` of `attention.causal`, this rank's heads of all tokens where ranks share them. A finished
segment costs one more forward, at the noise level where it is to be read, which writes the cache.

FLOPs are counted as executed: a segment's tokens through all linear layers, its attention over the cached tokens and
its own. Text keys and values are counted each time, though most forwards find them cached (1 % at 1.3B).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from titan_distill.attention.causal import KVCache
from titan_distill.models.streaming import SegmentStream


class WanStream(SegmentStream):
    """Segments are latents [B, C, f, H, W]; `forward` predicts their velocity at noise levels [B], given a cache."""

    def __init__(self, forward: Callable[[Tensor, Tensor, KVCache], Tensor], cache: KVCache) -> None:
        self.forward, self.cache = forward, cache

    def predict_velocity(self, x: Tensor, sigma_B: Tensor) -> Tensor:
        return self.forward(x, sigma_B, self.cache)

    def _write(self, x: Tensor, sigma_B: Tensor) -> None:
        cache = self.cache.writable()
        self.forward(x, sigma_B, cache)
        self.cache = cache.extended()
