"""Triton kernels compiled ahead of time, in a cache that travels to the GPU: `python -m benchmarks.compiled_cache`.

    make FOLDER [--processes N]    compile what the suite and tests/gpu launch, for sm_90; needs no GPU
    pack FOLDER FILE               the folder as one .tar.xz file
    install FILE FOLDER            unpack, and say whether this machine's Triton finds the kernels in it

A fresh GPU machine would spend minutes compiling, one kernel at a time. `make` finds the kernels by running the
benchmark's sizes and tests/gpu on a GPU that is not there (`pretended_gpu`), and compiles them in parallel.

Triton finds a kernel by a key, the SHA-256 of these, of which `identity` holds what a machine decides:

- Triton's version and the contents of its files: compiler/, language/, all of backends/, and libtriton.so. That library
  differs between Python's minor versions (3.11, 3.12), so the folder must be made with the GPU machine's. Its patch
  release, the path that Triton lies at, torch and numpy do not enter.
- The text that `ptxas --version` prints, the architecture, libdevice's contents, and the launch options. A different
  assembler (TRITON_PTXAS_PATH) or an option set in the environment (PTXAS_OPTIONS, TRITON_DEFAULT_FP_FUSION) counts.
- Environment variables that Triton lists as changing its output, such as DISABLE_LLVM_OPT or TRITON_ENABLE_ASAN.
- The kernel's source text with the number of its first line, its callees' likewise, and the values of globals it reads.
- What it is specialised on: dtypes, numbers that are 1 or divisible by 16, addresses divisible by 16, compile-time
  arguments. Nothing of a device but its architecture: an H100 and an H200 share kernels.

Triton also builds a C launcher for each signature with gcc, and keys it by its source and the kind of machine. They are
in the folder too; where one does not load, Triton builds it anew.

One trap: beside each kernel lies a list of its files as absolute paths, and a kernel whose list names another folder
counts as absent. So folders are moved by `pack` and `install`, which writes the lists anew, never by copying.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import titan_kernels
import torch
import triton
from triton.backends.nvidia import driver as nvidia
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.runtime.build import compile_module_from_src
from triton.runtime.cache import triton_key
from triton.runtime.jit import get_cache_invalidating_env_vars

from benchmarks.launches import GOLDEN, JVP, SIZES, Size
from benchmarks.pretended_gpu import ARCH, TARGET, Job, PretendedGpu

REPOSITORY = Path(__file__).parent.parent
MANIFEST = "manifest.json"
FOLDER_VARIABLE = "TRITON_CACHE_DIR"


def identity() -> dict[str, str]:
    """Facts of this machine and checkout that kernels' keys depend on, by name."""
    sources = sorted(Path(titan_kernels.__path__[0]).glob("*.py"))
    return {
        "Triton": triton.__version__,
        "Triton's files": hashlib.sha256(triton_key().encode()).hexdigest(),
        "ptxas": get_ptxas_version(ARCH).strip().splitlines()[-1],
        "environment": str(sorted(get_cache_invalidating_env_vars().items())),
        "kernels": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
    }


@dataclass(frozen=True)
class Installed:
    """A cache folder in use. `differences` says why its kernels will not be found; empty where they will."""

    folder: Path
    num_kernels: int
    differences: list[str]

    @property
    def matches(self) -> bool:
        return not self.differences


def install(packed: Path, folder: Path) -> Installed:
    """Unpack into `folder` and make it the cache of this process and those that it starts.

    Raises:
        OSError, tarfile.TarError: the file is missing or damaged.
    """
    folder = folder.resolve()
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    for listing in folder.glob("*/__grp__*.json"):
        names = json.loads(listing.read_text(encoding="utf-8"))["child_paths"]
        paths = {name: str(listing.parent / Path(path).name) for name, path in names.items()}
        listing.write_text(json.dumps({"child_paths": paths}), encoding="utf-8")
    os.environ[FOLDER_VARIABLE] = str(folder)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    here = identity()
    differences = [
        f"{name}: made with {made}, here {here.get(name)}"
        for name, made in manifest["identity"].items()
        if here.get(name) != made
    ]
    return Installed(folder, len(manifest["kernels"]), differences)


def compiled_since(folder: Path) -> list[str]:
    """Names of the kernels that any process has compiled into an installed folder: those not found in it."""
    known = set(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["kernels"])
    return sorted(_kernels(folder)[key] for key in _kernels(folder).keys() - known)


