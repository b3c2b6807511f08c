"""Doctor: compares measures of a run with their healthy ranges and says when one is left.

A student that collapses, saturates or goes static does so hours into a run, and its losses look as before. The doctor
watches what the run computes anyway. In a step it takes the method's own metrics (`TrainingMethod.signals`), the
captions, and, every `INTERVAL` updates of a role, how far the optimizer moved its stored weights; no forward is run and
the host waits for nothing more. A validation adds readings of its samples (`validation.health`).

A measure that leaves its range writes one line to the log and to doctor.jsonl, and no other until it has come back.
References from the run's first validation or first updates are in doctor_references.json, so a resumed run compares
with the same ones. With `doctor.on_alarm = "stop"` the run also ends as on a stop signal, with an exit code of its own.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_distill.config.config import Config
from titan_distill.diffusion.transfer import to_device
from titan_distill.fault_tolerance.files import atomic
from titan_distill.fault_tolerance.signals import Stop
from titan_distill.observability.timing import PhaseTimer
from titan_distill.parallelisms.mesh import Layouts
from titan_distill.roles import RoleHandle, RoleManager
from titan_distill.validation.health import Reading
from titan_distill.validation.report.measures import MEASURES, Measure
from titan_distill.validation.report.weights import squares, stored_weights, update_size

logger = logging.getLogger(__name__)

INTERVAL = 10
"""Updates of a role per measurement of its update size."""
NUM_CAPTIONS = 64
"""Number of latest captions of the main rank that are compared."""
MIN_CAPTIONS = 16
"""Number of captions without which they are not judged."""
NUM_UPDATES = 10
"""Number of latest updates over which a metric is averaged."""
MIN_RATE = 0.1
"""Share of its peak below which the learning rate is too low to judge an update by its size."""
SUMS = "doctor/sums/"
"""Beginning of the names of sums on their way to the other ranks."""
PARTS = ("moved", "weights")
"""Ends of these names: the sums of `weights.squares`."""


class AlarmFile:
    """doctor.jsonl, one alarm per line."""

    def __init__(self, path: Path, start_step: int) -> None:
        """Opens the file to go on after `start_step`; later lines are dropped, all of them for a fresh run."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if start_step and path.is_file() else []
        alarms = [json.loads(line) for line in lines if line.endswith("}")]
        self.kept = [alarm for alarm in alarms if alarm["step"] <= start_step]
        """Alarms of the run so far."""
        with atomic(path) as fresh:
            fresh.write_text("".join(f"{json.dumps(alarm)}\n" for alarm in self.kept), encoding="utf-8")
        self._path = path

    def write(self, alarm: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(alarm) + "\n")


@dataclass(frozen=True)
class Moved:
    """A measured update of a role whose sums are not known yet."""

    dtype: torch.dtype
    squares: Tensor
    """Sums of `weights.squares` over this rank's shards."""
    is_judged: bool


