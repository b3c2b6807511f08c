"""Videos made segment by segment: the stream of a causal Wan role.

The context is the `Memory` of `attention.causal`: keys and values of every layer, this rank's heads of all tokens where
ranks share them. A finished segment costs one more forward, at the noise level where it is to be read, that keeps them.

Work is counted by what is executed: a segment's tokens through all linear layers, its attention over the tokens in
memory and its own. Text keys and values are counted each time, though most forwards find them kept (1 % at 1.3B).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from titan_distill.attention.causal import KeysAndValues, Memory, Segmentation
from titan_distill.models.streaming import SegmentStream

Forward = Callable[[Tensor, Tensor, Memory, list[KeysAndValues] | None], Tensor]
"""Velocity of a segment [B, C, f, H, W] at noise levels [B], given a memory; appends keys and values to a list."""


class WanStream(SegmentStream):
    """Segments are latents [B, C, f, H, W]."""

    def __init__(self, forward: Forward, segmentation: Segmentation, num_layers: int) -> None:
        self.forward, self.memory = forward, Memory.empty(segmentation, num_layers)

    def predict_velocity(self, x: Tensor, sigma_B: Tensor) -> Tensor:
        return self.forward(x, sigma_B, self.memory, None)

    def _write(self, x: Tensor, sigma_B: Tensor) -> None:
        kept: list[KeysAndValues] = []
        self.forward(x, sigma_B, self.memory, kept)
        self.memory = self.memory.extended(kept, x.shape[2])