@dataclass
class Found:
    """Kernels that this process asked the cache for, by name."""

    hits: list[str] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float | None:
        """Share of kernels that were found; None where none was asked for."""
        asked = len(self.hits) + len(self.misses)
        return len(self.hits) / asked if asked else None


@contextmanager
def watch() -> Iterator[Found]:
    """Count kernels that are found in the cache, and those that are compiled, within it."""
    found = Found()

    def listen(*, src: Any, cache_hit: bool, **others: Any) -> None:
        (found.hits if cache_hit else found.misses).append(src.name)

    before, triton.knobs.compilation.listener = triton.knobs.compilation.listener, listen
    try:
        yield found
    finally:
        triton.knobs.compilation.listener = before


def pack(folder: Path, file: Path) -> None:
    """Write a folder that `make` filled as one file."""
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder} has no {MANIFEST}; run `python -m benchmarks.compiled_cache make {folder}` first")
    with tarfile.open(file, "w:xz") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != "lock":
                archive.add(path, path.relative_to(folder))


def start_making(folder: Path, processes: int, log: Path) -> subprocess.Popen[bytes]:
    """`make` in the background, for a machine whose Triton has other keys; it touches no GPU.

    Kernels appear in `folder` one by one, the headline sizes' first. A process that needs one that is not there yet
    compiles it as well: both write the same bytes, each file at once.
    """
    command = [sys.executable, "-m", "benchmarks.compiled_cache", "make", str(folder), "--processes", str(processes)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "kernels")))}
    if inherited := os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] += os.pathsep + inherited
    with log.open("wb") as output:
        # In a group of its own: whoever ends the process that started it and its group shall not end this.
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, preexec_fn=os.setpgrp
        )


def find_jobs() -> list[Job]:
    """Return the kernels that attention of `SIZES`, the golden job, `JVP` and tests/gpu launch, in that order.

    This changes the process for good.
    """
    gpu = PretendedGpu()
    for size in (*SIZES, GOLDEN):
        run_attention(size)
    run_jvp(JVP)
    for line in run_tests():
        print(f"stopped early: {line}", flush=True)
    return list(gpu.jobs.values())


