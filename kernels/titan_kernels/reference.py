"""Plain-torch twins of the kernels: the same signatures, any float dtype, any device, differentiable by autograd.

They are what the kernels are tested against, what runs on CPUs, and the shortest statement of what each one computes.
Softmax runs in fp32 or better; nothing is multiplied by the scale before the products are formed.

Shape suffixes: B batch, L query tokens, S key tokens, H heads, D head dim, N query tiles, T key tiles, K tiles listed
for a query tile, C tokens in them, M tokens of one query tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from titan_kernels.layout import TileLayout, Tiles
from titan_kernels.philox import philox_normal as philox_normal


def tile_pool(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, q_tiles: Tiles, kv_tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    """Means over tiles of queries [B, N, H, D], keys and values [B, T, H, D], in fp32 or better."""
    return _means(q_BLHD, q_tiles), _means(k_BSHD, kv_tiles), _means(v_BSHD, kv_tiles)


def _means(x_BLHD: Tensor, tiles: Tiles) -> Tensor:
    length = tiles.length.long()
    tile_L = torch.repeat_interleave(torch.arange(len(length), device=length.device), length)
    x_BLHD = x_BLHD.to(_at_least_float32(x_BLHD.dtype))
    sums = x_BLHD.new_zeros(x_BLHD.shape[0], len(length), *x_BLHD.shape[2:]).index_add(1, tile_L, x_BLHD)
    return sums / length[:, None, None]


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
    """Gradients, in `dtype`, of the tokens from those of their means."""

    def spread(grad_BNHD: Tensor, tiles: Tiles, num_tokens: int) -> Tensor:
        shares = grad_BNHD / tiles.length[:, None, None]
        return shares.repeat_interleave(tiles.length.long(), dim=1, output_size=num_tokens).to(dtype)

    return (
        spread(grad_q_BNHD, q_tiles, num_queries),
        spread(grad_k_BTHD, kv_tiles, num_keys),
        spread(grad_v_BTHD, kv_tiles, num_keys),
    )


def block_topk(scores_BHNT: Tensor, topk: int) -> Tensor:
    """The `topk` tiles of largest score for each query tile: int32 [B, H, N, topk], ascending.

    The lower of two tiles with equal scores wins, so that the choice is a function of the scores alone.
    """
    order = scores_BHNT.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :topk].sort(dim=-1).values.to(torch.int32)


def transpose_lists(lists_BHNK: Tensor, num_tiles: int) -> tuple[Tensor, Tensor]:
    """The lists seen from the keys: which query tiles chose each of `num_tiles` key tiles.

    Returns `offset`, int32 [B, H, T + 1], and `query`, int32 [B, H, N K]: tile t was chosen by the query tiles
    `query[offset[t]:offset[t + 1]]`, ascending. Made by a stable sort; the kernels count, and give the same.
    """
    flat = lists_BHNK.flatten(2)
    chosen, order = flat.sort(dim=-1, stable=True)
    query = order.div(lists_BHNK.shape[-1], rounding_mode="floor").to(torch.int32)
    bounds = torch.arange(num_tiles + 1, dtype=torch.int32, device=flat.device).expand(*flat.shape[:2], -1)
    return torch.searchsorted(chosen, bounds.contiguous(), out_int32=True), query


def vsa_forward(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    lists_BHNK: Tensor,
    q_tiles: Tiles,
    kv_tiles: Tiles,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query tile over the tokens of its listed key tiles.

    `exact` = False lets a GPU multiply fp32 numbers as two bf16 parts each, an error of some 1e-5; twins never do.

    Returns the output [B, L, H, D] in the dtype of `q` and the natural log-sum-exp of the scaled scores [B, H, L], fp32
    or better.
    """
    q, k, v = (_by_head(x) for x in (q_BLHD, k_BSHD, v_BSHD))
    outs, sums = [], []
    for rows, columns_BHC, valid_BHC in _query_tiles(lists_BHNK, q_tiles, kv_tiles):
        scores_BHMC = _scores(q[:, :, rows], _take(k, columns_BHC), valid_BHC)
        sums.append(scores_BHMC.logsumexp(-1))
        # Not exp(scores - sums): a large sum is rounded coarsely, and the backward subtracts products of this output.
        outs.append(scores_BHMC.softmax(-1) @ _take(v, columns_BHC))
    return torch.cat(outs, 2).transpose(1, 2).contiguous().to(q_BLHD.dtype), torch.cat(sums, 2)


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
    """Gradients of q, k and v from that of `vsa_forward`'s output; zeros for key tiles that no query tile lists."""
    q, k, v, grad, out = (_by_head(x) for x in (q_BLHD, k_BSHD, v_BSHD, grad_BLHD, out_BLHD))
    delta_BHL = (grad * out).sum(-1)
    scale = q.shape[-1] ** -0.5
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
    for rows, columns_BHC, valid_BHC in _query_tiles(lists_BHNK, q_tiles, kv_tiles):
        k_BHCD, v_BHCD = _take(k, columns_BHC), _take(v, columns_BHC)
        p = (_scores(q[:, :, rows], k_BHCD, valid_BHC) - lse_BHL[:, :, rows, None]).exp()
        ds = p * (grad[:, :, rows] @ v_BHCD.mT - delta_BHL[:, :, rows, None])
        grad_q[:, :, rows] = ds @ k_BHCD * scale
        _add(grad_k, columns_BHC, ds.mT @ q[:, :, rows] * scale)
        _add(grad_v, columns_BHC, p.mT @ grad[:, :, rows])
    grad_q, grad_k, grad_v = (x.transpose(1, 2).contiguous() for x in (grad_q, grad_k, grad_v))
    return grad_q.to(q_BLHD.dtype), grad_k.to(k_BSHD.dtype), grad_v.to(v_BSHD.dtype)


