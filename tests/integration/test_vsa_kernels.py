"""The attention kernels in Triton's interpreter against their fp64 twins: edges, shapes, scales, strides, dtypes.

One process runs every case (`vsa_kernel_worker`); a test looks at one of its answers. bf16 is left to the GPU: the
interpreter multiplies its bits as integers.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
from runs import HELPERS

WORKER = HELPERS / "vsa_kernel_worker.py"

CASES: dict[str, dict[str, Any]] = {
    "whole tiles": {"grid": (4, 8, 8), "heads": 2, "dim": 16, "topk": 2},
    "one ragged axis": {"grid": (5, 4, 8), "heads": 2, "dim": 16, "topk": 2},
    "two ragged axes": {"grid": (5, 6, 4), "heads": 1, "dim": 64, "topk": 2},
    "three ragged axes": {"grid": (5, 6, 3), "heads": 2, "dim": 16, "topk": 3, "batch": 2, "twice": True},
    "every tile listed": {"grid": (5, 6, 4), "heads": 1, "dim": 16, "topk": 4},
    "sparsity 0.97": {"grid": (1, 12, 44), "heads": 1, "dim": 16, "topk": 1},
    "one tile listed": {"grid": (3, 7, 5), "heads": 1, "dim": 16, "topk": 1},
    "twelve heads": {"grid": (5, 3, 3), "heads": 12, "dim": 16, "topk": 1},
    "head dim 40": {"grid": (3, 5, 4), "heads": 2, "dim": 40, "topk": 2},
    "head dim 128": {"grid": (5, 4, 4), "heads": 1, "dim": 128, "topk": 2},
    "a tile that nobody chose": {"grid": (4, 8, 6), "heads": 2, "dim": 16, "topk": 2, "unselected": 1},
    "the last tile not chosen": {"grid": (4, 8, 6), "heads": 1, "dim": 16, "topk": 1, "unselected": 3},
    "two tiles share a list": {"grid": (5, 8, 4), "heads": 1, "dim": 16, "topk": 2, "join": 2, "dtype": "float16"},
    "joined, an odd tile left": {"grid": (4, 4, 11), "heads": 1, "dim": 64, "topk": 2, "join": 2, "dtype": "float16"},
    "a run of query tiles": {"grid": (4, 8, 7), "heads": 2, "dim": 16, "topk": 2, "run": (1, 3)},
    "heads before tokens": {"grid": (3, 6, 4), "heads": 2, "dim": 16, "topk": 2, "strided": True, "batch": 2},
    "tiles of 128 tokens": {"grid": (9, 4, 5), "tile": (8, 4, 4), "heads": 1, "dim": 16, "topk": 2, "dtype": "float16"},
    "3 × 5 × 4, whole": {"grid": (3, 10, 4), "tile": (3, 5, 4), "heads": 1, "dim": 16, "topk": 1},
    "3 × 5 × 4, ragged": {"grid": (4, 6, 3), "tile": (3, 5, 4), "heads": 1, "dim": 16, "topk": 2},
    "7 × 3 × 3, whole": {"grid": (7, 3, 6), "tile": (7, 3, 3), "heads": 1, "dim": 16, "topk": 1},
    "7 × 3 × 3, ragged": {"grid": (7, 4, 4), "tile": (7, 3, 3), "heads": 1, "dim": 16, "topk": 2},
    "2 × 8 × 8, whole": {"grid": (2, 8, 16), "tile": (2, 8, 8), "heads": 1, "dim": 16, "topk": 1},
    "2 × 8 × 8, ragged": {"grid": (3, 8, 9), "tile": (2, 8, 8), "heads": 1, "dim": 16, "topk": 2},
    "tiles of 12 tokens": {"grid": (5, 3, 4), "tile": (2, 3, 2), "heads": 1, "dim": 16, "topk": 3},
    "fp16, d 128": {"grid": (5, 4, 4), "heads": 1, "dim": 128, "topk": 2, "dtype": "float16", "twice": True},
    "fp16, small inputs": {"grid": (3, 6, 4), "heads": 1, "dim": 64, "topk": 2, "dtype": "float16", "scale": 0.1},
    "fp16, large inputs": {"grid": (3, 6, 4), "heads": 1, "dim": 64, "topk": 2, "dtype": "float16", "scale": 10},
    "small inputs": {"grid": (3, 6, 4), "heads": 1, "dim": 64, "topk": 2, "scale": 0.1},
    "large inputs": {"grid": (3, 6, 4), "heads": 1, "dim": 64, "topk": 2, "scale": 10},
    "huge inputs": {"grid": (3, 6, 4), "heads": 1, "dim": 64, "topk": 2, "scale": 50},
    "copy engine": {
        "grid": (3, 6, 5),
        "heads": 2,
        "dim": 16,
        "topk": 2,
        "batch": 2,
        "candidate": {"tma": True},
        "dtype": "float16",
    },
    "persistent": {"grid": (3, 6, 5), "heads": 2, "dim": 16, "topk": 2, "batch": 2, "candidate": {"persistent": 3}},
}


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Any]]:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(WORKER), json.dumps(list(CASES.values()))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


def bound(case: dict[str, Any]) -> float:
    """Relative to an output's largest value.

    At input scales 10 and 50 scores reach 1e3 and 2e4, and rounding one in fp32 changes its exponential by 1e-4 and
    2e-3: PyTorch's fp32 attention is off by up to 7e-5 in the case of scale 10, the kernels by up to 2e-5.
    """
    if case.get("dtype") == "float16":
        return 1e-2
    return {50: 5e-3, 10: 5e-5}.get(case.get("scale", 1), 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_fp64_twin(answers: dict[str, dict[str, Any]], name: str) -> None:
    for output in ("out", "lse", "grad_q", "grad_k", "grad_v"):
        error = answers[name][output]
        # A NaN would be an element that no kernel wrote.
        assert not math.isnan(error) and error <= bound(CASES[name]), output


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "twice" in case])
def test_two_runs_are_bitwise_equal(answers: dict[str, dict[str, Any]], name: str) -> None:
    assert answers[name]["repeats"]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "unselected" in case])
def test_keys_that_nobody_chose_get_zeros(answers: dict[str, dict[str, Any]], name: str) -> None:
    assert answers[name]["zeros"]
