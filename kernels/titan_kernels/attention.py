"""Video sparse attention (VSA, arXiv 2505.13389), composed of the operators in `ops`.

Two branches. The *coarse* one attends among tile means: cheap, and it sees everything. Its scores choose, for each
query tile and head, the key tiles that the *fine* branch attends to token by token. A learned gate adds the coarse
output to the fine one.

The pieces are public because a parallel layout has to put communication between them: `branches` where the keys are,
`add_coarse` where the gate is.

Shape suffixes: B batch, L query tokens, S key tokens, H heads, D head dim, N query tiles, T key tiles, K tiles listed
for a query tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from titan_kernels import ops
from titan_kernels.layout import TileLayout, Tiles

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_COARSE_BLOCK = 64
"""Tile means that one block of the coarse branch's attention holds."""


def video_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: TileLayout, topk: int, gate: Tensor | None = None
) -> Tensor:
    """Attention of every video token to the `topk` most relevant tiles, plus a gated view of all tiles' means.

    Args:
        q, k, v: [B, L, H, D] in tile order, unpadded; float16, bfloat16 or float32, on CPUs float64 too; D 16 … 128.
            Scores are scaled by 1/sqrt(D), after the products.
        layout: the tiles of the L tokens, on the same device.
        topk: key tiles that a query tile attends to, 1 … `layout.num_tiles`; a plain number, so changing it compiles
            nothing. With all tiles the fine branch is dense attention.
        gate: [B, L, H, D], how much of the coarse output each token takes; None leaves the coarse branch out.

    Returns:
        [B, L, H, D] in the dtype of `q`, differentiable in q, k, v and gate; the choice of tiles is not. Bitwise the
        same at every call, gradients too.

    Raises:
        ValueError: shapes, dtypes or `topk` that do not fit.

    On CUDA this runs Triton kernels; on CPUs their plain-torch twins, or under TRITON_INTERPRET=1 the kernels in
    Triton's interpreter.
    """
    _check(q, k, v, layout, topk, gate)
    pooled = _pool(q, k, v, layout, None)
    fine = fine_branch(q, k, v, pooled, layout, topk)
    return (
        fine if gate is None else add_coarse(fine, coarse_attention(*pooled, exact=_is_exact(q)), gate, layout.tiles())
    )


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tangent_q: Tensor,
    tangent_k: Tensor | None = None,
    tangent_v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense softmax attention and its derivative along the tangents (forward mode), without a matrix of all scores.

    Args:
        q: [B, L, H, D]; float16, bfloat16 or float32, on CPUs float64 too; D 16 … 128. Scores are scaled by 1/sqrt(D).
        k, v: [B, S, H, D].
        tangent_q, tangent_k, tangent_v: the directions in q, k and v, of their shapes. Without the last two, keys and
            values stand still, and a third of the work falls away.

    Returns:
        Output and tangent, [B, L, H, D] in the dtype of `q`; not differentiable.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a tangent of keys without one of values.
    """
    if (tangent_k is None) != (tangent_v is None):
        raise ValueError("keys and values move together: give both tangent_k and tangent_v, or neither")
    _check_jvp(q, {"k": k, "v": v, "tangent_q": tangent_q, "tangent_k": tangent_k, "tangent_v": tangent_v})
    return ops.attention_jvp(q, k, v, tangent_q, tangent_k, tangent_v)


def branches(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    layout: TileLayout,
    topk: int,
    *,
    queries: range | None = None,
    tiles_per_list: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the fine output [B, L, H, D] in the dtype of `q` and the coarse one [B, N, H, D], fp32: one row per tile.

    Args:
        q_BLHD: the tokens of the tiles `queries`.
        k_BSHD, v_BSHD: all tokens of the layout.
        layout, topk: as in `video_sparse_attention`.
        queries: a run of query tiles; all by default.
        tiles_per_list: neighbouring query tiles that share one choice, made by the mean of their tokens. Two make
            blocks of 128 query tokens, which reuse each key twice as often; the result is no longer quite the paper's.
    """
    pooled = _pool(q_BLHD, k_BSHD, v_BSHD, layout, queries)
    fine = fine_branch(q_BLHD, k_BSHD, v_BSHD, pooled, layout, topk, queries=queries, tiles_per_list=tiles_per_list)
    return fine, coarse_attention(*pooled, exact=_is_exact(q_BLHD))


def coarse_branch(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, layout: TileLayout, queries: range | None = None
) -> Tensor:
    """The coarse output of `branches` alone, for models whose fine branch runs dense for now."""
    pooled = _pool(q_BLHD, k_BSHD, v_BSHD, layout, queries)
    return coarse_attention(*pooled, exact=_is_exact(q_BLHD))


def fine_branch(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    pooled: tuple[Tensor, Tensor, Tensor],
    layout: TileLayout,
    topk: int,
    *,
    queries: range | None = None,
    tiles_per_list: int = 1,
) -> Tensor:
    """The fine output of `branches` alone, given the means over tiles that choose for it."""
    with torch.no_grad():
        chooser_BNHD = join_means(pooled[0], layout.tiles(queries).length, tiles_per_list)
        lists_BHNK = select_tiles(chooser_BNHD, pooled[1], topk)
    blocks = layout.tiles(queries, tiles_per_list)
    return ops.vsa_forward(q_BLHD, k_BSHD, v_BSHD, lists_BHNK, blocks, layout.tiles())[0]


