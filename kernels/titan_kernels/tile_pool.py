"""Means of queries, keys and values over tiles in one launch, and their gradients in another.

Both only move memory: a program takes one tile of one head, which is a run of rows, and touches every element once in
16-byte pieces. Heads count fastest, so that programs side by side read neighbouring addresses.

Shape suffixes as in `reference`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_kernels.layout import Tiles

MAX_ROWS = 64
"""Tokens that a program holds in registers at a time; longer tiles take several turns."""


@triton.jit(do_not_specialize=["num_q_tiles", "num_kv_tiles"])
def _pool_kernel(
    q,
    k,
    v,
    pooled_q,
    pooled_k,
    pooled_v,
    q_start,
    q_length,
    kv_start,
    kv_length,
    q_stride_batch,
    q_stride_token,
    q_stride_head,
    k_stride_batch,
    k_stride_token,
    k_stride_head,
    v_stride_batch,
    v_stride_token,
    v_stride_head,
    num_heads,
    num_q_tiles,
    num_kv_tiles,
    LONGEST: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0) // num_heads
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    at = (batch, head, num_heads)
    q_tokens = (q, q_stride_batch, q_stride_token, q_stride_head)
    k_tokens = (k, k_stride_batch, k_stride_token, k_stride_head)
    v_tokens = (v, v_stride_batch, v_stride_token, v_stride_head)
    q_tiles = (q_start, q_length, num_q_tiles)
    kv_tiles = (kv_start, kv_length, num_kv_tiles)
    # Three branches rather than a chosen pointer: the compiler keeps what it knows of each one's alignment.
    if tile < num_q_tiles:
        _mean(tile, q_tokens, pooled_q, q_tiles, at, LONGEST, ROWS, D, BLOCK_D)
    elif tile < num_q_tiles + num_kv_tiles:
        _mean(tile - num_q_tiles, k_tokens, pooled_k, kv_tiles, at, LONGEST, ROWS, D, BLOCK_D)
    else:
        _mean(tile - (num_q_tiles + num_kv_tiles), v_tokens, pooled_v, kv_tiles, at, LONGEST, ROWS, D, BLOCK_D)


@triton.jit
def _mean(
    tile, tokens, means, tiles, at, LONGEST: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The mean of one tile of `tiles` (starts, lengths, number), for the batch and head of `at`."""
    x, stride_batch, stride_token, stride_head = tokens
    start, length, num_tiles = tiles
    batch, head, num_heads = at
    x += batch * stride_batch + head * stride_head
    means += ((batch * num_tiles + tile) * num_heads + head) * D
    start += tile
    length += tile
    num_tokens = tl.load(length)
    x += tl.load(start).to(tl.int64) * stride_token
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, LONGEST, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        valid = (row < num_tokens) & (d < D)[None, :]
        block = tl.load(x + row * stride_token + d[None, :], mask=valid, other=0.0)
        total += tl.sum(block.to(tl.float32), 0)
    tl.store(means + d, total / num_tokens, mask=d < D)


@triton.jit(do_not_specialize=["num_q_tiles", "num_kv_tiles", "num_queries", "num_keys"])
def _pool_backward_kernel(
    grad_q,
    grad_k,
    grad_v,
    q,
    k,
    v,
    q_start,
    q_length,
    kv_start,
    kv_length,
    num_heads,
    num_q_tiles,
    num_kv_tiles,
    num_queries,
    num_keys,
    LONGEST: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0) // num_heads
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    at = (batch, head, num_heads)
    q_tiles = (q_start, q_length, num_q_tiles)
    kv_tiles = (kv_start, kv_length, num_kv_tiles)
    if tile < num_q_tiles:
        _spread(tile, grad_q, q, num_queries, q_tiles, at, LONGEST, ROWS, D, BLOCK_D)
    elif tile < num_q_tiles + num_kv_tiles:
        _spread(tile - num_q_tiles, grad_k, k, num_keys, kv_tiles, at, LONGEST, ROWS, D, BLOCK_D)
    else:
        _spread(tile - (num_q_tiles + num_kv_tiles), grad_v, v, num_keys, kv_tiles, at, LONGEST, ROWS, D, BLOCK_D)


