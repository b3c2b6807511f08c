"""The oracle of training through a stream: one forward over all segments in which only the last may be learned
from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titan_distill.attention.causal import CausalAttention


class DetachedPast(CausalAttention):
    """In place of the core of a whole causal forward: no gradient reaches, or comes from, all but the last segment."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, layout: Any, *rest: Any) -> tuple[Tensor, None]:
        own = self.runs[-1].start
        k, v = (torch.cat((x[:, :own].detach(), x[:, own:]), dim=1) for x in (k, v))
        mixed, _ = super().mix(q, k, v, layout, *rest)
        return torch.cat((mixed[:, :own].detach(), mixed[:, own:]), dim=1), None
