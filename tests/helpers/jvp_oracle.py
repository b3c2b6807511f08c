"""Attention's forward-mode derivative by PyTorch, of attention as it is defined and in fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from vsa_oracle import error

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def random_inputs(
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    scale: float = 1.0,
    batch: int = 2,
    device: str = "cpu",
) -> list[Tensor]:
    """q, k, v and their tangents."""
    generator = torch.Generator().manual_seed(queries + keys + head_dim)
    lengths = (queries, keys, keys) * 2
    return [
        (scale * torch.randn(batch, n, heads, head_dim, generator=generator, dtype=torch.float64)).to(device, dtype)
        for n in lengths
    ]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("blhd,bshd->bhls", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("bhls,bshd->blhd", weights, v)


def oracle(tensors: list[Tensor], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    q, k, v, *tangents = (x.to(dtype) for x in tensors)
    return torch.func.jvp(plain, (q, k, v), tuple(tangents))


def check(attention, tensors: list[Tensor], scale: float, *, still: bool = False) -> None:
    dtype = tensors[0].dtype
    if still:
        tensors = [*tensors[:4], *map(torch.zeros_like, tensors[4:])]
    actual = attention(*tensors[:4], *((None, None) if still else tensors[4:]))
    expected = oracle(tensors)
    limits = [TOLERANCE[dtype]] * 2
    if scale > 1:  # a softmax is nearly a choice of one key: no arithmetic stays within these bounds
        theirs = (error(*each) for each in zip(oracle(tensors, dtype), expected))
        # NaN where PyTorch's own derivative overflows fp16.
        limits = [math.inf if math.isnan(x) else max(TOLERANCE[dtype], 2 * x) for x in theirs]
    errors = list(map(error, actual, expected))
    assert all(x <= limit for x, limit in zip(errors, limits)), (errors, limits)
    assert [x.dtype for x in actual] == [dtype] * 2 and all(x.is_contiguous() for x in actual)
