"""The order in which PyTorch tries its kernels for dense attention, and what a run says of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from titan_distill.attention.dense import BACKENDS, dense_attention, dense_backend, order_backends

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def order() -> Iterator[list[int]]:
    before = torch._C._get_sdp_priority_order()
    yield before
    torch._C._set_sdp_priority_order(before)


@pytest.mark.parametrize(
    ("capability", "cudnn", "is_first"),
    [((9, 0), 91900, True), ((10, 0), 91900, True), ((9, 0), 91500, False), ((8, 0), 91900, False)],
)
def test_cudnn_comes_first_where_it_is_fast_and_right(order, capability, cudnn, is_first, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    order_backends(torch.device("cuda", 0))
    after = torch._C._get_sdp_priority_order()
    assert after == ([3, 1, 2, 0, *order[4:]] if is_first else order)


def test_cpus_keep_their_order(order) -> None:
    order_backends(CPU)
    assert torch._C._get_sdp_priority_order() == order


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_what_a_run_names_is_what_runs(backend) -> None:
    """CPUs have an order of their own, so backends are switched off here; tests/gpu has the order."""
    x_BLHD = torch.randn(1, 64, 2, 16, requires_grad=True)
    with sdpa_kernel(backend), torch.profiler.profile() as profile:
        assert dense_backend(2, 16, torch.float32, CPU, True) == BACKENDS[backend]
        dense_attention(x_BLHD, x_BLHD, x_BLHD)
    names = {event.key for event in profile.key_averages()}
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert (fused in names) == (backend == SDPBackend.FLASH_ATTENTION), names
