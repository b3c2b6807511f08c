"""Runs parts in worker processes and keeps what they say."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.plan import Part
from benchmarks.gpu_suite.records import Row, RowFile, tail

REPOSITORY = Path(__file__).parents[2]
RESERVE_S = 6.0
"""Kept for the last summary."""
LEAST_S = 4.0
"""A worker with less time than this is not started."""
SECONDS_FOR_STACKS, SECONDS_TO_DIE, SECONDS_FOR_NVIDIA_SMI = 1.0, 10.0, 10.0
PATIENCE_ON_CPU = 4.0
"""A rehearsal's limits, in those of a GPU: other processes may share the machine."""
CRASHED, HUNG, SKIPPED = "crashed", "out of time", "not reached"


class Worker:
    """A worker process and the pipe on which it speaks."""

    def __init__(self, name: str, logs: Path, environment: dict[str, str]) -> None:
        self.name = name
        reading, writing = os.pipe()
        count = sum(file.name.startswith(name) for file in logs.iterdir())
        self.log = logs / f"{name}-{count}.log"
        with self.log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", "benchmarks.gpu_suite.worker", str(writing)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=REPOSITORY, env=environment, text=True,
                pass_fds=[writing], preexec_fn=os.setpgrp,
                encoding="utf-8",
            )  # fmt: skip
        os.close(writing)
        self._reading, self._buffer = reading, b""

    def ask(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died between two parts; the silence that follows says so
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def listen(self, deadline: float) -> dict[str, Any] | None:
        """Return the next message; None when the process has ended. Raises TimeoutError at `deadline`."""
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._reading], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            received = os.read(self._reading, 1 << 16)
            if not received:
                return None
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def show_stacks(self) -> None:
        """Lets a process that hangs write its stacks into the log."""
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGUSR1)
        time.sleep(SECONDS_FOR_STACKS)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> int:
        """Ends the process, and all that it started. Returns its exit code."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(ProcessLookupError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        os.close(self._reading)
        try:
            code = self._process.wait(timeout=SECONDS_TO_DIE)
        except subprocess.TimeoutExpired:  # it waits in the driver, where no signal reaches it; the others go on
            return -signal.SIGKILL
        with suppress(ProcessLookupError):  # what outlived it
            os.killpg(self._process.pid, signal.SIGKILL)
        return code


@dataclass
class Progress:
    """The cases of a part, as far as they are known, and how many have been tried."""

    names: list[str] = field(default_factory=list)
    attempted: int = 0
    is_over: bool = False


class Supervisor:
    """Runs parts until the budget is spent.

    Args:
        out: folder of the results.
        scratch: folder for logs and temporary files.
        budget_s: seconds for everything.
        rehearse: toy sizes on a CPU.
        cache: kernels compiled ahead of time, if there are any.
        after_part: called when a part is over.
    """

    def __init__(
        self,
        out: Path,
        scratch: Path,
        budget_s: float,
        rehearse: bool,
        cache: Path | None,
        after_part: Callable[[], None],
    ) -> None:
        self._started = time.monotonic()
        self._end = self._started + budget_s - RESERVE_S
        self._scratch, self._rehearse, self._after_part = scratch, rehearse, after_part
        self._patience = PATIENCE_ON_CPU if rehearse else 1.0
        self._context = {
            "device": "cpu" if rehearse else "cuda",
            "rehearse": rehearse,
            "out": str(out.resolve()),
            "scratch": str(scratch),
            "cache": str(cache.resolve()) if cache else None,
        }
        self.logs = scratch / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self._file = RowFile(out / "rows.jsonl")
        self._card = "CPU (rehearsal)" if rehearse else ", ".join(nvidia_gpus()) or "unknown"
        self._worker: Worker | None = None

    @property
    def rows(self) -> list[Row]:
        return self._file.rows

    def run(self, parts: Sequence[Part]) -> None:
        """Runs every part that there is time for, and names the others."""
        try:
            for part in parts:
                self.run_part(part)
                self._after_part()
        finally:
            self.end_worker()

    def run_part(self, part: Part) -> None:
        """Runs one part's cases, in as many workers as they break."""
        started = time.monotonic()
        deadline = min(started + part.limit_s * self._patience, self._end)
        if deadline - started < (LEAST_S if self._rehearse else part.estimate_s / 2):
            self._add(part, "part", failure=SKIPPED, text=f"{deadline - started:.0f} s were left of the budget")
            return
        progress = Progress()
        while not progress.is_over and (progress.attempted == 0 or deadline - time.monotonic() >= LEAST_S):
            self._run_cases(part, progress, deadline)
        for name in progress.names[progress.attempted :]:
            self._add(part, name, failure=SKIPPED, text="the time of its part was spent")
        self._add(part, "part", seconds=round(time.monotonic() - started, 2))

    def _run_cases(self, part: Part, progress: Progress, deadline: float) -> None:
        """Runs the cases that are left in one worker, until the end or until one breaks the worker."""
        worker = self._worker_of(part)
        context = {**self._context, "seconds": deadline - time.monotonic()}
        worker.ask({"function": part.function, "context": context, "skip": progress.attempted})
        before, case, case_end, has_failed = progress.attempted, "start", deadline, False
        while not progress.is_over:
            try:
                message = worker.listen(min(case_end, deadline))
            except TimeoutError:
                worker.show_stacks()
                self._add(part, case, failure=HUNG, text=tail(worker.log))
                self.end_worker()
                break
            if message is None:
                code = self.end_worker()
                if not has_failed:  # else it has said so, and left because the device no longer answered
                    self._add(part, case, failure=CRASHED, text=f"{ended_by(code)}\n{tail(worker.log)}")
                break
            match message["kind"]:
                case "cases":
                    progress.names = message["names"]
                case "begin":
                    case, has_failed = message["case"], False
                    progress.attempted += 1
                    case_end = time.monotonic() + (part.case_limit_s or part.limit_s) * self._patience
                case "failure":
                    case, has_failed = message["case"], True
                    self._add(part, case, failure=message["what"], text=message["text"])
                case "row":
                    self._card = message["row"].get("card", self._card)
                    self._add(part, case, **message["row"])
                case "end":
                    progress.is_over = True
        # A worker that ends before its first case would end there again.
        progress.is_over |= progress.attempted in (before, len(progress.names))

    def _worker_of(self, part: Part) -> Worker:
        if self._worker is not None and (self._worker.name != part.process or self._worker.has_ended):
            self.end_worker()
        if self._worker is None:
            self._worker = Worker(part.process, self.logs, worker_environment(self._scratch))
        return self._worker

    def end_worker(self) -> int:
        """Ends the worker there is, if any. Returns its exit code."""
        worker, self._worker = self._worker, None
        return 0 if worker is None else worker.end()

    def _add(self, part: Part, case: str, **content: Any) -> None:
        at = round(time.monotonic() - self._started, 2)
        self._file.append({"part": part.name, "case": case, "card": self._card, "at_s": at, **content})


def nvidia_gpus() -> list[str]:
    """Return the names of this machine's GPUs, by nvidia-smi: no process of ours needs CUDA for it."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return []
    done = subprocess.run(command, capture_output=True, check=False, timeout=SECONDS_FOR_NVIDIA_SMI, encoding="utf-8")
    return done.stdout.splitlines()


def worker_environment(scratch: Path) -> dict[str, str]:
    """This process's environment, with the repository's packages importable without an installation, and a folder for
    compiled kernels that all workers share."""
    paths = [*(str(REPOSITORY / name) for name in ("", "kernels", "tests/helpers")), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
    }


def ended_by(code: int) -> str:
    """Return an exit code in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def failures(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the rows that say that something went wrong."""
    return (row for row in rows if "failure" in row)
