"""Copies to the GPU for which the host does not wait, the choice of experts, and what the machine must offer.

Needs torch and pytest only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from benchmarks.gpu_checks import loopback_is_up, rms_norm_jvp_error
from titan_distill.diffusion import schedule
from titan_distill.diffusion.transfer import to_device
from titan_distill.models.wan.experts import is_high_noise, route


@contextmanager
def waiting_refused() -> Iterator[None]:
    """PyTorch raises where the host would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_loopback_is_up() -> None:
    assert loopback_is_up(), "gloo needs the interface lo; `ip link set lo up`"


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_the_fused_norm_has_the_derivative_of_the_norm(dtype: torch.dtype, limit: float) -> None:
    assert rms_norm_jvp_error("cuda", dtype) < limit


def test_the_host_does_not_wait_for_a_copy() -> None:
    x, sigma_B = torch.randn(3, 5, device="cuda"), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    with pytest.raises(RuntimeError), waiting_refused():
        sigma_B.to("cuda")
    with waiting_refused():
        moved = schedule.add_noise(x, x, sigma_B)
        again = to_device(sigma_B, "cuda")
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(to_device(forward_ad.make_dual(sigma_B, sigma_B + 1), "cuda")).tangent
    torch.testing.assert_close(moved, x)
    assert torch.equal(again.cpu(), sigma_B) and torch.equal(tangent.cpu(), sigma_B + 1)


def test_pinned_memory_is_not_used_again_before_its_copy_is_done() -> None:
    torch.cuda._sleep(100_000_000)  # what the copies queue behind
    moved = [to_device(torch.full((4,), float(number)), "cuda") for number in range(200)]
    assert torch.equal(torch.stack(moved)[:, 0].cpu(), torch.arange(200.0))


@pytest.mark.parametrize("run_both", [False, True])
def test_the_host_does_not_wait_to_choose_experts(run_both: bool) -> None:
    x, sigma_B = torch.randn(4, 2, 3, 1, 1, device="cuda"), torch.tensor([0.9, 0.2, 0.3, 0.95], dtype=torch.float64)

    def expert(factor: float):
        def run(x: Tensor, sigma: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
            return schedule.add_noise(x, factor * condition["text"].view(-1, 1, 1, 1, 1).expand_as(x), sigma)

        return run

    condition = {"text": torch.arange(4.0, device="cuda")}
    with waiting_refused():
        both = expert(1.0), expert(-1.0)
        high_B = is_high_noise(sigma_B, 0.875)
        found = route(both, high_B, x, sigma_B, condition, run_both=run_both, dummy_frames=1)
    sign_B = torch.tensor([1.0, -1.0, -1.0, 1.0]).cuda()
    noise = (sign_B * condition["text"]).view(-1, 1, 1, 1, 1).expand_as(x)
    torch.testing.assert_close(found, schedule.add_noise(x, noise, sigma_B))
