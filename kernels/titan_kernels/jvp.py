"""Softmax attention and its forward-mode derivative in one pass over the keys, for rCM (arXiv 2510.08431) and sCM.

With scores S = scale Q Kᵀ, P = softmax(S) and O = P V, a movement of the inputs moves the output by

    dS = scale (dQ Kᵀ + Q dKᵀ)        dO = (P ∘ (dS - mean)) V + P dV        mean = rowsum(P ∘ dS)

The softmax is computed online, as in `vsa_forward`: a running maximum and sum per query row. The mean is a running one
as well: when a block of keys changes it, the sum of (P ∘ (dS - mean)) V is corrected by the change times the sum of
P V. Subtracted at the end instead (from the sum of (P ∘ dS) V), it would cancel: where a softmax is nearly a choice of
one key, both are as large as dS, and dO is not.

The order of a step lets the assembler put arithmetic beside products: the exponentials beside dQ Kᵀ, the weights
P ∘ (dS - mean) beside P V and P dV. A block of keys takes six products, or four where keys and values stand still (the
text of cross-attention); tangents of those are not read. Nothing as large as [queries, keys] exists outside a program.

Shape suffixes: B batch, L query tokens, S key tokens, H heads, D head dim; inside the kernel M rows of a query block, N
of a key block.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_kernels import tuning
from titan_kernels.vsa_forward import can_describe, described, kernel_rows, load_rows, mask_columns, store_rows


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def jvp_kernel(
    q,
    k,
    v,
    tangent_q,
    tangent_k,
    tangent_v,
    out,
    tangent_out,
    num_heads,
    num_queries,
    num_keys,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS_MOVE: tl.constexpr,
    TMA: tl.constexpr,
):
    """One block of queries of one head. All tensors are contiguous [B, tokens, H, D]."""
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    first = tl.program_id(0) % num_blocks * BLOCK_M
    head = tl.program_id(0) // num_blocks % num_heads
    batch = tl.program_id(0) // num_blocks // num_heads
    row_size = num_heads * HEAD_DIM
    q_batch = num_queries.to(tl.int64) * row_size
    k_batch = num_keys.to(tl.int64) * row_size
    q_tokens = (q, num_queries, q_batch, row_size, HEAD_DIM)
    tangent_q_tokens = (tangent_q, num_queries, q_batch, row_size, HEAD_DIM)
    k_tokens = (k, num_keys, k_batch, row_size, HEAD_DIM)
    v_tokens = (v, num_keys, k_batch, row_size, HEAD_DIM)
    tangent_k_tokens = (tangent_k, num_keys, k_batch, row_size, HEAD_DIM)
    tangent_v_tokens = (tangent_v, num_keys, k_batch, row_size, HEAD_DIM)
    q_MD = load_rows(q_tokens, batch, head, first, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    tangent_q_MD = load_rows(tangent_q_tokens, batch, head, first, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tangent_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale_log2 = scale * 1.4426950408889634
    for number in range(0, num_keys, BLOCK_N):
        start = tl.cast(number, tl.int32)  # a plain number in Triton's interpreter
        k_ND = load_rows(k_tokens, batch, head, start, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
        s_MN = tl.dot(q_MD, k_ND.T, input_precision="ieee")
        s_MN = mask_columns(s_MN, num_keys - start, BLOCK_N)
        new_highest = tl.maximum(highest, tl.max(s_MN, 1) * scale_log2)
        p_MN = tl.exp2(s_MN * scale_log2 - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        highest = new_highest
        total = total * shrink + tl.sum(p_MN, 1)
        ds_MN = tl.dot(tangent_q_MD, k_ND.T, input_precision="ieee")
        if KEYS_MOVE:
            tangent_k_ND = load_rows(tangent_k_tokens, batch, head, start, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
            ds_MN = tl.dot(q_MD, tangent_k_ND.T, ds_MN, input_precision="ieee")
        ds_MN = ds_MN * scale - mean[:, None]
        step = tl.sum(p_MN * ds_MN, 1) / total
        mean += step
        acc_MD *= shrink[:, None]
        tangent_MD = tangent_MD * shrink[:, None] - acc_MD * step[:, None]
        v_ND = load_rows(v_tokens, batch, head, start, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
        weights_MN = (p_MN * (ds_MN - step[:, None])).to(v_ND.dtype)
        p_MN = p_MN.to(v_ND.dtype)
        acc_MD = tl.dot(p_MN, v_ND, acc_MD, input_precision="ieee")
        if KEYS_MOVE:
            tangent_v_ND = load_rows(tangent_v_tokens, batch, head, start, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
            tangent_MD = tl.dot(p_MN, tangent_v_ND, tangent_MD, input_precision="ieee")
        tangent_MD = tl.dot(weights_MN, v_ND, tangent_MD, input_precision="ieee")
    share = (1.0 / total)[:, None]
    rows = (batch, head, first, num_queries - first, num_queries, num_heads)
    store_rows(out, acc_MD * share, *rows, HEAD_DIM, BLOCK_M, BLOCK_D)
    store_rows(tangent_out, tangent_MD * share, *rows, HEAD_DIM, BLOCK_M, BLOCK_D)


def block_sizes(candidate: tuning.Candidate, dtype: torch.dtype) -> tuple[int, int]:
    """Rows of a block of queries and of keys. Each warp has 16 queries; pointers to 64 keys would spill."""
    if dtype.itemsize > 2:
        return 16, 16  # exact fp32 products run without matrix units and are unrolled
    return 16 * candidate.warps, 64 if candidate.tma else 32


def attention_jvp(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    tangent_q_BLHD: Tensor,
    tangent_k_BSHD: Tensor | None,
    tangent_v_BSHD: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_jvp` for bfloat16, float16 and float32."""
    q, k, v, tangent_q = (kernel_rows(x).contiguous() for x in (q_BLHD, k_BSHD, v_BSHD, tangent_q_BLHD))
    keys_move = tangent_k_BSHD is not None and tangent_v_BSHD is not None
    # Where keys and values stand still, the kernel does not read their tangents.
    tangent_k, tangent_v = (
        x.contiguous() if keys_move and x is not None else like
        for x, like in ((tangent_k_BSHD, k), (tangent_v_BSHD, v))
    )
    batch, num_queries, num_heads, head_dim = q.shape
    out, tangent_out = torch.empty_like(q), torch.empty_like(q)

    def launch(candidate: tuning.Candidate) -> None:
        rows, columns = block_sizes(candidate, q.dtype)
        of_keys = (k, v, tangent_k, tangent_v)
        k_rows, v_rows, tangent_k_rows, tangent_v_rows = (
            described(x, columns) if candidate.tma else x for x in of_keys
        )
        jvp_kernel[(batch * num_heads * triton.cdiv(num_queries, rows),)](
            *(q, k_rows, v_rows, tangent_q, tangent_k_rows, tangent_v_rows, out, tangent_out),
            *(num_heads, num_queries, k.shape[1], head_dim**-0.5),
            HEAD_DIM=head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_M=rows,
            BLOCK_N=columns,
            KEYS_MOVE=keys_move,
            TMA=candidate.tma,
            **candidate.options,
        )

    # All keys count, so their number stands where sparse kernels have the density of their lists.
    shape = tuning.Shape(head_dim, q.dtype, 16, 16, 1, 1, num_heads, round(2 * math.log2(k.shape[1])))
    tuning.launch("jvp", shape, launch, tma=can_describe(k, v, tangent_k, tangent_v))
    return out, tangent_out
