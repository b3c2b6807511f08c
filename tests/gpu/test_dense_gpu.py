"""Dense attention on a GPU: the kernel that a run names is the one that runs, compiled and recomputed as well."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from titan_distill.attention.dense import BACKENDS, dense_attention, dense_backend, order_backends, set_order

OPERATORS = {
    SDPBackend.CUDNN_ATTENTION: "aten::_scaled_dot_product_cudnn_attention",
    SDPBackend.FLASH_ATTENTION: "aten::_scaled_dot_product_flash_attention",
    SDPBackend.EFFICIENT_ATTENTION: "aten::_scaled_dot_product_efficient_attention",
}


@pytest.fixture(autouse=True)
def order() -> Iterator[None]:
    before = torch._C._get_sdp_priority_order()
    yield
    torch._C._set_sdp_priority_order(before)


@pytest.mark.parametrize("first", OPERATORS)
def test_the_order_holds_everywhere(first):
    device = torch.device("cuda")
    set_order([first])
    if dense_backend(12, 128, torch.bfloat16, device, True) != BACKENDS[first]:
        pytest.skip(f"PyTorch has no {BACKENDS[first]} here")
    x_BLHD = torch.randn(1, 1000, 12, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(dense_attention, backend="aot_eager", fullgraph=True)
    for run in (dense_attention, compiled, lambda *qkv: checkpoint(dense_attention, *qkv, use_reentrant=False)):
        with torch.profiler.profile() as profile:
            run(x_BLHD, x_BLHD, x_BLHD).float().sum().backward()
        names = {event.key for event in profile.key_averages()}
        assert {name for name in OPERATORS.values() if name in names} == {OPERATORS[first]}
        assert f"{OPERATORS[first]}_backward" in names


def test_hopper_takes_cudnn():
    device = torch.device("cuda")
    if torch.cuda.get_device_capability() < (9, 0) or torch.backends.cudnn.version() < 91501:
        pytest.skip("needs Hopper or later and cuDNN 9.15.1")
    order_backends(device)
    assert dense_backend(12, 128, torch.bfloat16, device, True) == "cuDNN"
    assert dense_backend(12, 128, torch.float32, device, True) != "cuDNN"
