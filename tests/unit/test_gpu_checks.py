"""Checks that the GPU suite makes of its machine, asked of this one; and that tests see no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import conftest
import pytest
import torch
from torch import nn

from benchmarks.gpu_checks import loopback_is_up, rms_norm_jvp_error

HERE = Path(__file__).parent
GPU_TESTS = HERE.parent / "gpu"


@pytest.mark.parametrize("flags, is_up", [("0x9\n", True), ("0x8\n", False), ("0x1003", True), (None, False)])
def test_loopback(flags: str | None, is_up: bool, tmp_path: Path) -> None:
    if flags is not None:
        (tmp_path / "flags").write_text(flags)
    assert loopback_is_up(tmp_path / "flags") is is_up


def test_the_derivative_of_the_norm_is_checked() -> None:
    assert rms_norm_jvp_error("cpu") < 1e-5
    assert rms_norm_jvp_error("cpu", torch.bfloat16) < 2e-2
    forward = nn.RMSNorm.forward

    def wrong(norm: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
        out = forward(norm, x)
        return out if out.dtype == torch.float64 else 0.999 * out

    with patch.object(nn.RMSNorm, "forward", wrong):
        assert rms_norm_jvp_error("cpu") > 5e-4


def test_the_gpu_is_hidden_here_and_from_subprocesses() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
    child = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    assert subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout.strip() == "''"


@pytest.mark.parametrize(
    "paths, markers, is_shown",
    [
        ([GPU_TESTS], "", True),
        ([f"{GPU_TESTS / 'test_kernels_gpu.py'}::test_lists"], "", True),
        ([HERE.parent], "gpu", True),
        ([GPU_TESTS, HERE], "", False),
        ([HERE.parent], "", False),
        ([HERE.parent], "not nightly and not gpu", False),
        ([], "", False),
    ],
)
def test_only_sessions_of_gpu_tests_see_the_gpu(paths: list[Path | str], markers: str, is_shown: bool) -> None:
    assert conftest.shows_gpu(list(map(str, paths)), markers, HERE) is is_shown
