"""Everything that wants a GPU, within minutes: ``PYTHONPATH=kernels python -m benchmarks.gpu_suite --out DIR``.

First the tests (``pytest -m gpu``), then attention timings, the most important first, until the time is up; what was
not reached is named. It needs torch, triton and pytest, no installation, and writes into DIR as it goes:
``tests.log`` and ``attention.json``.

Exit codes: 0, 1 for failed tests (timings are still taken), 2 without CUDA.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention
from benchmarks.machine import write_result

REPOSITORY = Path(__file__).parent.parent
EXIT_FAILED, EXIT_NO_CUDA = 1, 2
MOST_FOR_TESTS = 0.55
"""Share of the time after which tests are stopped, so that timings are never squeezed out."""

RESERVE_SECONDS = 20
"""For the case in progress when the deadline passes, and for the table."""


@dataclass(frozen=True)
class Schedule:
    """Points in time, on the clock of `time.monotonic`, between which the parts of the suite run."""

    tests_end: float
    timings_end: float

    @classmethod
    def starting(cls, now: float, minutes: float) -> Schedule:
        seconds = minutes * 60
        return cls(now + MOST_FOR_TESTS * seconds, now + seconds - RESERVE_SECONDS)


def pytest_command() -> list[str]:
    """pytest on the GPU tests; without the options of pyproject.toml that need plugins."""
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-o",
        "addopts=-ra",
        "-p",
        "no:cacheprovider",
        "tests/gpu",
    ]


def run_tests(log: Path, seconds: float) -> dict[str, Any]:
    """Runs the GPU tests for at most `seconds`; their output goes to `log`."""
    paths = [str(REPOSITORY / "kernels"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with log.open("w") as output:
        tests = subprocess.Popen(pytest_command(), cwd=REPOSITORY, env=environment, stdout=output, stderr=output)
        try:
            code: int | None = tests.wait(seconds)
        except subprocess.TimeoutExpired:
            tests.kill()
            tests.wait()
            code = None
    lines = log.read_text().strip().splitlines()
    return {
        "passed": code == 0,
        "summary": "stopped: out of time" if code is None else lines[-1] if lines else f"exit code {code}",
        "seconds": round(time.monotonic() - started, 1),
    }


def cases() -> list[attention.Case]:
    """What is timed, in order of importance."""
    return attention.plan(attention.GRIDS["cuda"], attention.HEADS["cuda"], attention.SPARSITIES)


def report(tests: dict[str, Any], timings: dict[str, Any]) -> str:
    """The result for people, short enough for the end of a log."""
    return f"{attention.table(timings)}\ntests: {tests['summary']} ({tests['seconds']:.0f} s)"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the suite and exits with its code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all of it")
    parser.add_argument("--only", choices=["tests", "timings"], help="leave the other part out")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: the GPU suite needs CUDA, and torch sees no GPU here", file=sys.stderr)
        sys.exit(EXIT_NO_CUDA)
    arguments.out.mkdir(parents=True, exist_ok=True)
    schedule = Schedule.starting(time.monotonic(), arguments.minutes)
    tests = {"passed": True, "summary": "left out", "seconds": 0.0}
    if arguments.only != "timings":
        end = schedule.tests_end if arguments.only is None else schedule.timings_end
        tests = run_tests(arguments.out / "tests.log", end - time.monotonic())
        print(f"tests: {tests['summary']}", flush=True)
    timed = cases() if arguments.only != "tests" else []
    timings = attention.benchmark(timed, "cuda", schedule.timings_end)
    write_result(arguments.out / "attention.json", {"command": "gpu_suite", "tests": tests, **timings})
    print(report(tests, timings), flush=True)
    sys.exit(0 if tests["passed"] else EXIT_FAILED)


if __name__ == "__main__":
    main()
