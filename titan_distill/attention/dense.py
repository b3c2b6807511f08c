"""The attention interface, and its dense form.

A transformer block owns projections, norms and rotary phases; an *attention core* only mixes tokens. That cut is what
lets each role choose dense, sparse or causal attention without the block knowing. Whether the tokens of a sample are
all on this rank or shared with others is a second choice, made by `sharded`.

A core has two outputs because sparse attention has: a *fine* one for each token and, where the model has a gate for it,
a *coarse* one for each tile. The gate stays where its tokens are; only outputs travel.

PyTorch has several fused kernels for dense attention and takes the first of an order that fits. On Hopper and
data-centre Blackwell GPUs cuDNN's is about twice as fast as FlashAttention-2 by published figures, which torch 2.11
would take, so `order_backends` puts it first.
The order is set once, where a run starts: it is the process's, so backwards on autograd's own thread, recomputed blocks
and graphs that torch.compile traces all see it, and a call costs nothing. A context manager in a call would be traced
into every graph, and left again before the backward. cuDNN takes 16-bit numbers and head dims up to 128 that 8 divides;
it has no deterministic mode and no forward-mode derivative. PyTorch gives inputs that it refuses to the next backend.

Shape suffixes: B batch, L query tokens, S key tokens, H heads, D head dim, N query tiles.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from titan_kernels import TileLayout
from torch import Tensor
from torch.nn.attention import SDPBackend

BACKENDS = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "FlashAttention",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient attention",
    SDPBackend.MATH: "unfused products",
}
"""Ways to compute dense attention, the fastest on Hopper and Blackwell first."""

_OLDEST_CUDNN = 91501
"""Before 9.15.1 results are wrong where 128 does not divide the tokens (pytorch/pytorch#169849), as in Wan's videos."""


class AttentionCall(NamedTuple):
    """The arguments of one self-attention.

    Attributes:
        q_BLHD: queries, of the tokens in the tiles `queries`.
        k_BSHD, v_BSHD: keys and values.
        layout: the tile layout of the tokens.
        gate_BLHD: weight of the coarse output in each query token's result; None for a core without a coarse output.
        num_selected: key tiles that each query tile reads; None reads all, by dense attention.
        queries: a run of query tiles; None is all tiles.
    """

    q_BLHD: Tensor
    k_BSHD: Tensor
    v_BSHD: Tensor
    layout: TileLayout
    gate_BLHD: Tensor | None = None
    num_selected: int | None = None
    queries: range | None = None


class AttentionCore(Protocol):
    """Mixes values by query-key similarity, scaled by 1/sqrt(D)."""

    def mix(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Return the fine output [B, L, H, D] and the coarse one [B, N, H, D], or None, both in the dtype of the
        queries. The gate is left to the caller."""
        ...


def dense_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """Full softmax attention through PyTorch's fused kernels; the order of tokens does not matter to it."""
    q_BHLD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    return F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD).transpose(1, 2)


def order_backends(device: torch.device) -> None:
    """Prefer cuDNN's attention in this process on data-centre Hopper and Blackwell GPUs (compute capability 9 and 10).

    Elsewhere PyTorch's order stays.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return
    if (torch.backends.cudnn.version() or 0) >= _OLDEST_CUDNN:
        set_order(list(BACKENDS))


def set_order(backends: list[SDPBackend]) -> None:
    """Make PyTorch try these first, in this order, and then the others in theirs."""
    first = [backend.value for backend in backends]
    # The order's only other entrance is a context manager, `sdpa_kernel(..., set_priority=True)`.
    others = [backend for backend in torch._C._get_sdp_priority_order() if backend not in first]
    torch._C._set_sdp_priority_order(first + others)


def dense_backend(num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, trained: bool) -> str:
    """The name of what PyTorch would compute `dense_attention` with here; it asks PyTorch, with small tensors."""
    q_BHLD = torch.zeros(1, 256, num_heads, head_dim, dtype=dtype, device=device).transpose(1, 2)
    q_BHLD.requires_grad_(trained)
    return BACKENDS[SDPBackend(torch._fused_sdp_choice(q_BHLD, q_BHLD, q_BHLD))]


class DenseAttention:
    """The core of a dense role: every token reads every other."""

    def mix(self, call: AttentionCall) -> tuple[Tensor, None]:
        return dense_attention(call.q_BLHD, call.k_BSHD, call.v_BSHD), None