class Doctor:
    """Watches one run. Create one on every rank; all ranks must call `weighing`, `sums` and `received` alike, and only
    the main one judges and writes."""

    def __init__(
        self,
        config: Config,
        signals: Mapping[str, str],
        layouts: Layouts,
        timer: PhaseTimer,
        stop: Stop,
        *,
        is_main: bool,
        start_step: int,
    ) -> None:
        """Opens doctor.jsonl to go on after `start_step`. `signals` are the method's (`TrainingMethod.signals`)."""
        self.config, self._signals, self._timer, self._stop = config.doctor, signals, timer, stop
        self._num_ranks = layouts.num_data_groups * layouts.data_group
        self._scale = layouts.data_group * config.training.global_batch_size
        self._is_main, self._moved = is_main and config.doctor.enabled, dict[str, Moved]()
        self._pretrained = {name for name, role in config.roles.items() if role.is_pretrained}
        self._captions: deque[str] = deque(maxlen=NUM_CAPTIONS)
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=NUM_UPDATES))
        self._out: set[str] = set()
        self._references: dict[str, float] = {}
        if self._is_main:
            folder = config.job.output_folder
            self._file, self._stored = AlarmFile(folder / "doctor.jsonl", start_step), folder / "doctor_references.json"
            self._out = {_key(alarm["role"], alarm["measure"]) for alarm in self._file.kept}
            if start_step and self._stored.is_file():
                self._references = json.loads(self._stored.read_text(encoding="utf-8"))

    def sums(self, device: torch.device) -> dict[str, Tensor]:
        """Returns this rank's part of sums that are still to be added up over all ranks, to travel with those of an
        update. Their names begin with SUMS."""
        return {
            f"{SUMS}{name}/{part}": to_device(value, device)
            for name, moved in self._moved.items()
            for part, value in zip(PARTS, moved.squares, strict=True)
        }

    def received(self, step: int, role: str, means: Mapping[str, float]) -> dict[str, float]:
        """Takes an update's means over the global batch, in which those of `sums` are. Returns them with the doctor's
        values in the place of `sums`, for the line of `step`."""
        values = {name: value for name, value in means.items() if not name.startswith(SUMS)}
        for name, moved in self._moved.items():
            squared, weights = (means[f"{SUMS}{name}/{part}"] * self._scale for part in PARTS)
            size = update_size(squared, weights, moved.dtype)
            values |= self._judge(step, name, "update_size", size) if moved.is_judged else {}
        self._moved.clear()
        for measure, metric in self._signals.items() if self._is_main else ():
            if metric in means:
                values |= self._judge_recent(step, role, measure, means[metric])
        return values

    @contextmanager
    def weighing(self, role: RoleHandle, gradient_norm: float) -> Iterator[None]:
        """Measures how far the block moves the stored weights of a role, at every INTERVAL-th update. An update whose
        gradients are all zero asks for no movement: the first one of a student that still equals its teacher."""
        if not self.config.enabled or role.num_updates % INTERVAL:
            yield
            return
        rate, peak = role.learning_rate, float(role.schedulers["transformer"].base_lrs[0])
        with self._timer("doctor"):
            parameters = role.parameters()
            before = stored_weights(parameters, self._num_ranks)
        yield
        with self._timer("doctor"):
            moved = squares(before, stored_weights(parameters, self._num_ranks))
            is_judged = gradient_norm > 0 and rate >= MIN_RATE * peak
            self._moved[role.name] = Moved(parameters[0].dtype, moved, is_judged)

    def watch(self, step: int, captions: Sequence[str]) -> dict[str, float]:
        """Judges the captions of the main rank's part of a batch, for the line of `step`."""
        if not self._is_main:
            return {}
        self._captions.extend(captions)
        if len(self._captions) < MIN_CAPTIONS or not any(self._captions):
            return {}
        return self._judge(step, "", "prompts", len(set(self._captions)))

    def validated(self, step: int, readings: Sequence[Reading], roles: RoleManager) -> dict[str, float]:
        """Judges the readings of a validation. Returns the doctor's values, for the line of `step`."""
        values: dict[str, float] = {}
        for reading in readings if self._is_main else ():
            reference = reading.reference
            if reference is None:
                role = roles[reading.role]
                if reading.role not in self._pretrained or (step and role.trainable and not role.num_updates):
                    continue  # nothing to compare with, or nothing learned yet
                reference = self._reference(f"{reading.role}/{reading.measure}", reading.value)
            if reference:  # one frame has no motion, and grey footage no colour
                values |= self._judge(step, reading.role, reading.measure, reading.value / reference)
        return values

    def _judge_recent(self, step: int, role: str, measure: str, value: float) -> dict[str, float]:
        """Judges the mean of the latest NUM_UPDATES values relative to that of the first ones of the run. A value that
        is not finite belongs to an update that is skipped, or ends the run by itself."""
        if not math.isfinite(value):
            return {}
        key = f"{role}/{measure}"
        recent = self._recent[key]
        recent.append(value)
        if len(recent) < NUM_UPDATES:
            return {}
        mean = sum(recent) / NUM_UPDATES
        reference = self._reference(key, mean)
        return self._judge(step, role, measure, mean / reference) if reference else {}

    def _reference(self, key: str, value: float) -> float:
        """Returns the first value of the run under `key`, which is `value` if there is none yet."""
        if key not in self._references:
            self._references[key] = value
            with atomic(self._stored) as temporary:
                temporary.write_text(json.dumps(self._references, indent=1), encoding="utf-8")
        return self._references[key]

    def _judge(self, step: int, role: str, name: str, value: float) -> dict[str, float]:
        """Compares a value with its healthy range. Raises the alarm when it leaves it. Returns it under its key of
        metrics.jsonl."""
        key, measure = _key(role, name), MEASURES[name]
        if not self._is_main:
            return {}
        if measure.is_healthy(value):
            self._out.discard(key)
        elif key not in self._out:
            self._out.add(key)
            self._alarm(step, role, measure, value)
        return {f"doctor/{key}": value}

    def _alarm(self, step: int, role: str, measure: Measure, value: float) -> None:
        message = measure.message(role, value)
        logger.warning("doctor: at step %d %s", step, message)
        number = value if math.isfinite(value) else None
        found = {"step": step, "role": role, "measure": measure.name, "value": number}
        self._file.write({**found, "healthy": measure.healthy, "message": message})
        if self.config.on_alarm == "stop":
            self._stop.is_alarmed = True


def _key(role: str, measure: str) -> str:
    return f"{role}/{measure}".lstrip("/")
