"""The attention kernels as machine code, built without a GPU: what every kept candidate must be, and how often a
schedule of sparsities compiles."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from runs import REPOSITORY
from titan_kernels.tuning import KEPT, Candidate
from titan_kernels.vsa_forward import forward_kernel
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from benchmarks.kernel_builds import Build, build, versions, write_table

SIXTEEN_BIT = [
    (kernel, rows, candidate) for (kernel, rows, bits), kept in KEPT.items() for candidate in kept if bits == 16
]
FIRST = [(kernel, rows, kept[0]) for (kernel, rows, bits), kept in KEPT.items() if bits == 16]

MOST_IN_LOOP = {
    ("forward", 64): {"3.6": 400, "3.7": 400},
    ("forward", 128): {"3.6": 410, "3.7": 410},
    ("grad_q", 64): {"3.6": 370, "3.7": 370},
    ("grad_q", 128): {"3.6": 360, "3.7": 360},
    ("grad_kv", 64): {"3.6": 560, "3.7": 410},
    ("jvp", 128): {"3.6": 550, "3.7": 570},
}
"""Instructions per key tile of the first candidates, by version of Triton: those found, rounded up to tens. Lower them
with the kernels. 3.6 is what GPU machines have (scripts/gpu_versions)."""


def check(kernel: str, rows: int, candidate: Candidate) -> Build:
    """Builds for sm_90 at d = 128 in bf16, and asserts."""
    built = build(kernel, candidate, 90, rows)
    assert built.mix["wgmma"] > 0
    assert built.local_bytes == 0 and built.mix["local"] == 0
    assert built.fits
    assert (built.mix["tma"] > 0) == candidate.tma
    return built


@pytest.mark.parametrize(("kernel", "rows", "candidate"), FIRST)
def test_first_candidates_use_hopper_well(kernel: str, rows: int, candidate: Candidate) -> None:
    built = check(kernel, rows, candidate)
    most = MOST_IN_LOOP[kernel, rows]
    assert 0 < built.loop <= most.get(triton.__version__[:3], max(most.values()))


@pytest.mark.nightly
def test_kept_candidates_use_hopper_well_and_differ() -> None:
    digests = [check(*each).sass for each in SIXTEEN_BIT]
    assert len(set(digests)) == len(digests)


@pytest.mark.nightly
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kept_candidates_compile_everywhere(arch: int) -> None:
    for (kernel, rows, bits), kept in KEPT.items():
        dtype = torch.bfloat16 if bits == 16 else torch.float32
        for candidate in kept:
            if arch >= 90 or not candidate.tma:
                build(kernel, candidate, arch, rows, dtype)


RESULTS = REPOSITORY / "benchmarks" / "results" / "kernel-builds-2026-11-21.tsv"


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_the_table_has_every_kept_candidate_without_spills(version: str) -> None:
    of_version = {"triton": version, "arch": "90", "dtype": "bf16"}.items()
    rows = [row for row in read_table(RESULTS) if of_version <= row.items()]
    spilled = {(row["kernel"], int(row["rows"]), row["candidate"]): int(row["local_bytes"]) for row in rows}
    assert spilled == {(kernel, rows, str(candidate)): 0 for kernel, rows, candidate in SIXTEEN_BIT}


def test_a_table_keeps_the_lines_of_other_versions(tmp_path: Path) -> None:
    path = tmp_path / "builds.tsv"
    path.write_text(RESULTS.read_text())
    mix = dict.fromkeys(("wgmma", "mma", "exp2", "float", "shared", "local", "barrier", "tma", "async_copy", "wait"), 0)
    built = Build("forward", 64, "bf16", 128, 90, Candidate(4, 2, True, persistent=2), 255, 0, 98336, 2, 1, mix, 1, "a")
    write_table(path, [built, built])
    old, new = read_table(RESULTS), read_table(path)
    assert new[0].keys() == old[0].keys()
    ours = {"triton": versions()["triton"], "ptxas": versions()["ptxas"]}
    assert new[:-2] == [row for row in old if not ours.items() <= row.items()]
    assert new[-1]["candidate"] == "4 warps, 2 stages, TMA, 2 resident"


class Hopper:
    """Stands in for a driver: says what to compile for, and has nothing to launch on."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def hopper() -> Iterator[None]:
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Hopper())
    yield
    triton.runtime.driver._active = before


def num_compiled(kernel: Any, listed: list[int]) -> int:
    """Binaries of the forward for these numbers of listed tiles."""
    kernel.device_caches.clear()
    tensors = [MockTensor(torch.bfloat16)] * 4 + [MockTensor(torch.float32)] + [MockTensor(torch.int32)] * 5
    constants = {"HEAD_DIM": 16, "BLOCK_D": 16, "BLOCK_M": 64, "BLOCK_N": 64, "Q_CHUNKS": 1, "KV_CHUNKS": 1}
    for num_listed in listed:
        sizes = (12, 30, num_listed, 1920, 1920, 360)
        constants |= {"TMA": False, "PERSISTENT": False}
        kernel.warmup(*tensors, *[192] * 9, *sizes, 1.0, **constants, grid=(1,), num_warps=4, num_stages=2)
    return len(kernel.device_caches[0][0])


def test_a_schedule_of_thirty_sparsities_compiles_once(hopper: None) -> None:
    assert num_compiled(forward_kernel, list(range(1, 31))) == 1


def test_specialised_lists_would_compile_again(hopper: None) -> None:
    specialised = triton.jit(forward_kernel.fn)
    assert num_compiled(specialised, [1, 2, 16, 30]) > 1
