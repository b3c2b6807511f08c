"""`fine + gate * coarse`, where one coarse row serves a tile's tokens, and its gradients; nothing is expanded.

A program takes one tile of one head, so that the gradient of its coarse row is a sum within the program: no atomics,
and one pass over each tensor.

Shape suffixes as in `reference`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_kernels.layout import Tiles
from titan_kernels.tile_pool import block_sizes, contiguous_rows


@triton.jit(do_not_specialize=["num_tiles", "num_tokens"])
def _gated_add_kernel(
    fine,
    coarse,
    gate,
    out,
    starts,
    lengths,
    fine_stride_batch,
    fine_stride_token,
    fine_stride_head,
    gate_stride_batch,
    gate_stride_token,
    gate_stride_head,
    num_heads,
    num_tiles,
    num_tokens,
    LONGEST: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0) // num_heads
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    start, length = tl.load(starts + tile).to(tl.int64), tl.load(lengths + tile)
    fine += batch * fine_stride_batch + start * fine_stride_token + head * fine_stride_head
    gate += batch * gate_stride_batch + start * gate_stride_token + head * gate_stride_head
    out += ((batch * num_tokens + start) * num_heads + head) * D
    d = tl.arange(0, BLOCK_D)
    coarse_row = coarse + ((batch * num_tiles + tile) * num_heads + head) * D + d
    mean = tl.load(coarse_row, mask=d < D, other=0.0).to(tl.float32)
    for first in range(0, LONGEST, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        valid = (row < length) & (d < D)[None, :]
        base = tl.load(fine + row * fine_stride_token + d[None, :], mask=valid, other=0.0).to(tl.float32)
        share = tl.load(gate + row * gate_stride_token + d[None, :], mask=valid, other=0.0).to(tl.float32)
        total = (base + share * mean[None, :]).to(out.dtype.element_ty)
        tl.store(out + row * (num_heads * D) + d[None, :], total, mask=valid)


@triton.jit(do_not_specialize=["num_tiles", "num_tokens"])
def _gated_add_backward_kernel(
    grad,
    coarse,
    gate,
    grad_coarse,
    grad_gate,
    starts,
    lengths,
    grad_stride_batch,
    grad_stride_token,
    grad_stride_head,
    gate_stride_batch,
    gate_stride_token,
    gate_stride_head,
    num_heads,
    num_tiles,
    num_tokens,
    LONGEST: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0) // num_heads
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    start, length = tl.load(starts + tile).to(tl.int64), tl.load(lengths + tile)
    grad += batch * grad_stride_batch + start * grad_stride_token + head * grad_stride_head
    gate += batch * gate_stride_batch + start * gate_stride_token + head * gate_stride_head
    grad_gate += ((batch * num_tokens + start) * num_heads + head) * D
    d = tl.arange(0, BLOCK_D)
    coarse_row = ((batch * num_tiles + tile) * num_heads + head) * D + d
    mean = tl.load(coarse + coarse_row, mask=d < D, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, LONGEST, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        valid = (row < length) & (d < D)[None, :]
        above = tl.load(grad + row * grad_stride_token + d[None, :], mask=valid, other=0.0).to(tl.float32)
        share = tl.load(gate + row * gate_stride_token + d[None, :], mask=valid, other=0.0).to(tl.float32)
        total += tl.sum(above * share, 0)
        product = (above * mean[None, :]).to(grad_gate.dtype.element_ty)
        tl.store(grad_gate + row * (num_heads * D) + d[None, :], product, mask=valid)
    tl.store(grad_coarse + coarse_row, total.to(grad_coarse.dtype.element_ty), mask=d < D)


def gated_add(fine_BLHD: Tensor, coarse_BNHD: Tensor, gate_BLHD: Tensor, tiles: Tiles) -> Tensor:
    """As `reference.gated_add`, for inputs up to fp32."""
    out = torch.empty_like(fine_BLHD, memory_format=torch.contiguous_format)
    _launch(_gated_add_kernel, fine_BLHD, coarse_BNHD, gate_BLHD, (out,), tiles)
    return out


def gated_add_backward(
    grad_BLHD: Tensor, coarse_BNHD: Tensor, gate_BLHD: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """As `reference.gated_add_backward`, for inputs up to fp32."""
    grad_coarse, grad_gate = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (coarse_BNHD, gate_BLHD)
    )
    _launch(_gated_add_backward_kernel, grad_BLHD, coarse_BNHD, gate_BLHD, (grad_coarse, grad_gate), tiles)
    return grad_coarse, grad_gate


def _launch(
    kernel: Any, x_BLHD: Tensor, coarse_BNHD: Tensor, gate_BLHD: Tensor, outputs: tuple[Tensor, ...], tiles: Tiles
) -> None:
    x, gate = contiguous_rows(x_BLHD), contiguous_rows(gate_BLHD)
    batch, num_tokens, num_heads, head_dim = x.shape
    num_tiles = len(tiles.start)
    kernel[num_tiles * num_heads, batch](
        *(x, coarse_BNHD.contiguous(), gate, *outputs, *tiles[:2]),
        *(*x.stride()[:3], *gate.stride()[:3], num_heads, num_tiles, num_tokens),
        **block_sizes(tiles.longest, head_dim),
    )
