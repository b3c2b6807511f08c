"""The claimed device sees planted faults and waits, and nothing where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from claimed_device import ClaimedDevice, claimed_device, is_on_gpu
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from titan_distill.diffusion.transfer import to_device

MIXED: dict[str, Callable[[Tensor], object]] = {
    "a vector of the host times a matrix": lambda x: torch.tensor([0.1, 0.2]).view(2, 1) * x,
    "a table of the host, indexed from the GPU": lambda x: torch.arange(4.0)[x.argmax(1)],
    "cat": lambda x: torch.cat([x, torch.zeros(1, 3)]),
    "stack, which takes no scalars of the host": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "weights on the host": lambda x: F.linear(x, torch.randn(4, 3)),
    "index_select from the host": lambda x: x.index_select(0, torch.tensor([1])),
    "a mask on the host": lambda x: torch.where(torch.tensor([[True], [False]]), x, 0.0),
    "numpy": lambda x: x.numpy(),
}
WAITS: dict[str, Callable[[Tensor], object]] = {
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "to the host": lambda x: x.cpu(),
    "to the GPU": lambda x: torch.ones(2).to(x.device),
    "to the GPU from pageable memory": lambda x: torch.ones(2).to("cuda", non_blocking=True),
    "to the GPU from pinned memory, blocking": lambda x: torch.ones(2).pin_memory().to("cuda"),
    "copy_ from the host": lambda x: x.copy_(torch.ones(2, 3)),
    "a tensor of Python's numbers": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "nonzero": lambda x: x.nonzero(),
    "a mask as an index": lambda x: x[x > 0],
    "indices on the host": lambda x: x[torch.tensor([0, 1])],
    "unique": lambda x: x.unique(),
    "synchronize": lambda x: torch.cuda.synchronize(),
}
ALLOWED: dict[str, Callable[[Tensor], object]] = {
    "a scalar of the host": lambda x: torch.tensor(0.1) * x,
    "a pinned copy": lambda x: torch.ones(2).pin_memory().to("cuda", non_blocking=True) * x[:, 0],
    "to_device": lambda x: to_device(torch.ones(2), x.device) * to_device(x, "cuda")[:, 0],
    "factories": lambda x: x + torch.ones(3, device=x.device) + torch.zeros_like(x) + x.new_full((3,), 2.0),
    "a backward": lambda x: F.linear(x, torch.ones(3, 3, device="cuda", requires_grad=True)).square().sum().backward(),
    "an index on the GPU": lambda x: x[x.argmax(0)],
    "a move of a module": lambda x: torch.nn.Linear(3, 2).to("meta").to_empty(device="cuda")(x),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "a step": lambda x: _step(x),
}


def _step(x: Tensor) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 3, device="cuda"))
    optimizer = torch.optim.AdamW([weight], fused=True)
    (x @ weight).sum().backward()
    norm = torch.nn.utils.get_total_norm([weight.grad])
    torch.nn.utils.clip_grads_with_norm_([weight], 1.0, norm)
    optimizer.step()


def run(case: Callable[[Tensor], object]) -> ClaimedDevice:
    with claimed_device() as device:
        x = torch.randn(2, 3, device="cuda")
        case(x)
    return device


@pytest.mark.parametrize("name", MIXED)
def test_a_planted_mixture_is_found(name: str) -> None:
    assert len(run(MIXED[name]).faults) == 1


@pytest.mark.parametrize("name", WAITS)
def test_a_planted_wait_is_found(name: str) -> None:
    device = run(WAITS[name])
    assert len(device.waits) == 1 and not device.faults


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_gpu_allows_is_no_fault(name: str) -> None:
    device = run(ALLOWED[name])
    assert not device.faults and not device.waits


def test_a_tangent_goes_where_its_tensor_goes() -> None:
    host = torch.arange(3.0)
    with claimed_device() as device, forward_ad.dual_level():
        moved = to_device(forward_ad.make_dual(host, host + 1), "cuda")
        assert not device.waits
        primal, tangent = forward_ad.unpack_dual(moved)
        assert is_on_gpu(primal) and is_on_gpu(tangent) and torch.equal(tangent.cpu(), host + 1)


def test_numbers_are_true_and_marks_follow_the_data() -> None:
    host = torch.randn(4, 3)
    with claimed_device():
        there = host.to("cuda")
        assert str(there.device) == "cuda:0" and there.is_cuda and not there.is_cpu and str(host.device) == "cpu"
        result = (there[1:].t() @ there[1:]).exp()
        assert is_on_gpu(result) and is_on_gpu(result.double()) and not is_on_gpu(result.cpu())
        there.zero_()
    assert torch.equal(result, (host[1:].t() @ host[1:]).exp()) and bool(host.any())
    assert str(result.device) == "cpu" and not torch.cuda.is_available()
