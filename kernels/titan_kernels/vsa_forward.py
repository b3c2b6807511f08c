"""Block-sparse attention forward: one program attends one block of queries to the tokens of its listed key tiles.

The softmax is computed online: a running maximum and sum per query row, the accumulator rescaled when the maximum
grows. Scores are kept in units of log2, so that exponentials are single instructions; the scale is applied to the fp32
product, never to its operands.

The order of waiting decides the speed. A step computes the softmax of its tile while two products are under
way: the previous tile's with its values, and the next tile's scores. So scores are one tile ahead, and the last step
multiplies once in vain. A list entry leads to a tile's start, and that to its rows: three loads in a row, which a
software pipeliner can only prefetch by dividing its stages among them. So the addresses of the next tiles are carried
through the loop, read before their rows are, and all stages serve the rows. Programs are numbered head by head:
neighbours in time read the same head, whose keys and values stay in L2.

Other candidates run in the *textbook order*: a tile's scores, its softmax, its values, with one buffer each for keys
and values. Within a program nothing overlaps then, but its registers and shared memory are so few that twice as many
programs share a multiprocessor, and one multiplies while another computes its softmax.

Rows of a ragged tile's successor may be read (and, at the very end, zeros); their scores become -inf, so they weigh
exactly nothing. Each tile, not each element, is tested for being ragged.

A candidate may be *persistent*: as many programs as fit on the GPU at once, each walking over blocks in strides, which
saves the start of one program per block.

Shape suffixes: B batch, L query tokens, S key tokens, H heads, D head dim, N query blocks, K tiles listed for each;
inside kernels M rows of a query block, N of a key block.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from titan_kernels import tuning
from titan_kernels.layout import Tiles
from titan_kernels.tile_pool import contiguous_rows

# Numbers that change while training: a kernel specialised on one of them (on being 1, or divisible by 16) would be
# compiled again in the middle of a schedule.
RUNTIME = ["num_heads", "num_q_blocks", "num_listed", "num_queries", "num_keys"]


@triton.jit
def head_rows(x, batch, head, start, stride_b, stride_l, stride_h):
    """Pointer to row `start` of a head; 64-bit, because batch, token and head together exceed 31 bits."""
    return x + batch.to(tl.int64) * stride_b + start.to(tl.int64) * stride_l + head.to(tl.int64) * stride_h


@triton.jit
def load_rows(
    tokens, batch, head, start, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr
):
    """[ROWS, BLOCK_D] of a head, from row `start` on; zeros beyond the last row and beyond HEAD_DIM.

    `tokens` is (pointer or descriptor of [B, L, H, D], L, strides of B, L and H).
    """
    x, num_rows, stride_b, stride_l, stride_h = tokens
    if TMA:
        # The descriptor sees [B * L, H * D]. Beyond a batch's last row lies the next one's first: masked by the user.
        return x.load([batch * num_rows + start, head * HEAD_DIM])
    else:
        row = tl.arange(0, ROWS)
        dim = tl.arange(0, BLOCK_D)
        pointers = head_rows(x, batch, head, start, stride_b, stride_l, stride_h) + row[:, None] * stride_l + dim
        mask = (row < num_rows - start)[:, None]
        if HEAD_DIM < BLOCK_D:
            mask = mask & (dim < HEAD_DIM)
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(
    x,
    rows,
    batch,
    head,
    start,
    length,
    num_rows,
    num_heads,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes the first `length` rows into a contiguous [B, num_rows, num_heads, HEAD_DIM]."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    stride_l = num_heads * HEAD_DIM
    first = head_rows(x, batch, head, start, num_rows.to(tl.int64) * stride_l, stride_l, HEAD_DIM)
    mask = (row < length)[:, None] & (dim < HEAD_DIM)
    tl.store(first + row[:, None] * stride_l + dim, rows.to(x.dtype.element_ty), mask=mask)


@triton.jit
def mask_columns(scores, length, COLUMNS: tl.constexpr):
    """-inf for columns from `length` on. Most tiles are full and skip it."""
    if length < COLUMNS:
        scores = tl.where(tl.arange(0, COLUMNS) < length, scores, float("-inf"))
    return scores


@triton.jit
def block_of(i, blocks, starts, lengths, ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """First token and length of the i-th chunk of ROWS tokens, counted through the blocks listed at `blocks`."""
    block = tl.load(blocks + i // CHUNKS)
    skip = i % CHUNKS * ROWS
    return tl.load(starts + block) + skip, tl.load(lengths + block) - skip


@triton.jit
def attend_block(
    program,
    q_tokens,
    k_tokens,
    v_tokens,
    out,
    lse,
    lists,
    q_tiles,
    kv_tiles,
    sizes,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    Q_CHUNKS: tl.constexpr,
    KV_CHUNKS: tl.constexpr,
    TMA: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries of one head, or one chunk of a longer block.

    AHEAD computes the scores one tile ahead; otherwise the order is the textbook's, and TMA fetches the queries too.
    Tokens are those of `load_rows`, tiles (starts, lengths), `sizes` (heads, query blocks, tiles listed
    for each, queries, keys).
    """
    num_heads, num_q_blocks, num_listed, num_queries, num_keys = sizes
    q_start, q_length = q_tiles
    kv_start, kv_length = kv_tiles
    item = program // Q_CHUNKS
    block = item % num_q_blocks
    head = item // num_q_blocks % num_heads
    batch = item // num_q_blocks // num_heads
    skip = program % Q_CHUNKS * BLOCK_M
    first = tl.load(q_start + block) + skip
    num_rows = tl.load(q_length + block) - skip

    lists += item.to(tl.int64) * num_listed
    num_steps = num_listed * KV_CHUNKS
    start, length = block_of(0, lists, kv_start, kv_length, BLOCK_N, KV_CHUNKS)
    tile = tl.load(lists + tl.minimum(1, num_steps - 1) // KV_CHUNKS)
    q_MD = load_rows(q_tokens, batch, head, first, BLOCK_M, HEAD_DIM, BLOCK_D, TMA and not AHEAD)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if AHEAD:
        k_ND = load_rows(k_tokens, batch, head, start, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
        s_MN = tl.dot(q_MD, k_ND.T, input_precision=PRECISION)
    skip = 1 % KV_CHUNKS * BLOCK_N
    next_start = tl.load(kv_start + tile) + skip
    next_length = tl.load(kv_length + tile) - skip
    tile = tl.load(lists + tl.minimum(2, num_steps - 1) // KV_CHUNKS)
    for i in range(num_steps):
        # For the step after next, and the list entry for the one after it: these loads have a step to arrive.
        skip = (i + 2) % KV_CHUNKS * BLOCK_N
        then_start = tl.load(kv_start + tile) + skip
        then_length = tl.load(kv_length + tile) - skip
        tile = tl.load(lists + tl.minimum(i + 3, num_steps - 1) // KV_CHUNKS)
        k_start = next_start if AHEAD else start
        k_ND = load_rows(k_tokens, batch, head, k_start, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
        v_ND = load_rows(v_tokens, batch, head, start, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
        if not AHEAD:
            s_MN = tl.dot(q_MD, k_ND.T, input_precision=PRECISION)
        s_MN = mask_columns(s_MN, length, BLOCK_N)
        new_highest = tl.maximum(highest, tl.max(s_MN, 1) * scale_log2)
        p_MN = tl.exp2(s_MN * scale_log2 - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(p_MN, 1)
        if AHEAD:
            s_MN = tl.dot(q_MD, k_ND.T, input_precision=PRECISION)
        acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * shrink[:, None], input_precision=PRECISION)
        highest = new_highest
        # Through an operation, because the pipeliner refuses values that a loop hands on untouched.
        start = tl.minimum(next_start, num_keys)
        length = tl.minimum(next_length, BLOCK_N)
        next_start = then_start
        next_length = then_length

    out_MD = acc_MD * (1.0 / total)[:, None]
    store_rows(out, out_MD, batch, head, first, num_rows, num_queries, num_heads, HEAD_DIM, BLOCK_M, BLOCK_D)
    row = tl.arange(0, BLOCK_M)
    lse += (batch * num_heads + head).to(tl.int64) * num_queries + first
    tl.store(lse + row, (highest + tl.log2(total)) * 0.6931471805599453, mask=row < num_rows)


@triton.jit(do_not_specialize=[*RUNTIME, "num_programs"])
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    lists,
    q_start,
    q_length,
    kv_start,
    kv_length,
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
    num_programs,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    Q_CHUNKS: tl.constexpr,
    KV_CHUNKS: tl.constexpr,
    TMA: tl.constexpr,
    AHEAD: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):
    q_tokens = (q, num_queries, q_stride_b, q_stride_l, q_stride_h)
    k_tokens = (k, num_keys, k_stride_b, k_stride_l, k_stride_h)
    v_tokens = (v, num_keys, v_stride_b, v_stride_l, v_stride_h)
    tensors = (q_tokens, k_tokens, v_tokens, out, lse, lists, (q_start, q_length), (kv_start, kv_length))
    numbers = ((num_heads, num_q_blocks, num_listed, num_queries, num_keys), scale_log2)
    # Constants go one by one: in a tuple that a name holds they would become run-time numbers.
    if PERSISTENT:
        for program in range(tl.program_id(0), num_programs, tl.num_programs(0)):
            attend_block(
                program, *tensors, *numbers,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, Q_CHUNKS, KV_CHUNKS, TMA, AHEAD, PRECISION,
            )  # fmt: skip
    else:
        attend_block(
            tl.program_id(0), *tensors, *numbers,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, Q_CHUNKS, KV_CHUNKS, TMA, AHEAD, PRECISION,
        )  # fmt: skip


def vsa_forward(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    lists_BHNK: Tensor,
    q_tiles: Tiles,
    kv_tiles: Tiles,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """`reference.vsa_forward` for bfloat16, float16 and float32; any strides but the last dim's."""
    q, k, v = (kernel_rows(x) for x in (q_BLHD, k_BSHD, v_BSHD))
    lists = lists_BHNK.contiguous()
    batch, num_queries, num_heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, num_heads, num_queries), dtype=torch.float32, device=q.device)
    shape = tuning.Shape.of(q, lists_BHNK, q_tiles, kv_tiles, exact)
    num_programs = batch * num_heads * len(q_tiles.start) * shape.q_chunks

    def launch(candidate: tuning.Candidate) -> None:
        k_rows, v_rows = (described(x, shape.block_n) if candidate.tma else x for x in (k, v))
        q_rows = described(q, shape.block_m) if candidate.tma and not candidate.ahead else q
        resident = candidate.persistent * tuning.num_multiprocessors(q.device)
        forward_kernel[(min(resident, num_programs) if resident else num_programs,)](
            *(q_rows, k_rows, v_rows, out, lse, lists, *q_tiles[:2], *kv_tiles[:2]),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            *(num_heads, len(q_tiles.start), lists_BHNK.shape[-1], num_queries, k.shape[1], num_programs),
            math.log2(math.e) / math.sqrt(head_dim),
            **shape.constants,
            TMA=candidate.tma,
            AHEAD=candidate.ahead,
            PERSISTENT=bool(candidate.persistent),
            **candidate.options,
        )

    tuning.launch("forward", shape, launch, tma=can_describe(q, k, v))
    return out, lse


def kernel_rows(x_BLHD: Tensor) -> Tensor:
    """`x` or a copy of it, so that a row's numbers lie next to each other."""
    if x_BLHD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype {x_BLHD.dtype} has no kernel; use bfloat16, float16 or float32")
    return contiguous_rows(x_BLHD)


def can_describe(*tensors_BLHD: Tensor) -> bool:
    """Whether the copy engine (TMA) can fetch rows of these: Hopper or later, contiguous, a power of two wide."""
    if tensors_BLHD[0].device.type != "cuda" or torch.cuda.get_device_capability(tensors_BLHD[0].device) < (9, 0):
        return False
    return all(
        x.is_contiguous() and x.data_ptr() % 16 == 0 and x.shape[-1] == triton.next_power_of_2(x.shape[-1])
        for x in tensors_BLHD
    )


def described(x_BLHD: Tensor, num_rows: int) -> TensorDescriptor:
    """A descriptor of contiguous [B, L, H, D] as [B * L, H * D], for blocks of `num_rows` tokens of one head."""
    batch, tokens, heads, head_dim = x_BLHD.shape
    return TensorDescriptor(x_BLHD, [batch * tokens, heads * head_dim], [heads * head_dim, 1], [num_rows, head_dim])
