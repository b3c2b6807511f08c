"""Videos made segment by segment: the stream of a causal Wan role.

The context is the `Memory` of `attention.causal`: keys and values of every layer, this rank's heads of all tokens where
ranks share them. A finished segment costs one more forward, at the noise level where it is to be read, that keeps them.

Work is counted by what is executed: a segment's tokens through all linear layers, its attention over the tokens in
memory and its own. Text keys and values are counted each time, though most forwards find them kept (1 % at 1.3B).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from titan_distill.attention.causal import KeysAndValues, Memory, Segmentation
from titan_distill.models.base import Condition
from titan_distill.models.streaming import SegmentStream
from titan_distill.roles import RoleHandle

if TYPE_CHECKING:
    from titan_distill.models.wan.adapter import WanAdapter


class WanStream(SegmentStream):
    """Segments are latents [B, C, f, H, W]."""

    def __init__(self, adapter: WanAdapter, role: RoleHandle, condition: Condition, segmentation: Segmentation) -> None:
        self.adapter, self.role, self.condition = adapter, role, condition
        self.memory = Memory.empty(segmentation, adapter.network(role).config.num_layers)

    def predict_velocity(self, x: Tensor, sigma_B: Tensor) -> Tensor:
        return self.adapter.forward(self.role, x, sigma_B, self.condition, self.memory)

    def _write(self, x: Tensor, sigma_B: Tensor) -> None:
        kept: list[KeysAndValues] = []
        self.adapter.forward(self.role, x, sigma_B, self.condition, self.memory, kept)
        self.memory = self.memory.extended(kept, x.shape[2])
