"""Block-sparse attention backward: three kernels, each output written by one program.

Scores are computed anew from the saved log-sum-exp, in two passes. `grad_q_kernel` walks a query block's list, as the
forward does. `grad_kv_kernel` walks the lists transposed: for each key tile, the query blocks that chose it. That costs
seven matrix products where a single pass costs five, and buys what a single pass cannot have: no atomics, no scatter
buffers, the same bits at every run, zeros written for keys that no query block chose.

With P the softmax, O the output and G its gradient: dV = Pᵀ G, dS = P ∘ (G Vᵀ − delta), delta = rowsum(G ∘ O),
dQ = scale dS K, dK = scale dSᵀ Q. The scale multiplies fp32 accumulators, once, at the end.

`grad_kv_kernel` works on transposed scores, keys by queries, so that P and dS come out of one product in the registers
where the next takes its left operand. Log-sum-exp and delta are kept block by block, each block padded to the same
number of rows: rows that do not exist have a log-sum-exp of +inf, so they weigh nothing, and no element is tested for
it. With TMA the copy engine fetches both before a step's products; loaded by pointers they would take registers for the
whole of it, so each is loaded right before its use.

Key tiles are chosen unequally often. Within a head the most chosen ones come first: the last programs of a launch,
which nothing runs beside, are then the shortest.

Shape suffixes as in `vsa_forward`; M queries of a block, N keys of a block.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from titan_kernels import tuning
from titan_kernels.layout import Tiles
from titan_kernels.transpose_lists import transpose_lists
from titan_kernels.vsa_forward import (
    RUNTIME,
    block_of,
    can_describe,
    described,
    kernel_rows,
    load_rows,
    mask_columns,
    store_rows,
)

_ROWS = 32
"""Most rows that a program of `row_sums_kernel` sums."""


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_rows"])
def row_sums_kernel(
    grad,
    out,
    lse,
    sums,
    q_start,
    q_length,
    grad_stride_b,
    grad_stride_l,
    grad_stride_h,
    out_stride_b,
    out_stride_l,
    out_stride_h,
    num_heads,
    num_queries,
    num_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """For each query row its log-sum-exp in units of log2, and delta: fp32 [B, H, 2, num_rows].

    A block of queries has CHUNKS * ROWS of `num_rows`; those beyond its length get +inf and 0.
    """
    head = tl.program_id(0) % num_heads
    batch = tl.program_id(0) // num_heads
    block = tl.program_id(1) // CHUNKS
    skip = tl.program_id(1) % CHUNKS * ROWS
    start = tl.load(q_start + block) + skip
    length = tl.load(q_length + block) - skip
    grad_tokens = (grad, num_queries, grad_stride_b, grad_stride_l, grad_stride_h)
    out_tokens = (out, num_queries, out_stride_b, out_stride_l, out_stride_h)
    grad_MD = load_rows(grad_tokens, batch, head, start, ROWS, HEAD_DIM, BLOCK_D, False)
    out_MD = load_rows(out_tokens, batch, head, start, ROWS, HEAD_DIM, BLOCK_D, False)
    row = tl.arange(0, ROWS)
    item = tl.program_id(0).to(tl.int64)
    lse_M = tl.load(lse + item * num_queries + start + row, mask=row < length, other=float("inf"))
    delta_M = tl.where(row < length, tl.sum(grad_MD.to(tl.float32) * out_MD.to(tl.float32), 1), 0.0)
    sums += item * 2 * num_rows + tl.program_id(1) * ROWS + row
    tl.store(sums, lse_M * 1.4426950408889634)
    tl.store(sums + num_rows, delta_M)


@triton.jit
def minus_delta(delta, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The start of G Vᵀ's accumulator: the subtraction then costs nothing after the product."""
    return tl.broadcast_to(-delta, ROWS, COLUMNS)


