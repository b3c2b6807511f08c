"""Helpers for tests that train for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from titan_distill.commands.ode_pairs import OdePairsOptions, ode_pairs

HELPERS = Path(__file__).parent
REPOSITORY = HELPERS.parents[1]
TINY_WAN = REPOSITORY / "tests" / "assets" / "tiny_wan"
TINY_SHAPES = REPOSITORY / "tests" / "assets" / "tiny_shapes"


def tiny_argv(method: str, output: Path, *overrides: str) -> list[str]:
    """Command line of a short run of the tiny Wan without validation; relative paths in configs start at the
    repository."""
    return [
        "--job.config_file", str(REPOSITORY / "train_configs" / f"tiny_wan_{method}.toml"),
        "--job.output_dir", str(output),
        "--training.steps", "8",
        "--training.global_batch_size", "4",
        "--training.local_batch_size", "4",
        "--metrics.log_interval", "1",
        "--validation.enabled", "false",
        *overrides,
    ]  # fmt: skip


def record_pairs(folder: Path, num_pairs: int, num_steps: int) -> None:
    """Trajectories of the tiny Wan for knowledge distillation, far fewer and coarser than a real job's."""
    job, prompts = REPOSITORY / "train_configs" / "tiny_wan_kd.toml", TINY_SHAPES / "prompts.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        ode_pairs(OdePairsOptions(job, prompts, folder, num_pairs=num_pairs, num_steps=num_steps))


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def largest(values: Iterable[float]) -> float:
    """Unlike `max` NaN where one of them is, which is within no bound; 0 for no values."""
    return float(torch.tensor([0.0, *values], dtype=torch.float64).max())


def allocated_peak(run: Callable[[], object]) -> int:
    """The most bytes that torch has allocated on the CPU at once in a call, above those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    return max(accumulate(allocations(recorded)))


def allocations(recorded: profile) -> list[int]:
    """Bytes that torch has allocated on the CPU (freed where negative), in order of time."""
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def run_ranks(num_ranks: int, arguments: Sequence[str], timeout: float = 120) -> None:
    """Trains on `num_ranks` gloo ranks, one being a plain process. Fails with their output if a rank fails."""
    _run(num_ranks, ["-m", "titan_distill.train", *arguments], timeout)


def run_worker(num_ranks: int, script: Path, *arguments: Path, timeout: float) -> None:
    """Runs a script that imports modules of the tests on `num_ranks` gloo ranks. Fails as `run_ranks` does."""
    _run(num_ranks, [str(script), *map(str, arguments)], timeout)


def _run(num_ranks: int, arguments: Sequence[str], timeout: float) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    python_path = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *(torchrun if num_ranks > 1 else []), *arguments],
        cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": python_path},
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
