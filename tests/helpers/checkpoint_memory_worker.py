"""`python checkpoint_memory_worker.py FOLDER`: peak memory of reshard, verify and diff, as JSON
on standard output: bytes by command. A process of its own, because one that has run tests has garbage and free memory
of theirs, which the kernel counts too."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_checkpoints import write_weights_only

from titan_distill.checkpoint.tools import rewrite
from titan_distill.checkpoint.tools.diff import diff
from titan_distill.checkpoint.tools.inspect import verify

NUM_TENSORS = 24
TENSOR_BYTES = 8 << 20
M_MMAP_THRESHOLD = -3


def commands(folder: Path, num_rows: int) -> dict[str, Callable[[], Any]]:
    original, rewritten = folder / "original", folder / "rewritten"
    tensors = {f"layer{i}": torch.full((num_rows, TENSOR_BYTES >> 12), float(i)) for i in range(NUM_TENSORS)}
    write_weights_only(original, {"transformer": tensors}, {}, role="r")
    return {
        "reshard": lambda: rewrite.reshard(original, rewritten, 3),
        "verify": lambda: verify(rewritten),
        "diff": lambda: list(diff(original, rewritten)),
    }


def peak_growth(work: Callable[[], Any]) -> int:
    """By how much the peak of this process's resident memory, mapped files included, exceeds its start, in bytes."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)  # what is freed is given back, not kept for reuse and counted
    libc.malloc_trim(0)  # nor must memory that was freed before hide what is needed now
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for command in commands(folder / "small", 3).values():
        command()  # libraries that are loaded at first use are no part of what is measured
    print(json.dumps({name: peak_growth(command) for name, command in commands(folder, 1 << 10).items()}))
