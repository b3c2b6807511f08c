"""Golden curves: five small jobs whose numbers are in the repository, for every machine and every commit to repeat.

    python -m benchmarks.golden check [--device cuda] [--only NAME]     exit code 1 where a number has moved
    python -m benchmarks.golden write [--only NAME]                     on purpose, with a line in docs/log.md

`tests/golden/NAME.toml` is a job of eight steps, `tests/golden/NAME.json` its curve on a CPU. A fault in a kernel, a
layout or a device moves a curve; so does a commit that changes a method's numbers, whether it means to or not. The
layout matrix cannot see the second: it compares one commit with itself.

A curve has one value per step and trained role: `loss`, `grad_norm` (before clipping), `update_norm` (L2 distance that
the optimizer moves the weights) and, for the role with an average, `ema_distance` (L2 distance of the average from the
weights). The loss says what was computed, the gradient norm what its backward made of it, the update norm what
optimizer and schedules made of that, the distance what only validations would show.

Differences are relative to the value in the file. Where that value is below `FLOOR` times the largest of its curve, the
divisor is that floor: a loss that begins at 0 has no digits to compare. If only one curve has a value at a step, the
difference is infinite.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.golden_spies import SPIES
from benchmarks.machine import machine, write_result

if TYPE_CHECKING:
    from titan_distill.parallelisms.mesh import World
    from titan_distill.roles import RoleHandle
    from titan_distill.trainer import Trainer

REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "tests" / "golden"
NAMES = ("dmd2", "finetune", "sparse", "self_forcing", "rcm")
SAME_MACHINE = 1e-5
"""Bound on differences between layouts on one machine: one rank, two ranks, gradient accumulation."""
AGAINST_FILE = 1e-4
"""Bound on differences from the file, on any machine and device, products of matrices in full fp32."""
FLOOR = 1e-4
EXIT_MOVED = 1

Curves = dict[str, list["float | None"]]
"""`KIND/ROLE` to one value per step; None where the role has no update."""


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of one curve, and where it is; steps count from 1, as in metrics.jsonl."""

    worst: float
    step: int
    expected: float | None
    found: float | None


@dataclass(frozen=True)
class Recording:
    """Result of a golden job: its curves, and sentences on what it should have run and did not."""

    curves: Curves
    faults: list[str]


def check(name: str, device: str = "cpu") -> list[dict[str, Any]]:
    """Runs a golden job and compares it with its file, one row per curve.

    Rows have the keys `job, device, metric, worst, step, expected, found, tolerance, passed`. A last one of metric
    `spy` has `faults` instead: what the job is named for and did not run. Needs no torchrun and no working directory.
    """
    return judge(name, record(name, device), device)


def judge(name: str, recording: Recording, device: str) -> list[dict[str, Any]]:
    """The rows of `check` for a recording of the job."""
    stored = read(name)
    rows = [
        {"job": name, "device": device, "metric": metric, **vars(difference), "tolerance": stored["tolerance"]}
        | {"passed": difference.worst <= stored["tolerance"]}
        for metric, difference in compare(stored["curves"], recording.curves).items()
    ]
    faults = recording.faults
    return [*rows, {"job": name, "device": device, "metric": "spy", "faults": faults, "passed": not faults}]


def write(name: str) -> str:
    """Runs a golden job on the CPU and writes its file. Returns the digest that docs/log.md must name.

    Raises RuntimeError where the job does not run what it is named for, or a value is not finite.
    """
    recording = record(name)
    bad = [metric for metric, values in recording.curves.items() if not all(map(_is_finite, values))]
    if faults := [*recording.faults, *(f"{metric} is not finite" for metric in bad)]:
        raise RuntimeError(f"{name} is not written: {'; '.join(faults)}")
    command = f"python -m benchmarks.golden write --only {name}"
    write_result(_file(name), {"command": command, "tolerance": AGAINST_FILE, "curves": recording.curves})
    return digest(recording.curves)


def read(name: str) -> dict[str, Any]:
    """The file of a golden job: `machine`, `command`, `tolerance` and `curves`."""
    return json.loads(_file(name).read_text(encoding="utf-8"))


def digest(curves: Curves) -> str:
    """Eight hexadecimal digits that change with any digit of the curves."""
    return hashlib.sha256(json.dumps(curves, sort_keys=True).encode()).hexdigest()[:8]


def compare(expected: Curves, found: Curves) -> dict[str, Difference]:
    """The largest relative difference of every curve that either has, as this module defines it."""
    return {
        metric: _difference(expected.get(metric, []), found.get(metric, []))
        for metric in sorted(expected.keys() | found.keys())
    }


def largest(differences: dict[str, Difference]) -> float:
    """Largest difference of all curves; NaN if any is NaN."""
    return _maximum([difference.worst for difference in differences.values()])


def record(
    name: str, device: str = "cpu", *overrides: str, world: World | None = None, until: int | None = None
) -> Recording:
    """Trains a golden job, changed by `overrides` as on the command line, in this process or as one rank of `world`.

    It stops after `until` steps, all by default.
    """
    from titan_distill.config.loading import load_config
    from titan_distill.parallelisms.mesh import World
    from titan_distill.resolve import resolve
    from titan_distill.train import assemble

    world = world or World(rank=0, size=1, device=torch.device(device))
    with tempfile.TemporaryDirectory() as output, _in_repository(), _full_precision(), redirect_stdout(io.StringIO()):
        job = ["--job.config_file", str(FOLDER / f"{name}.toml"), "--job.output_dir", output]
        trainer = assemble(resolve(load_config([*job, *overrides]), world.size), world)
        try:
            curves = _note_curves(trainer, until or trainer.config.training.steps)
            reports = [spy(trainer) for spy in SPIES[name]]
            trainer.run()
            return Recording(curves, [fault for report in reports for fault in report(curves)])
        finally:
            trainer.metrics.close()