@triton.jit
def _spread(
    tile,
    grad,
    x,
    num_rows,
    tiles,
    at,
    LONGEST: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start, length, num_tiles = tiles
    batch, head, num_heads = at
    grad += ((batch * num_tiles + tile) * num_heads + head) * D
    x += (batch * num_rows * num_heads + head) * D
    stride_token = num_heads * D
    start += tile
    length += tile
    num_tokens = tl.load(length)
    x += tl.load(start).to(tl.int64) * stride_token
    d = tl.arange(0, BLOCK_D)
    share = tl.load(grad + d, mask=d < D, other=0.0) / num_tokens
    block = tl.broadcast_to(share.to(x.dtype.element_ty)[None, :], ROWS, BLOCK_D)
    for first in range(0, LONGEST, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        tl.store(x + row * stride_token + d[None, :], block, mask=(row < num_tokens) & (d < D)[None, :])


def tile_pool(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, q_tiles: Tiles, kv_tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.tile_pool`, for inputs up to fp32."""
    batch, _, num_heads, head_dim = q_BLHD.shape
    num_q_tiles, num_kv_tiles = len(q_tiles.start), len(kv_tiles.start)
    q, k, v = (contiguous_rows(x) for x in (q_BLHD, k_BSHD, v_BSHD))
    pooled_q, pooled_k, pooled_v = (
        q.new_empty((batch, num_tiles, num_heads, head_dim), dtype=torch.float32)
        for num_tiles in (num_q_tiles, num_kv_tiles, num_kv_tiles)
    )
    _pool_kernel[(num_q_tiles + 2 * num_kv_tiles) * num_heads, batch](
        *(q, k, v, pooled_q, pooled_k, pooled_v, *q_tiles[:2], *kv_tiles[:2]),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], num_heads, num_q_tiles, num_kv_tiles),
        **block_sizes(max(q_tiles.longest, kv_tiles.longest), head_dim),
    )
    return pooled_q, pooled_k, pooled_v


def tile_pool_backward(
    grad_q_BNHD: Tensor,
    grad_k_BTHD: Tensor,
    grad_v_BTHD: Tensor,
    q_tiles: Tiles,
    kv_tiles: Tiles,
    num_queries: int,
    num_keys: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.tile_pool_backward`."""
    batch, num_q_tiles, num_heads, head_dim = grad_q_BNHD.shape
    num_kv_tiles = grad_k_BTHD.shape[1]
    grad_q, grad_k, grad_v = (
        grad_q_BNHD.new_empty((batch, num_tokens, num_heads, head_dim), dtype=dtype)
        for num_tokens in (num_queries, num_keys, num_keys)
    )
    _pool_backward_kernel[(num_q_tiles + 2 * num_kv_tiles) * num_heads, batch](
        *(grad.contiguous() for grad in (grad_q_BNHD, grad_k_BTHD, grad_v_BTHD)),
        *(grad_q, grad_k, grad_v, *q_tiles[:2], *kv_tiles[:2]),
        *(num_heads, num_q_tiles, num_kv_tiles, num_queries, num_keys),
        **block_sizes(max(q_tiles.longest, kv_tiles.longest), head_dim),
    )
    return grad_q, grad_k, grad_v


def contiguous_rows(x: Tensor) -> Tensor:
    """`x` or a copy of it, so that the numbers of a row lie next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def block_sizes(longest: int, head_dim: int) -> dict[str, int]:
    """The compile-time sizes of a kernel that goes over tiles of at most `longest` tokens."""
    rows = min(MAX_ROWS, triton.next_power_of_2(longest))
    return {"LONGEST": longest, "ROWS": rows, "D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}
