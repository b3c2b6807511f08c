"""The attention interface, and its dense form.

A transformer block owns projections, norms and rotary phases; an *attention core* only mixes tokens. That cut is what
lets a role choose: the student sparse, teacher and critic dense, without the block knowing. Where the tokens of a
sample are, all on this rank or shared with others, is a second choice, which `placement` makes.

A core has two outputs because sparse attention has: a *fine* one for each token and, where the model has a gate for it,
a *coarse* one for each tile. The gate stays where its tokens are; only outputs travel.

Shape suffixes: B batch, L query tokens, S key tokens, H heads, D head dim, N query tiles.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from titan_kernels import TileLayout
from torch import Tensor


class AttentionCore(Protocol):
    """Mixes values by query-key similarity, scaled by 1/sqrt(D)."""

    def mix(
        self,
        q_BLHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        layout: TileLayout,
        num_selected: int | None,
        queries: range | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the fine output [B, L, H, D] and the coarse one [B, N, H, D], or None, both in the dtype of `q`.

        Args:
            q_BLHD: the tokens of the tiles `queries`.
            k_BSHD, v_BSHD: all tokens of the layout.
            layout: where the tiles of video tokens lie.
            num_selected: tiles that each query tile reads; None reads all, by dense attention.
            queries: a run of query tiles; all by default.
        """
        ...


def dense_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """Full softmax attention through PyTorch's fused kernels; the order of tokens does not matter to it."""
    q_BHLD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    return F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD).transpose(1, 2)


class DenseAttention:
    """The core of a dense role: every token reads every other."""

    def mix(
        self,
        q_BLHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        layout: TileLayout,
        num_selected: int | None,
        queries: range | None = None,
    ) -> tuple[Tensor, None]:
        return dense_attention(q_BLHD, k_BSHD, v_BSHD), None
