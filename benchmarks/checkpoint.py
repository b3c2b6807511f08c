"""Cost of a checkpoint: `python -m benchmarks.checkpoint --out benchmarks/results/checkpoint-DATE.json`

Two questions, about one role with its Adam moments (four fifths of what a real run saves):

- *Does saving use the disk?* Bandwidth of a synchronous save, from the call until the step is published, against
  writing the same bytes to one file on the same disk and fsync: `bandwidth_ratio`, which should be at least 0.8.
- *Does training wait?* Seconds that an asynchronous save holds training up (in the call, before the next optimizer
  step, and asking at each step whether it is done) against the synchronous save: `stall_ratio`, which should be at
  most 0.05. The saving thread also takes cores from training: `step_ratio` is the duration of a step
  beside a save over one without.

Each repetition measures all of it, one after the other, so that a machine that drifts hurts all alike. The result is
the median of the ratios. The load average stands beside them: hashing takes a second core, so on a machine without a
free one the bandwidth says little about the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.machine import write_result
from titan_distill.checkpoint.manager import CheckpointManager, RunInfo
from titan_distill.checkpoint.manifest import read_manifest
from titan_distill.checkpoint.state import TrainState
from titan_distill.roles import RoleHandle, RoleManager

WIDTH = 1024
PIECE_BYTES = 8 << 20
RUN = RunInfo(family="benchmark", config_digest="")
REMOVED = 1_000_000  # steps to keep: removing is not what is measured


class Training:
    """A role that trains, and the seconds for which its checkpoints hold it up."""

    def __init__(self, model_megabytes: int, num_tokens: int) -> None:
        num_layers = round(model_megabytes * 1e6 / (4 * WIDTH * WIDTH))
        module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers)))
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        self.role = RoleHandle(
            "student", {"transformer": module}, True, {"transformer": optimizer}, {"transformer": schedule}
        )
        self.roles = RoleManager([self.role])
        self.x = torch.randn(num_tokens, WIDTH)
        self.num_steps = 0
        self.num_bytes = 3 * sum(p.numel() * p.element_size() for p in module.parameters())

    def step(self, checkpoints: CheckpointManager) -> tuple[float, float]:
        """One step. Returns its seconds, and those of them for which it waited."""
        started = time.perf_counter()
        self.role.transformer(self.x).square().mean().backward()
        stalled = timed(checkpoints.before_change)
        self.role.step(0, tick_ema=False)
        self.num_steps += 1
        stalled += timed(checkpoints.poll)
        return time.perf_counter() - started, stalled

    def save(self, checkpoints: CheckpointManager) -> float:
        """Seconds until the call returns."""
        return timed(lambda: checkpoints.save(self.roles, TrainState(step=self.num_steps)))


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def write_plainly(folder: Path, content: memoryview) -> float:
    """Seconds to write one file from front to end and wait for the disk."""

    def write() -> None:
        with (folder / "plain").open("wb", buffering=0) as file:
            for start in range(0, len(content), PIECE_BYTES):
                file.write(content[start : start + PIECE_BYTES])
            os.fsync(file.fileno())

    return timed(write)


def measure_async(training: Training, checkpoints: CheckpointManager) -> dict[str, float]:
    """Trains until a save is published. Returns seconds of waiting in all, and of the steps beside it and before."""
    before = [training.step(checkpoints)[0] for _ in range(2)]
    started = time.perf_counter()
    stalled, beside = training.save(checkpoints), []
    while checkpoints.is_saving:
        seconds, waited = training.step(checkpoints)
        stalled += waited
        beside.append(seconds - waited)
    return {
        "stall_seconds": stalled,
        "async_seconds": time.perf_counter() - started,
        "step_seconds": statistics.median(before),
        "step_seconds_beside_a_save": statistics.median(beside),
    }


def measure(training: Training, folder: Path) -> dict[str, float]:
    """One repetition, on a disk that has nothing else to do."""
    sync = CheckpointManager(folder / "sync", REMOVED, RUN)
    settle(folder)
    seconds = {"sync_seconds": training.save(sync)}
    (published,) = (folder / "sync").iterdir()
    content = b"".join((published / name).read_bytes() for name in read_manifest(published).files)
    settle(folder)
    seconds["plain_seconds"] = write_plainly(folder, memoryview(content))
    settle(folder)
    return {**seconds, "checkpoint_bytes": len(content)}


def settle(folder: Path) -> None:
    """Removes what was written and waits until the disk is idle."""
    for path in [*folder.glob("*/*"), *folder.glob("plain")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.sync()


def main() -> None:
    """Measures and prints; with --out also writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=250, help="of the model; Adam's moments are twice that")
    parser.add_argument("--tokens", type=int, default=256, help="in a step; its length")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's temporary folder")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    training, rows = Training(arguments.megabytes, arguments.tokens), []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        checkpoints = CheckpointManager(folder / "async", REMOVED, RUN, mode="async")
        first = measure_async(training, checkpoints)  # the only one that allocates host memory
        for _ in range(arguments.repetitions):
            row = measure(training, folder) | measure_async(training, checkpoints)
            row["bandwidth_ratio"] = row["plain_seconds"] / row["sync_seconds"]
            row["stall_ratio"] = row["stall_seconds"] / row["sync_seconds"]
            row["step_ratio"] = row["step_seconds_beside_a_save"] / row["step_seconds"]
            row["load_average"] = os.getloadavg()[0]
            rows.append(row)
            print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
        settle(folder)
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    print("median  " + "  ".join(f"{key} {value:.4g}" for key, value in medians.items()))
    if arguments.out:
        command = f"checkpoint --megabytes {arguments.megabytes} --tokens {arguments.tokens}"
        write_result(arguments.out, {"command": command, "median": medians, "first_async": first, "repetitions": rows})


if __name__ == "__main__":
    main()
