"""Training the real tiny Wan with exact derivatives: by `titan_kernels.attention_jvp`, or by PyTorch's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.nn.functional as F
from runs import REPOSITORY, read_metrics, tiny_argv
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from titan_distill.attention import dense
from titan_distill.models.wan import layers
from titan_distill.train import main

OWN = ("--method_config.derivative_step", "0", "--method_config.tangent_warmup", "1")


def torch_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """Plain attention, which PyTorch differentiates in either mode."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))).transpose(1, 2)


def curve(method: str, output: Path) -> dict[str, float]:
    """Losses and tangents of three steps, by step and name."""
    small = ("--training.steps", "3", "--training.global_batch_size", "2", "--training.local_batch_size", "2")
    assert main(tiny_argv(method, output, *small, *OWN)) == 0
    names = ("loss/", "tangent_size")
    lines = read_metrics(output)
    return {
        f"{line['step']} {name}": value
        for line in lines
        for name, value in line.items()
        if any(part in name for part in names)
    }


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["scm", "rcm"])
def test_training_is_that_of_torchs_derivative(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    calls = []
    operator = dense.titan_kernels.attention_jvp
    monkeypatch.setattr(dense.titan_kernels, "attention_jvp", lambda *x: calls.append(x[0].shape) or operator(*x))
    ours = curve(method, tmp_path / "ours")
    num_calls = len(calls)
    for module in (dense, layers):
        monkeypatch.setattr(module, "dense_attention", torch_attention)
    expected = curve(method, tmp_path / "torch")
    assert num_calls >= 3 and len(calls) == num_calls, "the second run has only PyTorch's derivative"
    assert any("tangent_size" in name for name in ours) and any("loss/student" in name for name in ours)
    assert ours == pytest.approx(expected, rel=1e-5)
