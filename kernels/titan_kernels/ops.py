"""PyTorch operators of the kernels, for autograd, torch.compile, activation checkpointing and FLOP counting.

Each operator has one body, which runs the Triton kernel on CUDA (and, under TRITON_INTERPRET=1, on the CPU) and the
plain-torch twin of `reference` elsewhere; both have the twin's signature. Operators take the three parts of `Tiles` one
by one, because a schema knows tensors and numbers only; the functions below take `Tiles`.

`philox_normal` draws random numbers: no gradients, no FLOPs.

FLOPs are those of the mathematics, two matrix products forward and five backward over the listed tokens of average
tiles; the split backward kernels run seven.

Shape suffixes as in `reference`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils.flop_counter import register_flop_formula

from titan_kernels import reference
from titan_kernels.layout import Tiles


def tile_pool(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, q_tiles: Tiles, kv_tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.tile_pool`, in one pass over all three."""
    return torch.ops.titan_kernels.tile_pool(q_BLHD, k_BSHD, v_BSHD, *q_tiles, *kv_tiles)


def block_topk(scores_BHNT: Tensor, topk: int) -> Tensor:
    """`reference.block_topk`; not differentiable."""
    return torch.ops.titan_kernels.block_topk(scores_BHNT, topk)


def vsa_forward(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    lists_BHNK: Tensor,
    q_tiles: Tiles,
    kv_tiles: Tiles,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """`reference.vsa_forward`; the log-sum-exp is not differentiable."""
    return torch.ops.titan_kernels.vsa_forward(q_BLHD, k_BSHD, v_BSHD, lists_BHNK, *q_tiles, *kv_tiles, exact)


def attention_jvp(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    tangent_q_BLHD: Tensor,
    tangent_k_BSHD: Tensor | None,
    tangent_v_BSHD: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_jvp`; not differentiable."""
    tensors = (q_BLHD, k_BSHD, v_BSHD, tangent_q_BLHD, tangent_k_BSHD, tangent_v_BSHD)
    return torch.ops.titan_kernels.attention_jvp(*tensors)


def gated_add(fine_BLHD: Tensor, coarse_BNHD: Tensor, gate_BLHD: Tensor, tiles: Tiles) -> Tensor:
    """`reference.gated_add`."""
    return torch.ops.titan_kernels.gated_add(fine_BLHD, coarse_BNHD, gate_BLHD, *tiles)


def philox_normal(keys_B2: Tensor, num_elements: int) -> Tensor:
    """`reference.philox_normal`."""
    return torch.ops.titan_kernels.philox_normal(keys_B2, num_elements)


def _kernels(x: Tensor) -> Any:
    """The module with the functions for this device."""
    if x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        from titan_kernels import triton_kernels

        return triton_kernels
    return reference


def _operator(schema: str) -> Callable[[Callable], CustomOpDef]:
    """Decorator: makes a function the operator of this schema, which begins with the operator's name."""
    name, parameters = schema.split("(", 1)
    return torch.library.custom_op(f"titan_kernels::{name}", mutates_args=(), schema=f"({parameters}")


_TILES = "Tensor q_start, Tensor q_length, SymInt q_longest, Tensor kv_start, Tensor kv_length, SymInt kv_longest"


def _tiles(parts: Sequence[Any]) -> tuple[Tiles, Tiles]:
    """The tiles of queries and of keys from the six arguments of `_TILES`."""
    return Tiles(*parts[:3]), Tiles(*parts[3:])


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_operator(f"tile_pool(Tensor q, Tensor k, Tensor v, {_TILES}) -> (Tensor, Tensor, Tensor)")
def _tile_pool(q: Tensor, k: Tensor, v: Tensor, *tiles: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(q).tile_pool(q, k, v, *_tiles(tiles))


@_tile_pool.register_fake
def _(q, k, v, q_start, q_length, q_longest, kv_start, kv_length, kv_longest):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(q.dtype, torch.float32)
    counts = (len(q_start), len(kv_start), len(kv_start))
    return tuple(x.new_empty(x.shape[0], n, *x.shape[2:], dtype=dtype) for x, n in zip((q, k, v), counts))


@_operator(
    f"tile_pool_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, {_TILES}, "
    "SymInt num_queries, SymInt num_keys, ScalarType dtype) -> (Tensor, Tensor, Tensor)"
)
def _tile_pool_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tiles, num_queries, num_keys, dtype = others
    return _kernels(grad_q).tile_pool_backward(grad_q, grad_k, grad_v, *_tiles(tiles), num_queries, num_keys, dtype)


@_tile_pool_backward.register_fake
def _(grad_q, grad_k, grad_v, *args):  # type: ignore[no-untyped-def]
    num_queries, num_keys, dtype = args[-3:]
    counts = (num_queries, num_keys, num_keys)
    return tuple(
        grad.new_empty(grad.shape[0], n, *grad.shape[2:], dtype=dtype)
        for grad, n in zip((grad_q, grad_k, grad_v), counts)
    )


def _save_for_pool(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, _, q_start, q_length, ctx.q_longest, kv_start, kv_length, ctx.kv_longest = inputs
    ctx.save_for_backward(q_start, q_length, kv_start, kv_length)
    ctx.sizes = (q.shape[1], k.shape[1], q.dtype)


def _pool_gradients(ctx: Any, *gradients: Tensor) -> tuple:
    q_start, q_length, kv_start, kv_length = ctx.saved_tensors
    tiles = (q_start, q_length, ctx.q_longest, kv_start, kv_length, ctx.kv_longest)
    return *torch.ops.titan_kernels.tile_pool_backward(*gradients, *tiles, *ctx.sizes), *[None] * 6


_tile_pool.register_autograd(_pool_gradients, setup_context=_save_for_pool)


@_operator("block_topk(Tensor scores, SymInt topk) -> Tensor")
def _block_topk(scores: Tensor, topk: int) -> Tensor:
    return _kernels(scores).block_topk(scores, topk)


@_block_topk.register_fake
def _(scores, topk):  # type: ignore[no-untyped-def]
    return scores.new_empty((*scores.shape[:-1], topk), dtype=torch.int32)


@_operator(f"vsa_forward(Tensor q, Tensor k, Tensor v, Tensor lists, {_TILES}, bool exact=True) -> (Tensor, Tensor)")
def _vsa_forward(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _kernels(q).vsa_forward(q, k, v, lists, *_tiles(others[:6]), *others[6:])


@_vsa_forward.register_fake
def _(q, k, v, lists, *others):  # type: ignore[no-untyped-def]
    batch, queries, heads, _ = q.shape
    lse = q.new_empty((batch, heads, queries), dtype=torch.promote_types(q.dtype, torch.float32))
    return _contiguous_like(q), lse


@_operator(
    "vsa_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor lists, "
    f"{_TILES}, bool exact=True) -> (Tensor, Tensor, Tensor)"
)
def _vsa_backward(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(grad).vsa_backward(grad, *others[:6], *_tiles(others[6:12]), *others[12:])


@_vsa_backward.register_fake
def _(grad, q, k, v, *others):  # type: ignore[no-untyped-def]
    return tuple(map(_contiguous_like, (q, k, v)))


def _save_for_vsa(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, q_start, q_length, ctx.q_longest, kv_start, kv_length, ctx.kv_longest, ctx.exact = inputs
    ctx.save_for_backward(*tensors, *output, q_start, q_length, kv_start, kv_length)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the log-sum-exp


def _vsa_gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    q, k, v, lists, out, lse, q_start, q_length, kv_start, kv_length = ctx.saved_tensors
    tiles = (q_start, q_length, ctx.q_longest, kv_start, kv_length, ctx.kv_longest)
    return *torch.ops.titan_kernels.vsa_backward(grad, q, k, v, out, lse, lists, *tiles, ctx.exact), *[None] * 8


_vsa_forward.register_autograd(_vsa_gradients, setup_context=_save_for_vsa)


@_operator(
    "attention_jvp(Tensor q, Tensor k, Tensor v, Tensor tangent_q, Tensor? tangent_k, Tensor? tangent_v) "
    "-> (Tensor, Tensor)"
)
def _attention_jvp(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _kernels(q).attention_jvp(q, *others)


@_attention_jvp.register_fake
def _(q, *others):  # type: ignore[no-untyped-def]
    return _contiguous_like(q), _contiguous_like(q)


@_operator("gated_add(Tensor fine, Tensor coarse, Tensor gate, Tensor start, Tensor length, SymInt longest) -> Tensor")
def _gated_add(fine: Tensor, coarse: Tensor, gate: Tensor, *tiles: Any) -> Tensor:
    return _kernels(fine).gated_add(fine, coarse, gate, Tiles(*tiles))


@_gated_add.register_fake
def _(fine, coarse, gate, *tiles):  # type: ignore[no-untyped-def]
    return _contiguous_like(fine)


@_operator(
    "gated_add_backward(Tensor grad, Tensor coarse, Tensor gate, Tensor start, Tensor length, SymInt longest) "
    "-> (Tensor, Tensor)"
)
def _gated_add_backward(grad: Tensor, coarse: Tensor, gate: Tensor, *tiles: Any) -> tuple[Tensor, Tensor]:
    return _kernels(grad).gated_add_backward(grad, coarse, gate, Tiles(*tiles))


@_gated_add_backward.register_fake
def _(grad, coarse, gate, *tiles):  # type: ignore[no-untyped-def]
    return _contiguous_like(coarse), _contiguous_like(gate)


def _save_for_gated_add(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, coarse, gate, start, length, ctx.longest = inputs
    ctx.save_for_backward(coarse, gate, start, length)


def _gated_add_gradients(ctx: Any, grad: Tensor) -> tuple:
    coarse, gate, start, length = ctx.saved_tensors
    tiles = (start, length, ctx.longest)
    return grad, *torch.ops.titan_kernels.gated_add_backward(grad, coarse, gate, *tiles), None, None, None


_gated_add.register_autograd(_gated_add_gradients, setup_context=_save_for_gated_add)


@_operator("philox_normal(Tensor keys, SymInt num_elements) -> Tensor")
def _philox_normal(keys: Tensor, num_elements: int) -> Tensor:
    return _kernels(keys).philox_normal(keys, num_elements)


@_philox_normal.register_fake
def _(keys, num_elements):  # type: ignore[no-untyped-def]
    return keys.new_empty((len(keys), num_elements), dtype=torch.float32)


@register_flop_formula(torch.ops.titan_kernels.vsa_forward)
def _forward_flops(q_shape, k_shape, v_shape, lists_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * _product_flops(q_shape, k_shape, lists_shape, num_key_tiles=args[3][0])


@register_flop_formula(torch.ops.titan_kernels.vsa_backward)
def _backward_flops(grad_shape, q_shape, k_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    lists_shape, num_key_tiles = args[3], args[7][0]
    return 5 * _product_flops(q_shape, k_shape, lists_shape, num_key_tiles)


@register_flop_formula(torch.ops.titan_kernels.attention_jvp)
def _jvp_flops(q_shape, k_shape, v_shape, tangent_q_shape, tangent_k_shape, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    batch, queries, heads, head_dim = q_shape
    num_products = 4 if tangent_k_shape is None else 6
    return num_products * 2 * batch * heads * queries * k_shape[1] * head_dim


def _product_flops(q_shape: Any, k_shape: Any, lists_shape: Any, num_key_tiles: int) -> int:
    """FLOPs of one matrix product between queries and their listed keys, if these lie in tiles of average length."""
    batch, queries, heads, head_dim = q_shape
    return 2 * batch * heads * queries * head_dim * lists_shape[-1] * k_shape[1] // num_key_tiles
