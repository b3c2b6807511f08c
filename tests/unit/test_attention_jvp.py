"""Attention's forward-mode derivative: operator and twin against PyTorch's derivative of plain attention in fp64."""

from __future__ import annotations

import pytest
import torch
from jvp_oracle import TOLERANCE, check, oracle, random_inputs
from titan_kernels import attention_jvp, ops, reference
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from vsa_oracle import error

from titan_distill.attention.dense import dense_attention

PUBLIC = {"operator": attention_jvp, "twin": reference.attention_jvp}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [0.1, 1, 7, 50])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_derivative_for_every_head_dim_scale_and_dtype(head_dim, scale, dtype) -> None:
    check(attention_jvp, random_inputs(37, 53, 2, head_dim, dtype, scale), scale)


@pytest.mark.parametrize("attention", PUBLIC.values(), ids=PUBLIC)
@pytest.mark.parametrize("still", [False, True])
def test_chunks_and_lengths(attention, still, monkeypatch) -> None:
    monkeypatch.setattr(reference, "_SCORES", 1000)
    for queries, keys in ((1, 2), (1, 70), (70, 2), (65, 129)):
        check(attention, random_inputs(queries, keys, 3, 16, torch.float64), 1, still=still)


def test_dual_tensors_get_the_derivative() -> None:
    q, k, v, *tangents = random_inputs(21, 33, 2, 16, torch.float64)
    expected = oracle([q, k, v, *tangents])
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(dense_attention(*map(forward_ad.make_dual, (q, k, v), tangents)))
        assert max(map(error, dual, expected)) < 1e-12
    assert max(map(error, torch.func.jvp(dense_attention, (q, k, v), tuple(tangents)), expected)) < 1e-12


@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_what_has_no_tangent_stands_still(moving) -> None:
    tensors = random_inputs(21, 33, 2, 16, torch.float64)
    tangents = [x if index in moving else torch.zeros_like(x) for index, x in enumerate(tensors[3:])]
    with forward_ad.dual_level():
        inputs = [forward_ad.make_dual(x, tangents[i]) if i in moving else x for i, x in enumerate(tensors[:3])]
        dual = forward_ad.unpack_dual(dense_attention(*inputs))
    assert max(map(error, dual, oracle([*tensors[:3], *tangents]))) < 1e-12


def test_operator_keeps_what_it_declares() -> None:
    q, k, v, *tangents = random_inputs(21, 33, 2, 16, torch.float32)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    operator = torch.ops.titan_kernels.attention_jvp.default
    torch.library.opcheck(operator, (q, k, v, *tangents))
    torch.library.opcheck(operator, (*by_head, tangents[0], None, None))


def test_flops_are_those_of_six_products_or_four() -> None:
    q, k, v, *tangents = random_inputs(8, 12, 3, 16, torch.float32)
    product = 2 * 2 * 3 * 8 * 12 * 16
    for number, given in ((6, tangents), (4, [tangents[0], None, None])):
        with FlopCounterMode(display=False) as counter:
            ops.attention_jvp(q, k, v, *given)
        assert counter.get_total_flops() == number * product


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def test_nothing_as_large_as_the_scores_exists() -> None:
    tensors = random_inputs(4096, 4096, 1, 16, torch.float32, batch=1)
    with Largest() as largest:
        reference.attention_jvp(*tensors)
    assert largest.numel <= 4096**2 // 4
    with Largest() as largest:
        oracle(tensors, torch.float32)
    assert largest.numel >= 4096**2


BAD_INPUT = {
    "q has shape": lambda q: (q[0], q, q, q),
    r"k is torch.float32 \(1, 8, 1, 16\)": lambda q: (q, q[:, :, :1], q, q),
    "v is torch.float64": lambda q: (q, q, q.double(), q),
    r"tangent_q is torch.float32 \(1, 7, 2, 16\)": lambda q: (q, q, q, q[:, :7]),
    "tangent_v is torch.float16": lambda q: (q, q, q, q, q, q.half()),
    "give both tangent_k and tangent_v, or neither": lambda q: (q, q, q, q, q),
    "q has head dim 8": lambda q: (q[..., :8],) * 4,
    "q is torch.int64": lambda q: (q.long(),) * 4,
}


@pytest.mark.parametrize("sentence", BAD_INPUT)
def test_bad_input_is_named(sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        attention_jvp(*BAD_INPUT[sentence](torch.zeros(1, 8, 2, 16)))
