"""Files of a run's folder, as the page reads them. A file that is missing is left out; one that is damaged is an error
that names it."""

from __future__ import annotations

import math
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from titan_distill.config.parsing import read_toml
from titan_distill.config.paths import seen_from
from titan_distill.diffusion.requests import REQUEST_NAME, SampleRequest, ValidationRequest
from titan_distill.fault_tolerance.files import parse_json
from titan_distill.fault_tolerance.run_folder import Run, read_run
from titan_distill.fault_tolerance.run_lock import NAME as LOCK
from titan_distill.fault_tolerance.run_lock import PATIENCE_SECONDS
from titan_distill.fault_tolerance.starts import Start, read_starts

METRICS, CONFIG, PLAN, ALARMS = "metrics.jsonl", "config.toml", "plan.json", "doctor.jsonl"
EVALUATION = Path("evaluation") / "evaluation.json"
SAMPLES = "validation/"
"""Prefix of the metrics that a validation logs."""

Line = dict[str, float | None]
"""One logged step: `step` and its values. None is a value that was not finite."""


@dataclass(frozen=True)
class Sampled:
    """The videos of one validation."""

    step: int
    folder: Path
    request: ValidationRequest
    prompts: dict[int, str]
    """Prompts whose videos were written, by their number."""

    @property
    def now(self) -> SampleRequest | None:
        """The samples of the role in training."""
        return next((sample for sample in self.request.samples if not sample.baseline), None)

    @property
    def reference(self) -> SampleRequest | None:
        """The samples that the others are compared with."""
        return next((sample for sample in self.request.samples if sample.label == self.request.reference), None)

    @property
    def before(self) -> SampleRequest | None:
        """The samples of the same role before training."""
        role = self.now.role if self.now else None
        return next((s for s in self.request.samples if s.baseline and s.role == role), None)

    @property
    def rival(self) -> SampleRequest | None:
        """Other samples of the reference's role: in as few steps as the role in training has."""
        reference = self.reference
        others = (s for s in self.request.samples if reference and s.role == reference.role and s != reference)
        return next(others, None)


@dataclass(frozen=True)
class RunFiles:
    """The content of one run's folder."""

    folder: Path
    name: str
    is_running: bool
    metrics: list[Line]
    config: dict[str, Any]
    """Resolved configuration as nested tables; empty if there is none."""
    config_text: str
    run: Run | None
    starts: list[Start]
    plan: dict[str, Any]
    alarms: list[dict[str, Any]]
    evaluation: dict[str, Any]
    validations: list[Sampled] = field(default_factory=list)
    """Validations that wrote videos, oldest first."""

    @property
    def step(self) -> int:
        """Newest logged step."""
        return int(self.metrics[-1]["step"] or 0) if self.metrics else 0

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run."""
        return self.config.get("training", {}).get("steps")

    @property
    def latest(self) -> Sampled | None:
        """The newest validation that wrote videos."""
        return self.validations[-1] if self.validations else None

    def newest(self, key: str) -> float | None:
        """The last value of a metric; None if it was never logged, or was not finite."""
        return next((line[key] for line in reversed(self.metrics) if key in line), None)

    def oldest(self, key: str) -> float | None:
        """The first value of a metric."""
        return next((line[key] for line in self.metrics if key in line), None)


def told_apart(runs: Sequence[RunFiles]) -> list[RunFiles]:
    """Returns the runs; those that share a name are called by the part of their folders' paths that differs."""
    count = Counter(run.name for run in runs)
    folders = [run.folder.resolve() for run in runs]
    shared = os.path.commonpath([folder.parent for folder in folders])
    return [
        replace(run, name=os.path.relpath(folder, shared)) if count[run.name] > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]


def read_run_files(folder: Path, *, is_running: bool | None = None) -> RunFiles:
    """Reads a run's folder. Without `is_running`, a lock that was renewed in the last minute says that the run goes on.

    Raises:
        ValueError: a folder of no run, or a damaged file.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}{seen_from(folder)}; name the folder of a run, outputs/NAME")
    if not any((folder / name).is_file() for name in (METRICS, CONFIG)):
        raise ValueError(f"{folder} has neither {METRICS} nor {CONFIG}; name the folder of a run, outputs/NAME")
    config_file = folder / CONFIG
    config = read_toml(str(config_file)) if config_file.is_file() else {}
    metrics, validations = _read_lines(folder / METRICS), _read_validations(folder / "validation")
    # After a resume from an earlier step, later ones are no part of the run until it reaches them again.
    step = int(metrics[-1]["step"] or 0) if metrics else math.inf
    return RunFiles(
        folder=folder,
        name=config.get("job", {}).get("name") or folder.resolve().name,
        is_running=_is_locked(folder) if is_running is None else is_running,
        metrics=metrics,
        config=config,
        config_text=config_file.read_text(encoding="utf-8") if config else "",
        run=read_run(folder),
        starts=read_starts(folder),
        plan=_read_object(folder / PLAN),
        alarms=_read_lines(folder / ALARMS),
        evaluation=_read_object(folder / EVALUATION),
        validations=[sampled for sampled in validations if sampled.step <= step],
    )


def _is_locked(folder: Path) -> bool:
    try:
        return time.time() - (folder / LOCK).stat().st_mtime < PATIENCE_SECONDS
    except OSError:
        return False


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); move it away") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object; move it away")
    return found


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines that have a step. A last line without its end is one that is being written."""
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            values = parse_json(line)
            int(values["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is damaged; remove the line") from error
        found.append(values)
    return found


def _read_validations(folder: Path) -> list[Sampled]:
    found = []
    for path in sorted(folder.glob("step-*")):
        step = re.fullmatch(r"step-(\d{8,})", path.name)
        content = _read_object(path / REQUEST_NAME)
        captions = path / "captions.txt"
        if not step or not content or not captions.is_file():
            continue
        try:
            request = ValidationRequest(
                tuple(SampleRequest(**sample) for sample in content["samples"]), content["reference"]
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path / REQUEST_NAME} is damaged ({error}); move it away") from error
        lines = (line.partition(" ") for line in captions.read_text(encoding="utf-8").split("\n"))
        prompts = {int(number): text for number, _, text in lines if number.isdecimal()}
        found.append(Sampled(int(step[1]), path, request, prompts))
    return sorted(found, key=lambda sampled: sampled.step)