def run_attention(size: Size) -> None:
    """The whole operator forward and backward, as the benchmark runs it."""
    layout = titan_kernels.tile_layout(size.grid, size.tile, device="cuda")
    shape = (1, size.tokens, size.heads, size.head_dim)
    leaves = [torch.empty(shape, dtype=size.dtype, device="cuda").requires_grad_() for _ in range(4)]
    q, k, v, gate = leaves
    for join in size.tiles_per_list:
        fine, coarse = titan_kernels.branches(q, k, v, layout, max(1, layout.num_tiles // 10), tiles_per_list=join)
        out = titan_kernels.add_coarse(fine, coarse, gate, layout.tiles())
        torch.autograd.grad(out, leaves, torch.empty_like(out))


def run_jvp(size: Size) -> None:
    """Dense attention with its forward-mode derivative."""
    if hasattr(titan_kernels, "attention_jvp"):
        shape = (1, size.tokens, size.heads, size.head_dim)
        titan_kernels.attention_jvp(*(torch.empty(shape, dtype=size.dtype, device="cuda") for _ in range(6)))


class _NoOracle:
    """Stands in for `vsa_oracle.Oracle`: there are no numbers to compare."""

    def __init__(self, *arguments: Any, **others: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> list[None]:
        return [None] * 5

    def limit(self, *arguments: Any) -> float:
        return 1.0


class _Failures:
    """A pytest plugin that keeps the tests which did not come to their end."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.lines.append(f"{report.nodeid}: {str(report.longrepr).strip().splitlines()[-1]}")


def run_tests() -> list[str]:
    """tests/gpu without their comparisons; returns those that stopped early, with the reason."""
    import pytest

    sys.path.insert(0, str(REPOSITORY / "tests" / "helpers"))
    import vsa_oracle

    vsa_oracle.error, vsa_oracle.Oracle = lambda *_: 0.0, _NoOracle
    failures = _Failures()
    options = ["-q", "--no-header", "-o", "addopts=--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
    pytest.main([*options, f"--rootdir={REPOSITORY}", str(REPOSITORY / "tests" / "gpu")], plugins=[failures])
    return failures.lines


def make(folder: Path, processes: int, jobs: Sequence[Job]) -> int:
    """Compile kernels into `folder`, in their order, and return how many it holds; sets Triton's environment.

    Raises:
        RuntimeError: some do not compile; all others are there, and it names the first.
    """
    started = time.monotonic()
    _JOBS[:] = jobs
    os.environ[FOLDER_VARIABLE] = str(folder.resolve())
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    # Forked, because the sources hold functions that do not pickle; nothing has started CUDA or LLVM here.
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        failed = []
        for name, error in pool.imap_unordered(_compile, range(len(jobs))):
            print(f"{time.monotonic() - started:6.1f} s  {name} {error}", flush=True)
            failed += [f"{name}: {error}"] if error else []
    if hasattr(nvidia, "make_launcher"):
        _build_module(Path(nvidia.dirname, "driver.c").read_text(encoding="utf-8"), "cuda_utils")
    kernels = _kernels(folder)
    (folder / MANIFEST).write_text(json.dumps({"identity": identity(), "kernels": kernels}, indent=1), encoding="utf-8")
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} kernels do not compile: {failed[0]}")
    return len(kernels)


def _kernels(folder: Path) -> dict[str, str]:
    """Name by key of the kernels that are whole."""
    listings = folder.glob("*/__grp__*.json")
    return {path.parent.name: path.name.removeprefix("__grp__").removesuffix(".json") for path in listings}


_JOBS: list[Job] = []
"""The jobs that forked processes compile; they inherit the list."""


def _compile(index: int) -> tuple[str, str]:
    """Returns the kernel's name, and why it does not compile or nothing."""
    job = _JOBS[index]
    try:
        kernel = triton.compile(job.source, target=TARGET, options=job.options)
    except Exception as error:  # whatever the compiler raises; `make` raises it at the end
        return job.name, repr(error)
    assert kernel.hash == job.key
    if hasattr(nvidia, "make_launcher"):  # until Triton 3.6; later ones have one launcher for all
        _build_launcher(kernel)
    return job.name, ""


def _build_launcher(kernel: Any) -> None:
    """As Triton's `CudaLauncher` does."""
    source = kernel.src
    text = nvidia.make_launcher(source.constants, source.signature, getattr(kernel.metadata, "tensordesc_meta", None))
    _build_module(text, "__triton_launcher")


@functools.cache
def _build_module(text: str, name: str) -> None:
    """Into the cache, linked to an empty libcuda, because the real one comes with a GPU's driver."""
    with tempfile.TemporaryDirectory() as folder:
        stub = [f"{folder}/libcuda.so.1", "-Wl,-soname,libcuda.so.1"]
        subprocess.run(["gcc", "-shared", "-x", "c", "/dev/null", "-o", *stub], check=True)
        compiler = Path(folder) / "cc"  # else a linker that drops what is not needed drops the empty library
        compiler.write_text('#!/bin/sh\nexec gcc -Wl,--no-as-needed "$@"\n', encoding="utf-8")
        compiler.chmod(0o755)
        os.environ["CC"] = str(compiler)
        folders = [nvidia.libdevice_dir, folder]
        try:
            compile_module_from_src(
                text, name, library_dirs=folders, include_dirs=nvidia.include_dirs, libraries=nvidia.libraries
            )
        except ImportError as error:  # it is built and kept; to load it takes the driver
            assert "libcuda" in str(error), error


def main(argv: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one per core")
    packing = commands.add_parser("pack")
    packing.add_argument("folder", type=Path)
    packing.add_argument("file", type=Path)
    installing = commands.add_parser("install")
    installing.add_argument("file", type=Path)
    installing.add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.command == "make":
        arguments.folder.mkdir(parents=True, exist_ok=True)
        jobs = find_jobs()
        print(f"{len(jobs)} kernels to compile", flush=True)
        print(f"{make(arguments.folder, arguments.processes, jobs)} kernels in {arguments.folder}")
    elif arguments.command == "pack":
        try:
            pack(arguments.folder, arguments.file)
        except ValueError as error:
            parser.error(str(error))
        print(f"{arguments.file.stat().st_size / 2**20:.2f} MiB")
    else:
        installed = install(arguments.file, arguments.folder)
        print(f"{installed.num_kernels} kernels", *(installed.differences or ["for this Triton"]), sep="\n")


if __name__ == "__main__":
    main()
