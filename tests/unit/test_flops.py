"""FLOPs of the published sizes (docs/algorithms.md, "FLOPs of a forward"), and against torch's own count."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titan_distill.models.wan.config import FLAVORS
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.observability.flops import (
    Work,
    WorkCounter,
    forward_flops,
    peak_flops,
    peak_flops_by_name,
    utilization,
)

TERA = 1e12


@pytest.mark.parametrize(
    ("flavor", "num_tokens", "linear", "self_attention", "cross_attention", "total"),
    [
        ("1.3B", 32_760, 81.9, 197.8, 3.1, 283.0),
        ("1.3B", 75_600, 189, 1053, 7.1, 1250),
        ("14B", 32_760, 783, 879, 13.7, 1678),
        ("14B", 75_600, 1807, 4682, 31.7, 6523),
        ("5B", 27_280, 237, 274, 5.2, 517.0),
    ],
)
def test_published_sizes(
    flavor: str, num_tokens: int, linear: float, self_attention: float, cross_attention: float, total: float
) -> None:
    config = FLAVORS[flavor]
    flops = forward_flops(config, num_tokens)
    # The table's cross column leaves out the keys and values of the text, its total does not.
    text_keys = 4 * 512 * config.inner_dim**2 * config.num_layers
    assert flops.linear / TERA == pytest.approx(linear, abs=_half_digit(linear))
    assert flops.self_attention / TERA == pytest.approx(self_attention, abs=_half_digit(self_attention))
    assert (flops.cross_attention - text_keys) / TERA == pytest.approx(cross_attention, abs=0.06)
    assert flops.total / TERA == pytest.approx(total, abs=_half_digit(total))


def _half_digit(value: float) -> float:
    """Half a unit in the last printed place."""
    return 0.05 if isinstance(value, float) else 0.5


def test_tiny_wan_equals_torchs_own_count() -> None:
    config = FLAVORS["tiny"]
    model = WanTransformer(config)
    # torch counts attention where it is plain matrix products, not inside its fused CPU kernel.
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(1, 16, 5, 12, 12), torch.zeros(1), torch.zeros(1, 64, config.text_dim))
    assert forward_flops(config, num_tokens=5 * 6 * 6, num_text_tokens=64).total == counted.get_total_flops()


def test_dmd2_updates_cost_what_their_passes_cost() -> None:
    """The student update of docs/algorithms.md, "FLOPs of an update", with full activation checkpointing."""
    student, teacher = (forward_flops(FLAVORS[name], 32_760).total for name in ("1.3B", "14B"))
    counter = WorkCounter(tokens_per_sample=32_760)
    for exit_step in range(4):  # uniform over four exits: 0..3 forwards without gradient, one with
        for _ in range(exit_step):
            counter.forward(student, backward=False, recompute=True)
        counter.forward(student, backward=True, recompute=True)
        counter.forward(student, backward=False, recompute=True)  # the critic, of the student's size
        counter.forward(2 * teacher, backward=False, recompute=True)
    work = counter.drain()
    assert work.hardware_flops / 4 / TERA == pytest.approx(5196, rel=1e-3)
    assert (work.hardware_flops - work.model_flops) / 4 == pytest.approx(student)
    assert counter.drain() == Work()


def test_validation_is_not_counted() -> None:
    counter = WorkCounter(tokens_per_sample=1)
    with counter.paused():
        counter.forward(1.0, backward=False, recompute=False)
    counter.forward(2.0, backward=False, recompute=False)
    assert counter.drain() == Work(2.0, 2.0)


def test_peaks_by_device_name() -> None:
    assert peak_flops_by_name("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops_by_name("NVIDIA H100 PCIe") == 756e12
    assert peak_flops_by_name("NVIDIA H200") == 989e12
    assert peak_flops_by_name("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops_by_name("NVIDIA B200") == 2250e12
    assert peak_flops_by_name("NVIDIA GeForce GTX 970") is None
    assert peak_flops(torch.device("cpu")) is None


def test_utilization_is_a_share_of_the_peak_and_absent_without_one() -> None:
    work = Work(model_flops=200 * TERA, hardware_flops=300 * TERA)
    assert utilization(work, 2.0, 400 * TERA) == {"tflops": 100.0, "mfu": 0.25, "hfu": 0.375}
    assert utilization(work, 2.0, None) == {"tflops": 100.0}