def _pool(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, layout: TileLayout, queries: range | None
) -> tuple[Tensor, Tensor, Tensor]:
    return ops.tile_pool(q_BLHD, k_BSHD, v_BSHD, layout.tiles(queries), layout.tiles())


def select_tiles(pooled_q_BNHD: Tensor, pooled_k_BTHD: Tensor, topk: int) -> Tensor:
    """The `topk` key tiles with the largest scores for each query tile and head: int32 [B, H, N, K], ascending.

    The scores exist only here, and never for a backward: at 75,600 tokens and 40 heads they are 332 MB.
    """
    scores_BHNT = torch.einsum("bnhd,bthd->bhnt", pooled_q_BNHD, pooled_k_BTHD) / math.sqrt(pooled_q_BNHD.shape[-1])
    return ops.block_topk(scores_BHNT, topk)


def coarse_attention(pooled_q_BNHD: Tensor, pooled_k_BTHD: Tensor, pooled_v_BTHD: Tensor, exact: bool = True) -> Tensor:
    """Dense attention among tile means [B, N, H, D], by the fine branch's kernel with every block listed: it saves no
    scores, and its backward is deterministic, which fused dense attention's is not for fp32.

    `exact` = False lets matrix units multiply bf16 parts of the means, with an error of some 1e-5: nothing beside the
    rounding of 16-bit tokens. Means rounded to bf16 would be off by 2e-2 where inputs are large (docs/kernels.md).
    """
    q_blocks = _equal_blocks(pooled_q_BNHD.shape[1], pooled_q_BNHD.device)
    kv_blocks = _equal_blocks(pooled_k_BTHD.shape[1], pooled_k_BTHD.device)
    batch, _, heads, _ = pooled_q_BNHD.shape
    every = torch.arange(len(kv_blocks.start), dtype=torch.int32, device=pooled_q_BNHD.device)
    lists = every.expand(batch, heads, len(q_blocks.start), -1).contiguous()
    coarse, _ = ops.vsa_forward(pooled_q_BNHD, pooled_k_BTHD, pooled_v_BTHD, lists, q_blocks, kv_blocks, exact)
    return coarse


def _is_exact(q_BLHD: Tensor) -> bool:
    """Whether the coarse branch of these tokens multiplies exactly."""
    return q_BLHD.dtype.itemsize > 2


def add_coarse(fine_BLHD: Tensor, coarse_BNHD: Tensor, gate_BLHD: Tensor, tiles: Tiles) -> Tensor:
    """`fine + gate * coarse`, where each tile's coarse row serves all of its tokens."""
    return ops.gated_add(fine_BLHD, coarse_BNHD, gate_BLHD, tiles)


def join_means(means_BNHD: Tensor, length_N: Tensor, join: int) -> Tensor:
    """Means over `join` neighbouring tiles from the tiles' own means and lengths."""
    if join == 1:
        return means_BNHD
    group_N = torch.arange(len(length_N), device=length_N.device) // join
    weights_GN = torch.zeros(-(-len(length_N) // join), len(length_N), device=length_N.device, dtype=means_BNHD.dtype)
    weights_GN[group_N, torch.arange(len(length_N), device=length_N.device)] = length_N.to(means_BNHD.dtype)
    return torch.einsum("gn,bnhd->bghd", weights_GN / weights_GN.sum(1, keepdim=True), means_BNHD)


def _equal_blocks(num_tokens: int, device: torch.device) -> Tiles:
    start = torch.arange(0, num_tokens, _COARSE_BLOCK, dtype=torch.int32, device=device)
    return Tiles(start, (num_tokens - start).clamp(max=_COARSE_BLOCK), _COARSE_BLOCK)


def _check(q: Tensor, k: Tensor, v: Tensor, layout: TileLayout, topk: int, gate: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("gate", gate)):
        if x is None:
            continue
        if x.ndim != 4 or x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}, but q is {q.dtype} {tuple(q.shape)} on "
                f"{q.device}; all must be [batch, tokens, heads, head dim] alike"
            )
    _check_kind(q)
    if layout.start.device != q.device:
        raise ValueError(f"layout is on {layout.start.device}, but q is on {q.device}: give tile_layout that device")
    if q.shape[1] != layout.num_tokens:
        raise ValueError(f"q has {q.shape[1]} tokens, but the layout's grid {layout.grid} has {layout.num_tokens}")
    if not 1 <= topk <= layout.num_tiles:
        raise ValueError(f"topk = {topk} must be between 1 and the layout's {layout.num_tiles} tiles")


def _check_jvp(q: Tensor, others: dict[str, Tensor | None]) -> None:
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be [batch, tokens, heads, head dim]")
    k = others["k"]
    assert k is not None
    for name, x in others.items():
        if x is None:
            continue
        num_tokens = q.shape[1] if name == "tangent_q" else k.shape[1]
        expected = (q.shape[0], num_tokens, *q.shape[2:])
        if x.shape != expected or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}, but beside q, {q.dtype} {tuple(q.shape)} on "
                f"{q.device}, it must be {tuple(expected)} alike"
            )
    _check_kind(q)


def _check_kind(q: Tensor) -> None:
    if q.dtype not in _DTYPES and (q.dtype != torch.float64 or q.is_cuda):
        raise ValueError(f"q is {q.dtype}; attention takes float16, bfloat16 and float32, and on CPUs float64")
    if not 16 <= q.shape[-1] <= 128:
        raise ValueError(f"q has head dim {q.shape[-1]}, but the kernels take 16 to 128")