@triton.jit(do_not_specialize=[*RUNTIME, "num_sums"])
def grad_q_kernel(
    grad,
    q,
    k,
    v,
    sums,
    grad_q,
    lists,
    q_start,
    q_length,
    kv_start,
    kv_length,
    grad_stride_b,
    grad_stride_l,
    grad_stride_h,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    num_heads,
    num_q_blocks,
    num_listed,
    num_queries,
    num_keys,
    num_sums,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    Q_CHUNKS: tl.constexpr,
    KV_CHUNKS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):
    grad_tokens = (grad, num_queries, grad_stride_b, grad_stride_l, grad_stride_h)
    q_tokens = (q, num_queries, q_stride_b, q_stride_l, q_stride_h)
    k_tokens = (k, num_keys, k_stride_b, k_stride_l, k_stride_h)
    v_tokens = (v, num_keys, v_stride_b, v_stride_l, v_stride_h)
    item = tl.program_id(0) // Q_CHUNKS
    block = item % num_q_blocks
    head = item // num_q_blocks % num_heads
    batch = item // num_q_blocks // num_heads
    skip = tl.program_id(0) % Q_CHUNKS * BLOCK_M
    first = tl.load(q_start + block) + skip
    num_rows = tl.load(q_length + block) - skip

    lists += item.to(tl.int64) * num_listed
    num_steps = num_listed * KV_CHUNKS
    start, length = block_of(0, lists, kv_start, kv_length, BLOCK_N, KV_CHUNKS)
    tile = tl.load(lists + tl.minimum(1, num_steps - 1) // KV_CHUNKS)
    q_MD = load_rows(q_tokens, batch, head, first, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    grad_MD = load_rows(grad_tokens, batch, head, first, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    row = tl.arange(0, BLOCK_M)
    sums += (batch * num_heads + head).to(tl.int64) * 2 * num_sums
    sums += (block * Q_CHUNKS + tl.program_id(0) % Q_CHUNKS) * BLOCK_M
    lse_M = tl.load(sums + row)
    delta_M = tl.load(sums + num_sums + row)
    scale_log2 = scale * 1.4426950408889634
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(num_steps):
        skip = (i + 1) % KV_CHUNKS * BLOCK_N
        next_start = tl.load(kv_start + tile) + skip
        next_length = tl.load(kv_length + tile) - skip
        tile = tl.load(lists + tl.minimum(i + 2, num_steps - 1) // KV_CHUNKS)
        k_ND = load_rows(k_tokens, batch, head, start, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
        v_ND = load_rows(v_tokens, batch, head, start, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
        s_MN = mask_columns(tl.dot(q_MD, k_ND.T, input_precision=PRECISION), length, BLOCK_N)
        grad_p_MN = tl.dot(grad_MD, v_ND.T, minus_delta(delta_M[:, None], BLOCK_M, BLOCK_N), input_precision=PRECISION)
        p_MN = tl.exp2(s_MN * scale_log2 - lse_M[:, None])
        grad_s_MN = p_MN * grad_p_MN
        acc_MD = tl.dot(grad_s_MN.to(k_ND.dtype), k_ND, acc_MD, input_precision=PRECISION)
        start = next_start
        length = next_length
    acc_MD *= scale
    store_rows(grad_q, acc_MD, batch, head, first, num_rows, num_queries, num_heads, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["num_heads", "num_kv_tiles", "num_chosen", "num_queries", "num_keys", "num_sums"])
def grad_kv_kernel(
    grad,
    q,
    k,
    v,
    sums,
    grad_k,
    grad_v,
    offset,
    chosen_by,
    order,
    q_start,
    kv_start,
    kv_length,
    grad_stride_b,
    grad_stride_l,
    grad_stride_h,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    num_heads,
    num_kv_tiles,
    num_chosen,
    num_queries,
    num_keys,
    num_sums,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    Q_CHUNKS: tl.constexpr,
    KV_CHUNKS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):
    grad_tokens = (grad, num_queries, grad_stride_b, grad_stride_l, grad_stride_h)
    q_tokens = (q, num_queries, q_stride_b, q_stride_l, q_stride_h)
    k_tokens = (k, num_keys, k_stride_b, k_stride_l, k_stride_h)
    v_tokens = (v, num_keys, v_stride_b, v_stride_l, v_stride_h)
    item = tl.program_id(0) // KV_CHUNKS
    head = item // num_kv_tiles % num_heads
    batch = item // num_kv_tiles // num_heads
    first, _ = block_of(tl.program_id(0), order, kv_start, kv_length, BLOCK_N, KV_CHUNKS)

    offset += (batch * num_heads + head).to(tl.int64) * (num_kv_tiles + 1) + tl.load(order + item)
    begin = tl.load(offset)
    num_steps = (tl.load(offset + 1) - begin) * Q_CHUNKS
    # A tile that no query block chose reads an entry that is not its own, and nothing that depends on it. The last tile
    # of all would read beyond the end.
    begin = tl.minimum(begin, num_chosen - 1)
    chosen_by += (batch * num_heads + head).to(tl.int64) * num_chosen + begin
    block = tl.load(chosen_by)
    start = tl.load(q_start + block)
    column = block * BLOCK_SUMS
    block = tl.load(chosen_by + 1 // Q_CHUNKS, mask=num_steps > 1, other=0)
    k_ND = load_rows(k_tokens, batch, head, first, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    v_ND = load_rows(v_tokens, batch, head, first, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    row = tl.arange(0, BLOCK_M)
    lse_row = (batch * num_heads + head) * 2
    if not TMA:
        sums += lse_row.to(tl.int64) * num_sums + row
    scale_log2 = scale * 1.4426950408889634
    k_acc_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_acc_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(num_steps):
        skip = (i + 1) % Q_CHUNKS * BLOCK_M
        next_start = tl.load(q_start + block) + skip
        next_column = block * BLOCK_SUMS + skip
        block = tl.load(chosen_by + (i + 2) // Q_CHUNKS, mask=i + 2 < num_steps, other=0)
        q_MD = load_rows(q_tokens, batch, head, start, BLOCK_M, HEAD_DIM, BLOCK_D, TMA)
        grad_MD = load_rows(grad_tokens, batch, head, start, BLOCK_M, HEAD_DIM, BLOCK_D, TMA)
        if TMA:
            lse_M = sums.load([lse_row, column]).reshape(BLOCK_M)
            delta_M = sums.load([lse_row + 1, column]).reshape(BLOCK_M)
        s_NM = tl.dot(k_ND, q_MD.T, input_precision=PRECISION)
        grad_p_NM = tl.dot(v_ND, grad_MD.T, input_precision=PRECISION)
        if not TMA:
            lse_M = tl.load(sums + column)
        p_NM = tl.exp2(s_NM * scale_log2 - lse_M)
        v_acc_ND = tl.dot(p_NM.to(grad_MD.dtype), grad_MD, v_acc_ND, input_precision=PRECISION)
        if not TMA:
            delta_M = tl.load(sums + column + num_sums)
        grad_s_NM = p_NM * (grad_p_NM - delta_M)
        k_acc_ND = tl.dot(grad_s_NM.to(q_MD.dtype), q_MD, k_acc_ND, input_precision=PRECISION)
        start = next_start
        column = next_column
    # Read again: through the loop they would take registers that it lacks.
    first, num_rows = block_of(tl.program_id(0), order, kv_start, kv_length, BLOCK_N, KV_CHUNKS)
    k_acc_ND *= scale
    store_rows(grad_k, k_acc_ND, batch, head, first, num_rows, num_keys, num_heads, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_rows(grad_v, v_acc_ND, batch, head, first, num_rows, num_keys, num_heads, HEAD_DIM, BLOCK_N, BLOCK_D)


def vsa_backward(
    grad_BLHD: Tensor,
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    out_BLHD: Tensor,
    lse_BHL: Tensor,
    lists_BHNK: Tensor,
    q_tiles: Tiles,
    kv_tiles: Tiles,
    exact: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.vsa_backward` for bfloat16, float16 and float32; any strides but the last dim's."""
    grad, q, k, v, out = (kernel_rows(x) for x in (grad_BLHD, q_BLHD, k_BSHD, v_BSHD, out_BLHD))
    # A product of 16-bit tiles needs both of one type; autocast may send a gradient of another.
    grad = grad.to(q.dtype)
    shape = tuning.Shape.of(q, lists_BHNK, q_tiles, kv_tiles, exact)
    sums = _row_sums(grad, out, lse_BHL.contiguous(), q_tiles, shape)
    grad_q = _grad_q(grad, q, k, v, sums, lists_BHNK.contiguous(), q_tiles, kv_tiles, shape)
    return grad_q, *_grad_kv(grad, q, k, v, sums, lists_BHNK, q_tiles, kv_tiles, shape)


def _row_sums(grad: Tensor, out: Tensor, lse: Tensor, q_tiles: Tiles, shape: tuning.Shape) -> Tensor:
    batch, num_queries, num_heads, head_dim = grad.shape
    rows = min(shape.block_m, _ROWS)
    num_chunks = len(q_tiles.start) * shape.q_chunks * shape.block_m // rows
    sums = torch.empty((batch, num_heads, 2, num_chunks * rows), dtype=torch.float32, device=grad.device)
    row_sums_kernel[batch * num_heads, num_chunks](
        *(grad, out, lse, sums, *q_tiles[:2], *grad.stride()[:3], *out.stride()[:3]),
        *(num_heads, num_queries, sums.shape[-1]),
        HEAD_DIM=head_dim,
        BLOCK_D=shape.constants["BLOCK_D"],
        ROWS=rows,
        CHUNKS=num_chunks // len(q_tiles.start),
    )
    return sums


def _grad_q(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    lists: Tensor,
    q_tiles: Tiles,
    kv_tiles: Tiles,
    shape: tuning.Shape,
) -> Tensor:
    batch, num_queries, num_heads, head_dim = q.shape
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grid = (batch * num_heads * len(q_tiles.start) * shape.q_chunks,)

    def launch(candidate: tuning.Candidate) -> None:
        k_rows, v_rows = (described(x, shape.block_n) if candidate.tma else x for x in (k, v))
        grad_q_kernel[grid](
            *(grad, q, k_rows, v_rows, sums, grad_q, lists, *q_tiles[:2], *kv_tiles[:2]),
            *(*grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            *(num_heads, len(q_tiles.start), lists.shape[-1], num_queries, k.shape[1], sums.shape[-1]),
            head_dim**-0.5,
            **shape.constants,
            TMA=candidate.tma,
            **candidate.options,
        )

    tuning.launch("grad_q", shape, launch, tma=can_describe(k, v))
    return grad_q


def _grad_kv(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    lists: Tensor,
    q_tiles: Tiles,
    kv_tiles: Tiles,
    shape: tuning.Shape,
) -> tuple[Tensor, Tensor]:
    batch, num_keys, num_heads, head_dim = k.shape
    grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    offset, chosen_by = transpose_lists(lists, len(kv_tiles.start))
    order = _longest_first(offset)
    shape = shape.of_keys(q_tiles, kv_tiles)
    grid = (batch * num_heads * len(kv_tiles.start) * shape.kv_chunks,)

    def launch(candidate: tuning.Candidate) -> None:
        q_rows, grad_rows = (described(x, shape.block_m) if candidate.tma else x for x in (q, grad))
        grad_kv_kernel[grid](
            *(grad_rows, q_rows, k, v, _described_sums(sums, shape.block_m) if candidate.tma else sums),
            *(grad_k, grad_v, offset, chosen_by, order, q_tiles.start, *kv_tiles[:2]),
            *(*grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            *(num_heads, len(kv_tiles.start), chosen_by.shape[-1], q.shape[1], num_keys, sums.shape[-1]),
            head_dim**-0.5,
            **shape.constants,
            TMA=candidate.tma,
            BLOCK_SUMS=sums.shape[-1] // len(q_tiles.start),
            **candidate.options,
        )

    tuning.launch("grad_kv", shape, launch, tma=can_describe(grad, q))
    return grad_k, grad_v


def _longest_first(offset_BHT: Tensor) -> Tensor:
    """Key tiles of each head by falling number of the query blocks that chose them, int64 [B, H, T].

    Tiles that equally many chose ascend: the order is a function of the lists alone. `offset_BHT` [B, H, T + 1] is that
    of `transpose_lists`.
    """
    return offset_BHT.diff(dim=-1).argsort(dim=-1, descending=True, stable=True)


def _described_sums(sums: Tensor, num_rows: int) -> TensorDescriptor:
    """A descriptor of `_row_sums` as one row of numbers per head and kind, for `num_rows` of them."""
    num_sums = sums.shape[-1]
    return TensorDescriptor(sums, [sums.numel() // num_sums, num_sums], [num_sums, 1], [1, num_rows])