_SCORES = 2**22
"""Most scores that `attention_jvp` holds at a time."""


def attention_jvp(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    tangent_q_BLHD: Tensor,
    tangent_k_BSHD: Tensor | None,
    tangent_v_BSHD: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over all keys, and its derivative along the tangents: [B, L, H, D], in the dtype of `q`.

    Tangents of keys and values are both None where these stand still. Queries are taken in chunks.
    """
    q, k, v, dq = (_by_head(x) for x in (q_BLHD, k_BSHD, v_BSHD, tangent_q_BLHD))
    dk, dv = (None if x is None else _by_head(x) for x in (tangent_k_BSHD, tangent_v_BSHD))
    batch, heads, _, head_dim = q.shape
    scale, rows = head_dim**-0.5, max(1, _SCORES // (batch * heads * k.shape[2]))
    outs, tangents = [], []
    for q_BHMD, dq_BHMD in zip(q.split(rows, 2), dq.split(rows, 2), strict=True):
        p_BHMS = (q_BHMD @ k.mT * scale).softmax(-1)
        ds_BHMS = dq_BHMD @ k.mT
        if dk is not None:
            ds_BHMS += q_BHMD @ dk.mT
        ds_BHMS *= scale
        ds_BHMS -= (p_BHMS * ds_BHMS).sum(-1, keepdim=True)
        outs.append(p_BHMS @ v)
        tangents.append((p_BHMS * ds_BHMS) @ v if dv is None else (p_BHMS * ds_BHMS) @ v + p_BHMS @ dv)
    out, tangent = (torch.cat(parts, 2).transpose(1, 2).contiguous() for parts in (outs, tangents))
    return out.to(q_BLHD.dtype), tangent.to(q_BLHD.dtype)


def gated_add(fine_BLHD: Tensor, coarse_BNHD: Tensor, gate_BLHD: Tensor, tiles: Tiles) -> Tensor:
    """`fine + gate * coarse`, the coarse row of a tile for all of its tokens; in the dtype of `fine`."""
    coarse_BLHD = coarse_BNHD.repeat_interleave(tiles.length.long(), dim=1)
    wide = torch.promote_types(coarse_BNHD.dtype, fine_BLHD.dtype)
    out_BLHD = torch.addcmul(fine_BLHD.to(wide), gate_BLHD.to(wide), coarse_BLHD.to(wide))
    return out_BLHD.contiguous().to(fine_BLHD.dtype)


def gated_add_backward(
    grad_BLHD: Tensor, coarse_BNHD: Tensor, gate_BLHD: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """Gradients of `coarse` and `gate`; that of `fine` is the output's own."""
    length = tiles.length.long()
    wide = _at_least_float32(grad_BLHD.dtype)
    grad, gate = grad_BLHD.to(wide), gate_BLHD.to(wide)
    grad_gate = grad * coarse_BNHD.to(wide).repeat_interleave(length, dim=1)
    grad_coarse = _means(grad * gate, tiles) * length[:, None, None]
    return grad_coarse.to(coarse_BNHD.dtype), grad_gate.contiguous().to(gate_BLHD.dtype)


def video_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: TileLayout, topk: int, gate: Tensor | None = None
) -> Tensor:
    """`titan_kernels.video_sparse_attention` in plain torch: the same arguments, any float dtype."""
    tiles = layout.tiles()
    pooled_q, pooled_k, pooled_v = tile_pool(q, k, v, tiles, tiles)
    scores = torch.einsum("bnhd,bthd->bhnt", pooled_q, pooled_k) / math.sqrt(q.shape[-1])
    fine, _ = vsa_forward(q, k, v, block_topk(scores.detach(), topk), tiles, tiles)
    if gate is None:
        return fine
    coarse = torch.einsum("bhnt,bthd->bnhd", scores.softmax(-1), pooled_v)
    return gated_add(fine, coarse, gate, tiles)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _by_head(x_BLHD: Tensor) -> Tensor:
    return x_BLHD.transpose(1, 2).to(_at_least_float32(x_BLHD.dtype)).contiguous()


