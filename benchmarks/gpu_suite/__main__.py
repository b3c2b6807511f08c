"""Command line of the suite."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from benchmarks import gpu_suite
from benchmarks.gpu_suite.plan import BUDGETS, FIRST, PARTS, Part
from benchmarks.gpu_suite.records import pack_logs, write_whole
from benchmarks.gpu_suite.summary import summary
from benchmarks.gpu_suite.supervisor import SKIPPED, Supervisor, failures, nvidia_gpus

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
FILES = ("rows.jsonl", "summary.md", "junit.xml", "profile.json.gz", "logs.tar.gz")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """A signal asked the suite to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def run_suite(
    parts: Sequence[Part], out: Path, budget_s: float, rehearse: bool = False, cache: Path | None = None
) -> int:
    """Runs `parts` and writes the results into `out`. Returns the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # of an earlier suite in the same folder
        (out / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_suite_") as scratch:

        def write(ended: str = "") -> None:
            write_whole(out / "summary.md", summary(supervisor.rows, parts, ended, rehearse))
            pack_logs(supervisor.logs, out / "logs.tar.gz")

        supervisor = Supervisor(out, Path(scratch), budget_s, rehearse, cache, after_part=write)
        try:
            with_signals(lambda: supervisor.run(parts))
        except Stopped as stopped:
            write(str(stopped))
            return 128 + stopped.number
        write()
    first = {part.name for part in parts if part.tier == FIRST}
    bad = [row for row in failures(supervisor.rows) if row["failure"] != SKIPPED or row["part"] in first]
    return EXIT_FAILED if bad else 0


def with_signals(run: Callable[[], None]) -> None:
    """Runs, and raises `Stopped` where a signal arrives; other handlers come back afterwards."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the suite."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=gpu_suite.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the results; an earlier suite's are replaced"
    )
    parser.add_argument(
        "--budget", type=float, default=BUDGETS[FIRST], help="seconds for everything (default: %(default)g)"
    )
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU, through the same code")
    parser.add_argument("--cache", type=Path, help="kernels packed by `python -m benchmarks.compiled_cache pack`")
    arguments = parser.parse_args(argv)
    if arguments.cache and not arguments.cache.is_file():
        parser.error(f"--cache {arguments.cache} is no file; make it with `python -m benchmarks.compiled_cache`")
    if arguments.budget < 30:
        parser.error(f"--budget {arguments.budget:g} is too short to start anything; give at least 30 seconds")
    if not arguments.rehearse and not nvidia_gpus():
        print("error: the GPU suite needs a GPU and nvidia-smi lists none; try --rehearse", file=sys.stderr)
        return EXIT_BAD_INPUT
    code = run_suite(PARTS, arguments.out, arguments.budget, arguments.rehearse, arguments.cache)
    print((arguments.out / "summary.md").read_text(encoding="utf-8"))
    return code


if __name__ == "__main__":
    sys.exit(main())
