"""Metrics of a run: always written to `metrics.jsonl`, to trackers if configured, and shown as progress on the
terminal.

A line of `metrics.jsonl` holds, for one logged step, the latest value of every key since the line before (a student
that is updated every fifth step appears in every tenth line), the seconds of each phase, and rates. Two rules keep them
honest:

- *Rates are of an interval*: tokens and FLOPs since the last line over the seconds that they took, without the seconds
  of validation and checkpoints, which have their own keys. Neither a long start-up nor a resume can flatter or spoil
  them.
- *A step has one line.* What is logged later for the same step (validation) joins its line, and a resumed run first
  drops the lines of the steps that it is about to repeat.

`metrics.jsonl` holds one JSON object per line and is flushed at once: the file of a killed run is good up to its last
complete line. A resumed run writes the lines that it keeps to a second file and renames that, so a second kill in
between loses nothing.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from titan_distill.config.config import Config
from titan_distill.fault_tolerance.files import atomic
from titan_distill.observability.flops import WorkCounter, peak_flops, utilization
from titan_distill.observability.progress import Progress
from titan_distill.observability.timing import PhaseTimer
from titan_distill.observability.trackers import Tracker, build_trackers

PAUSES = ("time/checkpoint", "time/validation")
"""Phases other than training. Their seconds do not count in rates."""


class MetricsFile:
    """Appends to the metrics of a run. Numbers keep full precision; JSON has no NaN, so that becomes null."""

    def __init__(self, path: Path, start_step: int) -> None:
        """Opens `path` to go on after `start_step`; later lines are dropped, all of them for a fresh run."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _complete_lines(path) if start_step > 0 and path.exists() else []
        with atomic(path) as fresh:
            fresh.write_text("".join(line for line in kept if json.loads(line)["step"] <= start_step), encoding="utf-8")
        self._file = path.open("r+", encoding="utf-8")
        self._file.seek(0, os.SEEK_END)
        self._last_start = self._file.tell()
        self._last_line: dict[str, float | None] = {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends the line of `step`; values of the step that was written last join its line instead."""
        if self._last_line.get("step") == step:
            self._file.seek(self._last_start)
            self._file.truncate()
        else:
            assert not self._last_line or step > (self._last_line["step"] or 0), "steps are logged in order"
            self._last_start = self._file.tell()
            self._last_line = {"step": step}
        self._last_line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(self._last_line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _complete_lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


class MetricsLogger:
    """Collects the values of every step and writes them. Create one on every rank; only the main one writes."""

    def __init__(
        self,
        config: Config,
        *,
        is_main: bool,
        start_step: int,
        timer: PhaseTimer,
        counter: WorkCounter | None = None,
    ) -> None:
        """Opens the file, the trackers and the progress display.

        `start_step` is the number of steps already done. Without a `counter`, which knows the family's tokens and
        FLOPs, no rates are logged. Raises ValueError when a tracker that is switched on cannot start.
        """
        self.latest: dict[str, float] = {}
        """Most recent value of every key that this process has logged."""
        self._timer, self._counter = timer, counter
        self._log_interval, self._num_steps = config.metrics.log_interval, config.training.steps
        self._batch_size = config.training.global_batch_size
        self._peak_flops = peak_flops(timer.device)
        self._pending: dict[str, float] = {}
        self._phases: dict[str, float] = defaultdict(float)
        self._interval_started, self._interval_step = time.perf_counter(), start_step
        self._file: MetricsFile | None = None
        self._trackers: Sequence[Tracker] = ()
        if is_main:
            folder = config.job.output_folder
            self._file = MetricsFile(folder / "metrics.jsonl", start_step)
            self._trackers = build_trackers(config.metrics, folder, config.job.name, start_step)
            self._progress = Progress(self._num_steps, start_step)

    def step(self, step: int, values: Mapping[str, float], *, samples_seen: int) -> None:
        """Records the values of one finished step, the step number `step`. Writes a line if one is due."""
        self._pending |= values
        if self._file is not None:
            self._progress.update(step, values)
        if step % self._log_interval == 0 or step == self._num_steps:
            self._collect_phases()
            rates = self._rates(step)
            memory = {"memory_gib": memory_gib(self._timer.device)}
            self._write(step, {**self._pending, "samples_seen": samples_seen, **rates, **memory, **self._phases})
            self._pending.clear()
            self._phases.clear()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs values outside of training, such as a validation's scores, in the line of `step`.

        The seconds of pauses go with it and leave the interval; those of training phases wait for the next line.
        """
        self._collect_phases()
        pauses = {name: self._phases.pop(name) for name in PAUSES if name in self._phases}
        self._interval_started += sum(pauses.values())
        self._write(step, {**values, **pauses})

    def log_media(self, step: int, paths: Iterable[Path]) -> None:
        """Shows pictures (.png) and videos (.mp4) in the trackers, under `validation/<file name>`."""
        for path in paths:
            for tracker in self._trackers:
                tracker.log_media(step, f"validation/{path.stem}", path)

    def close(self) -> None:
        """Flushes and closes file, trackers and progress display."""
        if self._file is not None:
            self._progress.close()
            self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _collect_phases(self) -> None:
        for name, seconds in self._timer.drain().items():
            self._phases[name] += seconds

    def _write(self, step: int, line: dict[str, float]) -> None:
        self.latest |= line
        if self._file is not None:
            self._file.write(step, line)
            for tracker in self._trackers:
                tracker.log_scalars(step, line)

    def _rates(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds = now - self._interval_started - sum(self._phases.get(name, 0.0) for name in PAUSES)
        num_samples = (step - self._interval_step) * self._batch_size
        self._interval_started, self._interval_step = now, step
        if self._counter is None:
            return {}
        tokens_per_second = num_samples * self._counter.drain_tokens() / seconds
        return {"tokens_per_second": tokens_per_second, **utilization(self._counter.drain(), seconds, self._peak_flops)}


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / 2**30