def _scores(q_BHMD: Tensor, k_BHCD: Tensor, valid_BHC: Tensor) -> Tensor:
    scores_BHMC = q_BHMD @ k_BHCD.mT * q_BHMD.shape[-1] ** -0.5
    return scores_BHMC.masked_fill(~valid_BHC[:, :, None], -math.inf)


def _query_tiles(lists_BHNK: Tensor, q_tiles: Tiles, kv_tiles: Tiles) -> list[tuple[slice, Tensor, Tensor]]:
    """For each query tile its rows, and the tokens [B, H, C] of its listed tiles with which of them count: lists of
    ragged tiles differ in length from head to head."""
    offset = torch.arange(kv_tiles.longest, device=lists_BHNK.device)
    length, start = kv_tiles.length[lists_BHNK], kv_tiles.start[lists_BHNK]
    valid = (offset < length[..., None]).flatten(3)
    tokens = (start[..., None] + offset).flatten(3).masked_fill(~valid, 0)
    valid, order = valid.sort(dim=-1, descending=True, stable=True)
    tokens = tokens.gather(-1, order)
    counts = valid.sum(-1).amax((0, 1)).tolist()
    bounds = zip(q_tiles.start.tolist(), q_tiles.length.tolist(), counts, strict=True)
    return [
        (slice(start, start + length), tokens[:, :, tile, :count], valid[:, :, tile, :count])
        for tile, (start, length, count) in enumerate(bounds)
    ]


def _take(x_BHSD: Tensor, tokens_BHC: Tensor) -> Tensor:
    rows = _rows(x_BHSD, tokens_BHC)
    return x_BHSD.flatten(0, 2).index_select(0, rows).view(*tokens_BHC.shape, -1)


def _add(total_BHSD: Tensor, tokens_BHC: Tensor, x_BHCD: Tensor) -> None:
    # Columns that do not count carry zeros, so it does not matter where they go.
    total_BHSD.flatten(0, 2).index_add_(0, _rows(total_BHSD, tokens_BHC), x_BHCD.flatten(0, 2))


def _rows(x_BHSD: Tensor, tokens_BHC: Tensor) -> Tensor:
    """Tokens counted over all batches and heads: whole rows are moved faster than single numbers."""
    batch, heads, num_tokens, _ = x_BHSD.shape
    first = torch.arange(0, batch * heads * num_tokens, num_tokens, device=tokens_BHC.device)
    return (first.view(batch, heads, 1) + tokens_BHC).flatten()
