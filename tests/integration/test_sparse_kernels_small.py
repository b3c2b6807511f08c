"""The Triton kernels without a GPU: run by Triton's interpreter, and what a launch would compile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from runs import HELPERS
from titan_kernels import ops, tile_layout, video_sparse_attention
from vsa_oracle import random_inputs, run


def test_kernels_in_tritons_interpreter():
    """In a process of its own: at import Triton decides for good whether it interprets or compiles."""
    cases = HELPERS / "kernels_in_interpreter.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_a_schedule_of_30_sparsities_compiles_each_kernel_once(monkeypatch):
    """Launches are recorded instead of made, under the key by which Triton 3.6 to 3.9 knows a compiled kernel."""
    from titan_kernels import triton_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    keys: dict[str, set[str]] = defaultdict(set)
    backend = make_backend(GPUTarget("cuda", 90, 32))

    def record(kernel, *args, grid, warmup, **kwargs):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = bind(*args, **kwargs)
        keys[kernel.__name__].add(f"{specialization} {sorted(options.items())}")

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setattr(ops, "_kernels", lambda x: triton_kernels)
    layout = tile_layout((9, 9, 15))
    inputs, grad = random_inputs(layout.grid, 2, 16, torch.float32)
    for topk in range(1, 31):
        run(video_sparse_attention, layout, inputs, grad, topk)
    assert len(keys) >= 8
    assert {name: len(found) for name, found in keys.items()} == dict.fromkeys(keys, 1)
