"""Measured runs of the shipped jobs, for docs/recipes/: `benchmarks/results/recipes/NAME.json`.

`record` makes such a file of a run's folder. It holds the curves, the scores, seconds and peak memory, the command, the
machine, and the values that the job's TOML had. A card can therefore say that it shows a run of an older version of the
TOML, and name the keys that differ. Jobs without a file may have a golden curve, which is their first eight steps.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import golden
from benchmarks.machine import machine
from titan_distill.config.parsing import read_toml

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "recipes"
CONFIGS = REPOSITORY / "train_configs"
CURVES = ("loss/", "vsa_sparsity", "validation/student/")
"""Beginnings of the keys of metrics.jsonl that are kept step by step."""
SCORES = "validation/"
DIGITS = 5
GOLDEN_JOB = re.compile(r"^# Golden job: train_configs/(\S+)\.toml")


@dataclass(frozen=True)
class Measured:
    """One recorded run.

    Attributes:
        curves: steps and values of each kept key of metrics.jsonl.
        scores: last value of each key of a validation, without the prefix `validation/`.
        seconds: seconds from the start to the last line of metrics.jsonl, validations included.
        memory_gib: peak memory of a rank: of the process on a CPU, allocated by torch on a GPU.
        values: the values that the run had for the keys of the job's TOML.
    """

    machine: dict[str, Any]
    command: str
    seconds: float
    memory_gib: float
    values: dict[str, Any]
    scores: dict[str, float]
    curves: dict[str, tuple[list[int], list[float]]]


def record(folder: Path) -> Path:
    """Writes the result file of a finished run and returns its path.

    Raises ValueError for a folder of no shipped job, and for a run that has not reached its last step.
    """
    config = flatten(read_toml(str(folder / "config.toml")))
    name, steps = config["job.name"], config["training.steps"]
    shipped = CONFIGS / f"{name}.toml"
    if not shipped.exists():
        raise ValueError(f"{folder} is a run of the job {name!r}; train_configs/ has no {name}.toml")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if rows[-1]["step"] < steps:
        raise ValueError(f"{folder} ends at step {rows[-1]['step']} of {steps}; let the run finish and record it then")
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    seconds = (folder / "metrics.jsonl").stat().st_mtime - datetime.fromisoformat(run["created"]).timestamp()
    keys = [key for key in flatten(read_toml(str(shipped))) if not key.startswith("job.")]
    result = {
        "machine": machine() | {"date": run["created"][:10]},
        "command": " ".join(["./run_train.sh", *_experiment(run["command"])]),
        "seconds": round(seconds),
        "memory_gib": round(max(row.get("memory_gib", 0.0) for row in rows), 2),
        "values": {key: config[key] for key in keys if key in config},
        "scores": {
            key.removeprefix(SCORES): _rounded(value)
            for row in rows
            for key, value in row.items()
            if key.startswith(SCORES)
        },
        "curves": dict(_curves(rows)),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return path


def measured(name: str) -> Measured | None:
    """The recorded run of a job; None without one."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return Measured(**content | {"curves": {key: tuple(pair) for key, pair in content["curves"].items()}})


def changed(values: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose value in a run differs from the job's of today, each with both values."""
    return {key: (old, now[key]) for key, old in values.items() if key in now and not _same(old, now[key])}


def golden_curves(name: str) -> tuple[str, golden.Curves] | None:
    """Name and curves of the golden job that is cut from a shipped job; None if there is none."""
    for golden_name in golden.NAMES:
        text = (golden.FOLDER / f"{golden_name}.toml").read_text(encoding="utf-8")
        if (found := GOLDEN_JOB.match(text)) and found[1] == name:
            return golden_name, golden.read(golden_name)["curves"]
    return None


def golden_values(golden_name: str) -> dict[str, Any]:
    """Values of a golden job's method, and of its videos."""
    values = flatten(read_toml(str(golden.FOLDER / f"{golden_name}.toml")))
    return {key: value for key, value in values.items() if key.startswith(("method_config.", "pipeline_config."))}


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested tables by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _curves(rows: list[dict[str, Any]]) -> Iterator[tuple[str, tuple[list[int], list[float]]]]:
    names = {key: None for row in rows for key in row if key.startswith(CURVES)}
    for name in names:
        before = name.replace("validation/student/", "validation/student_before/")
        points = {row["step"]: _rounded(row[key]) for row in rows for key in (before, name) if key in row}
        yield name, (list(points), list(points.values()))


def _experiment(command: list[str]) -> Iterator[str]:
    """The arguments of a command without those that say where its output goes."""
    arguments = iter(command)
    for argument in arguments:
        if argument in ("--job.output_dir", "--checkpoint.resume_from"):
            next(arguments)
        else:
            yield argument


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    return bool(old == new)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else value
