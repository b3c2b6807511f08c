"""The interface of attention cores, and dense attention.

A transformer block has the projections, norms and rotary phases; an *attention core* only mixes tokens. Each role can
therefore have dense, sparse or causal attention with the same block. `sharded` handles tokens that several ranks share.

A core has two outputs, because sparse attention has two: a *fine* output per token and, if the model has a gate for it,
a *coarse* output per tile. The caller applies the gate, so ranks that share tokens exchange outputs but no gates.

PyTorch has several fused kernels for dense attention, in an order, and uses the first one that supports the inputs.
torch 2.11 would use FlashAttention-2. On Hopper and data-centre Blackwell GPUs cuDNN's kernel is about twice as fast by
published figures, so `order_backends` puts it first. A run sets the order once at its start, for the whole process. It
then holds for backwards on autograd's thread, for recomputed blocks and for compiled graphs, and costs nothing per
call. A context manager around each call would be traced into every graph, and would have ended before the backward.
cuDNN supports 16-bit dtypes and head dims that are multiples of 8 up to 128. It has no deterministic mode. If a
backend does not support the inputs, PyTorch uses the next one.

None of these kernels has a forward-mode derivative: for inputs with tangents, `titan_kernels.attention_jvp` runs.

Shape suffixes: B batch, L query tokens, S key tokens, H heads, D head dim, N query tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import titan_kernels
import torch
import torch.nn.functional as F
from titan_kernels import TileLayout
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend

BACKENDS = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "FlashAttention",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient attention",
    SDPBackend.MATH: "unfused products",
}
"""Kernels for dense attention, in the order of their speed on Hopper and Blackwell."""

_OLDEST_CUDNN = 91501
"""Oldest usable cuDNN. Before 9.15.1 results are wrong unless 128 divides the number of tokens, which it does not in
Wan's videos (pytorch/pytorch#169849)."""


class AttentionCall(NamedTuple):
    """The arguments of one self-attention.

    Attributes:
        q_BLHD: queries of the tokens in the tiles `queries`.
        k_BSHD, v_BSHD: keys and values.
        layout: the tile layout of the tokens.
        gate_BLHD: weight of the coarse output per query token; None for a core without a coarse output.
        num_selected: number of key tiles that each query tile reads; None for all, computed by dense attention.
        queries: range of query tiles; None for all tiles.
    """

    q_BLHD: Tensor
    k_BSHD: Tensor
    v_BSHD: Tensor
    layout: TileLayout
    gate_BLHD: Tensor | None = None
    num_selected: int | None = None
    queries: range | None = None


class AttentionCore(Protocol):
    """Interface of attention: mixes values by query-key similarity, scaled by 1/sqrt(D)."""

    def mix(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Returns the fine output [B, L, H, D] and the coarse output [B, N, H, D] or None, in the dtype of the queries.
        The caller applies the gate."""
        ...


def dense_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """Computes full softmax attention with PyTorch's fused kernels. The result does not depend on the order of tokens.

    In forward mode output and tangent come from one kernel, without an autograd graph.
    """
    if not torch.compiler.is_compiling():
        values, tangents = zip(*map(forward_ad.unpack_dual, (q_BLHD, k_BSHD, v_BSHD)), strict=True)
        if any(tangent is not None for tangent in tangents):
            return forward_ad.make_dual(*titan_kernels.attention_jvp(*values, *_filled(values, tangents)))
    q_BHLD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    return F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD).transpose(1, 2)


def _filled(values: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """Yields the tangents of queries, keys and values, with zeros for absent ones. Keys and values that both stand
    still have none."""
    still = tangents[1] is None and tangents[2] is None
    for index, (value, tangent) in enumerate(zip(values, tangents, strict=True)):
        yield None if index and still else torch.zeros_like(value) if tangent is None else tangent


def order_backends(device: torch.device) -> None:
    """Makes this process prefer cuDNN's attention on data-centre Hopper and Blackwell GPUs (compute capability 9 and
    10).

    On other devices PyTorch's order does not change.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return
    if (torch.backends.cudnn.version() or 0) >= _OLDEST_CUDNN:
        set_order(list(BACKENDS))


def set_order(backends: list[SDPBackend]) -> None:
    """Makes PyTorch try `backends` first, in this order, and then the other backends in PyTorch's order."""
    first = [backend.value for backend in backends]
    # The order's only other entrance is a context manager, `sdpa_kernel(..., set_priority=True)`.
    others = [backend for backend in torch._C._get_sdp_priority_order() if backend not in first]
    torch._C._set_sdp_priority_order(first + others)


def dense_backend(num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, trained: bool) -> str:
    """Returns the name of the backend that PyTorch would use for `dense_attention` on `device`. It asks PyTorch, with
    small tensors."""
    q_BHLD = torch.zeros(1, 256, num_heads, head_dim, dtype=dtype, device=device).transpose(1, 2)
    q_BHLD.requires_grad_(trained)
    return BACKENDS[SDPBackend(torch._fused_sdp_choice(q_BHLD, q_BHLD, q_BHLD))]


class DenseAttention:
    """Attention core of a role with dense attention: every token attends to every token."""

    def mix(self, call: AttentionCall) -> tuple[Tensor, None]:
        return dense_attention(call.q_BLHD, call.k_BSHD, call.v_BSHD), None