def _note_curves(trainer: Trainer, num_steps: int) -> Curves:
    """Curves that fill themselves while the trainer runs, as far as it shall."""
    curves: Curves = {}
    moved: dict[str, float] = {}
    for role in trainer.roles.trainable:
        _note_updates(role, moved)
    log = trainer.metrics.step

    def step(done: int, values: dict[str, float], **rest: Any) -> None:
        found = {key: value for key, value in values.items() if key.startswith(("loss/", "grad_norm/"))}
        found |= {f"update_norm/{role}": norm for role, norm in moved.items()}
        found |= {f"ema_distance/{role.name}": _ema_distance(role) for role in trainer.roles if role.ema is not None}
        moved.clear()
        for key, value in found.items():
            curves.setdefault(key, [None] * num_steps)[done - 1] = value
        log(done, values, **rest)
        if done == num_steps:
            trainer.stop.agree(1)

    trainer.metrics.step = step
    return curves


def _note_updates(role: RoleHandle, moved: dict[str, float]) -> None:
    """Has the role's optimizer write into `moved` how far each of its steps goes."""
    (optimizer,) = role.optimizers.values()
    before: list[torch.Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: before.extend(p.detach().clone() for p in role.parameters()))

    def after(*_: Any) -> None:
        moved[role.name] = _distance([p.detach() for p in role.parameters()], before)
        before.clear()

    optimizer.register_step_post_hook(after)


def _ema_distance(role: RoleHandle) -> float:
    return _distance([p.detach() for p in role.parameters()], list(role.ema.shadow.values()))


def _distance(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """L2 distance over all ranks that share the tensors."""
    norm = torch.nn.utils.get_total_norm([tensor - other for tensor, other in zip(tensors, others, strict=True)])
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _difference(expected: list[float | None], found: list[float | None]) -> Difference:
    floor = FLOOR * max((abs(value) for value in expected if value is not None), default=0.0)
    steps = max(len(expected), len(found))
    pairs = list(zip(_padded(expected, steps), _padded(found, steps), strict=True))
    relative = [_relative(value, other, floor) for value, other in pairs]
    worst = _maximum(relative)
    at = next(index for index, value in enumerate(relative) if value == worst or math.isnan(value))
    return Difference(worst, at + 1, *pairs[at])


def _relative(expected: float | None, found: float | None, floor: float) -> float:
    if expected is None or found is None:
        return 0.0 if expected is found else math.inf
    difference, size = abs(found - expected), max(abs(expected), floor)
    if not size:
        return math.inf if difference else 0.0
    return difference / size


def _padded(values: list[float | None], length: int) -> list[float | None]:
    return values + [None] * (length - len(values))


def _maximum(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).max())  # unlike max(), NaN where one of them is


def _is_finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)


def _file(name: str) -> Path:
    return FOLDER / f"{name}.json"


@contextmanager
def _in_repository() -> Iterator[None]:
    """Paths in the jobs start at the repository."""
    previous = Path.cwd()
    os.chdir(REPOSITORY)
    try:
        yield
    finally:
        os.chdir(previous)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Without TF32, which keeps three digits of a product."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows of `check` as a table."""
    lines = [f"{'job':<14}{'metric':<24}{'worst':>9}  step  {'bound':>7}"]
    for row in rows:
        if row["metric"] == "spy":
            lines += [f"{row['job']:<14}DOES NOT RUN WHAT IT IS NAMED FOR: {fault}" for fault in row["faults"]]
            continue
        end = "" if row["passed"] else f"  MOVED from {row['expected']} to {row['found']}"
        numbers = f"{row['worst']:>9.1e}  {row['step']:>4}  {row['tolerance']:>7.0e}"
        lines.append(f"{row['job']:<14}{row['metric']:<24}{numbers}{end}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes or checks, and exits with 1 where a number has moved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["write", "check"], help="compare with the files, or write them anew")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="device of `check`; files are always written on the CPU",
    )
    parser.add_argument("--only", choices=NAMES, help="one job instead of all")
    arguments = parser.parse_args(argv)
    if arguments.action == "write" and arguments.device != "cpu":
        parser.error("write runs on the CPU only; compare a GPU with `check --device cuda`")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, but torch sees none; leave --device out to check on the CPU")
    torch.set_num_threads(1)
    names = [arguments.only] if arguments.only else NAMES
    if arguments.action == "write":
        digests = ", ".join(f"{name} {write(name)}" for name in names)
        print(f"Say in docs/log.md why the curves are new, with this line in it:\nGolden curves: {digests}.")
        return
    rows = [row for name in names for row in check(name, arguments.device)]
    here = machine()
    print(f"{arguments.device} of {here['accelerator'] or here['processor']}, torch {here['torch']}\n{table(rows)}")
    sys.exit(0 if all(row["passed"] for row in rows) else EXIT_MOVED)


if __name__ == "__main__":
    main()
