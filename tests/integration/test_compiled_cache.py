"""Kernels compiled ahead of time: the list holds what the benchmark launches, and the cache survives a move."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


def run(program: str, *arguments: str) -> Any:
    """The last line that a process of its own prints, as JSON: a pretended GPU is for good."""
    command = [sys.executable, "-c", program, *arguments]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


LAUNCHES = """
import json, sys
from benchmarks import attention
from benchmarks.compiled_cache import run_attention
from benchmarks.launches import SIZES
from benchmarks.pretended_gpu import PretendedGpu

def measure(grid, heads, sparsities, tile=(4, 4, 4)):
    tensors = attention.Tensors(grid, heads, "cuda", tile)
    for case in attention.plan([grid], [heads], sparsities):
        if not case.kind.startswith("sdpa"):
            work = attention.work(case, tensors)
            work.forward(), work.backward()

gpu = PretendedGpu()
run_attention(SIZES[0])
first = len(gpu.jobs)
forwards = [job.source for job in gpu.jobs.values() if job.name == "forward_kernel"]
orders = sorted({bool(source.constants[(source.fn.arg_names.index("AHEAD"),)]) for source in forwards})
measure((28, 28, 52), 16, [0.9])
unlisted = len(gpu.jobs) - first
for size in SIZES:
    run_attention(size)
listed = set(gpu.jobs)
for size in SIZES[:: int(sys.argv[1])]:
    measure(size.grid, size.heads, [0.9, 0.8, 0.95, 0.5], size.tile)
print(json.dumps([first, unlisted, len(listed), orders, [gpu.jobs[key].name for key in gpu.jobs.keys() - listed]]))
"""


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.nightly)])
def test_the_list_holds_what_the_benchmark_launches(every: int) -> None:
    first, unlisted, listed, orders, missed = run(LAUNCHES, str(every))
    assert first > 25 and listed > first
    assert unlisted > 0, "16 heads are known to need kernels that 12 do not: nothing was noted"
    assert orders == [False, True], "both orders of the forward are candidates"
    assert not missed


MOVE = """
import json, os, shutil, sys
from pathlib import Path
import torch, triton
from benchmarks import compiled_cache
from benchmarks.launches import Size
from benchmarks.pretended_gpu import TARGET, PretendedGpu

folder, work = Path(sys.argv[1]) / "made", Path(sys.argv[1])
gpu = PretendedGpu()
compiled_cache.run_attention(Size((4, 4, 8), 2, head_dim=16, dtype=torch.float32, tiles_per_list=(1,)))
jobs = [job for job in gpu.jobs.values() if job.name in ("_gated_add_kernel", "_topk_kernel")]

def found(folder):
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    with compiled_cache.watch() as found:
        for job in jobs:
            triton.compile(job.source, target=TARGET, options=job.options)
    return [len(found.hits), len(found.misses), found.rate]

number = compiled_cache.make(folder, 1, jobs)
compiled_cache.pack(folder, work / "packed.tar.xz")
folder = folder.rename(work / "renamed")
installed = compiled_cache.install(work / "packed.tar.xz", work / "installed")
after = [os.environ["TRITON_CACHE_DIR"], found(work / "installed"), compiled_cache.compiled_since(work / "installed")]
copied = found(folder)
manifest = json.loads((folder / "manifest.json").read_text())
manifest["identity"]["ptxas"] = "another"
(folder / "manifest.json").write_text(json.dumps(manifest))
compiled_cache.pack(folder, work / "other.tar.xz")
other = compiled_cache.install(work / "other.tar.xz", work / "other")
jobs = list(gpu.jobs.values())[:1]
assert jobs[0].name == "_pool_kernel"
compiled = [found(work / "other"), compiled_cache.compiled_since(work / "other")]
print(json.dumps([number, installed.matches, installed.num_kernels, after, copied, other.differences, compiled]))
"""


def test_a_cache_survives_a_move_and_says_when_it_does_not_fit(tmp_path: Path) -> None:
    number, matches, num_kernels, after, copied, differences, compiled = run(MOVE, str(tmp_path))
    assert number == num_kernels == 2 and matches
    assert after == [str(tmp_path / "installed"), [2, 0, 1.0], []]
    assert copied == [0, 2, 0.0], "Triton finds kernels in a folder that was moved: install need not write lists anew"
    assert len(differences) == 1 and differences[0].startswith("ptxas: made with another, here ")
    assert compiled == [[0, 1, 0.0], ["_pool_kernel"]]
