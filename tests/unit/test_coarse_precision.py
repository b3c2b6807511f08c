"""Precision of the coarse branch: exact for models in fp32, products of bf16 parts for those in 16 bits on a GPU.

No GPU is needed to know how exact such products are: the parts are made here as Triton makes them, and multiplied in
fp32.
"""

from __future__ import annotations

import math

import pytest
import torch
from titan_kernels import attention, reference, tile_layout, video_sparse_attention
from titan_kernels.tuning import Shape
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from vsa_oracle import GRIDS, NAMES, Oracle, error, random_inputs, run

GRID = GRIDS["three axes ragged"]


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def by_parts(a: Tensor, b: Tensor) -> Tensor:
    """Three products of the parts of two numbers each; the smallest of the four is left out."""
    a_large, b_large = rounded(a), rounded(b)
    return a_large @ b_large + (a_large @ rounded(b - b_large) + rounded(a - a_large) @ b_large)


def once_rounded(a: Tensor, b: Tensor) -> Tensor:
    return rounded(a) @ rounded(b)


class Product(torch.autograd.Function):
    """A matrix product whose backward multiplies in the same way."""

    @staticmethod
    def forward(ctx, a, b, multiply):
        ctx.save_for_backward(a, b)
        ctx.multiply = multiply
        return multiply(a, b)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return ctx.multiply(grad, b.mT), ctx.multiply(a.mT, grad), None


def emulated(multiply):
    """`coarse_attention` with other products."""

    def coarse(q: Tensor, k: Tensor, v: Tensor, exact: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        weights = (Product.apply(q, k.mT, multiply) / math.sqrt(q.shape[-1])).softmax(-1)
        return Product.apply(weights, v, multiply).transpose(1, 2)

    return coarse


def errors(coarse, scale: float, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, float], float]:
    """Distances of output and gradients of the whole operator in bf16 from the definition, and their bound."""
    monkeypatch.setattr(attention, "coarse_attention", coarse)
    layout, oracle = tile_layout(GRID), Oracle(GRID)
    inputs, grad = random_inputs(GRID, 2, 128, torch.bfloat16, scale)
    topk = layout.num_tiles // 3
    expected = oracle(inputs, grad, topk)
    limit = oracle.limit(inputs, grad, topk, 1e-2) if scale > 1 else 1e-2
    actual = run(video_sparse_attention, layout, inputs, grad, topk)
    return dict(zip(NAMES, map(error, actual, expected))), limit


@pytest.mark.parametrize("scale", [0.1, 1, 7, 50])
def test_products_of_parts_keep_the_bounds_and_all_but_the_errors_of_exact_ones(scale, monkeypatch):
    exact, limit = errors(attention.coarse_attention, scale, monkeypatch)
    parts, _ = errors(emulated(by_parts), scale, monkeypatch)
    assert all(parts[name] <= min(limit, 1.05 * exact[name]) for name in NAMES), (parts, exact, limit)


def test_means_rounded_to_bf16_would_break_the_bound(monkeypatch):
    found, limit = errors(emulated(once_rounded), 50, monkeypatch)
    assert max(found.values()) > limit


@pytest.mark.parametrize("scale, worst", [(1, 5e-6), (50, 3e-4)])
def test_error_of_the_coarse_output_alone(scale, worst):
    layout = tile_layout(GRID)
    (q, k, v, _), _ = random_inputs(GRID, 2, 128, torch.bfloat16, scale)
    pooled = reference.tile_pool(q, k, v, layout.tiles(), layout.tiles())
    expected = emulated(torch.matmul)(*(x.double() for x in pooled), True)
    assert error(emulated(by_parts)(*pooled, False), expected) < worst


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_models_in_fp32_ask_for_exact_products(dtype, monkeypatch):
    asked: list[tuple[torch.dtype, bool]] = []
    for name in ("vsa_forward", "vsa_backward"):
        twin = getattr(reference, name)

        def noted(q, *others, twin=twin):
            asked.append((q.dtype, others[-1] if isinstance(others[-1], bool) else True))  # a default may be left out
            return twin(q, *others)

        monkeypatch.setattr(reference, name, noted)
    inputs, grad = random_inputs((3, 4, 5), 1, 16, dtype)
    run(video_sparse_attention, tile_layout((3, 4, 5)), inputs, grad, 1)
    wide = torch.promote_types(dtype, torch.float32)
    assert [exact for kind, exact in asked if kind == wide][-2:] == [dtype.itemsize > 2] * 2
    assert len(asked) == 4


@pytest.mark.parametrize(
    "dtype, exact, expected",
    [
        (torch.bfloat16, False, ("ieee", 128, 64)),
        (torch.float32, True, ("ieee", 32, 32)),
        (torch.float32, False, ("bf16x3", 64, 64)),
    ],
)
def test_the_launch_on_a_gpu(dtype, exact, expected):
    tiles, lists = tile_layout((4, 4, 8), (4, 4, 8)).tiles(), torch.zeros(1, 2, 1, 1, dtype=torch.int32)
    with FakeTensorMode():
        q = torch.empty(1, 128, 2, 64, dtype=dtype, device="cuda")
    shape = Shape.of(q, lists, tiles, tiles, exact)
    of_keys = shape.of_keys(tiles, tiles)
    assert (shape.precision, shape.block_m, shape.block_n) == expected
    assert shape.constants["PRECISION"] == of_keys.constants["PRECISION"] == expected[0]
    most = 64 if dtype == torch.bfloat16 else 32
    assert (of_keys.block_m, of_keys.block_n) == (most, most) and of_keys.q_chunks == of_keys.kv_chunks == 128 // most


def test_the_interpreter_multiplies_exactly():
    tiles = tile_layout((4, 4, 4)).tiles()
    shape = Shape.of(torch.empty(1, 64, 1, 16), torch.zeros(1, 1, 1, 1, dtype=torch.int32), tiles, tiles, False)
    assert shape.precision == "ieee"
