"""The oracle of training through a stream: one forward over all segments in which only the last may be learned
from."""

from __future__ import annotations

import torch
from torch import Tensor

from titan_distill.attention.causal import CausalAttention
from titan_distill.attention.dense import AttentionCall


class DetachedPast(CausalAttention):
    """In place of the core of a whole causal forward: no gradient reaches, or comes from, all but the last segment."""

    def mix(self, call: AttentionCall) -> tuple[Tensor, None]:
        own = self.runs[-1].start
        k, v = (torch.cat((x[:, :own].detach(), x[:, own:]), dim=1) for x in (call.k_BSHD, call.v_BSHD))
        mixed, _ = super().mix(call._replace(k_BSHD=k, v_BSHD=v))
        return torch.cat((mixed[:, :own].detach(), mixed[:, own:]), dim=1), None
