"""The attention interface, and its dense form.

A transformer block owns projections, norms and rotary phases; an *attention core* only mixes tokens. That cut is what
lets a role choose: the student sparse, teacher and critic dense, or either of them wrapped in the all-to-all of
sequence parallelism, without the block knowing.

Shape suffixes: B batch, L query tokens, S key tokens, H heads, D head dim.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from titan_kernels import TileLayout
from torch import Tensor


class AttentionCore(Protocol):
    """Mixes values by query-key similarity, scaled by 1/sqrt(D)."""

    def __call__(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, layout: TileLayout | None, /) -> Tensor:
        """Return [B, L, H, D].

        `layout` tells where the tiles of video tokens lie, for cores that need it. It is None in cross-attention, whose
        keys are not video tokens.
        """
        ...


def dense_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, layout: TileLayout | None = None) -> Tensor:
    """Full softmax attention through PyTorch's fused kernels; the order of tokens does not matter to it."""
    q_BHLD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    return F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD).transpose(1, 2)
