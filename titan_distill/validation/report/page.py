"""The page of a run, or of several: one HTML file that needs nothing else, neither other files nor a network.

Styles, scripts, films and plotly are inside. Plotly is 4.8 MB, which the page carries compressed (1.7 MB, 2.3 as text)
and the browser unpacks.
"""

from __future__ import annotations

import base64
import datetime
import gzip
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from titan_distill.checkpoint.discovery import CHECKPOINTS, step_folders
from titan_distill.checkpoint.tools.inspect import HEADINGS, describe_steps, num_bytes
from titan_distill.config.degrees import Degrees
from titan_distill.config.text import toml_value
from titan_distill.fault_tolerance.files import atomic
from titan_distill.observability.metrics import PAUSE_METRICS
from titan_distill.validation.report.charts import as_json, marks, sections
from titan_distill.validation.report.layout_picture import layout_picture, left_out
from titan_distill.validation.report.run_files import RunFiles, read_run_files, told_apart
from titan_distill.validation.report.verdict import compare, judge
from titan_distill.validation.report.videos import BUDGET_BYTES, columns, films

NAME = "report.html"
REFRESH_SECONDS = 60
"""Period after which the page of a run that goes on loads itself again."""
PLANNED = {
    "memory_gib": ("Peak memory of the fullest rank, GiB (measured on a CPU: the whole process)", "memory_gib"),
    "step_seconds": ("Seconds per step", ""),
    "validation_seconds": ("Seconds per validation", "time/validation"),
    "checkpoint_seconds": ("Seconds per checkpoint", "time/checkpoint"),
    "checkpoint_gib": ("GiB per checkpoint", ""),
    "hours": ("Hours of the run", ""),
    "gpu_hours": ("GPU-hours of the run", ""),
}
"""Keys of `plan.json`: title, and the metric that measures the same."""

logger = logging.getLogger(__name__)


def write_page(folders: Sequence[Path], out: Path, *, is_running: bool | None = None) -> None:
    """Writes the page of one run's folder, or a comparison of several.

    Args:
        folders: the runs, the first of which gives teacher and start to the films.
        out: file to write.
        is_running: whether the first run goes on; None looks at its lock. The page of such a run loads itself again.

    Raises:
        ValueError: a folder of no run, or a damaged file in it.
    """
    first, *others = folders
    _write(told_apart([read_run_files(first, is_running=is_running), *map(read_run_files, others)]), out)


def update_page(folder: Path, *, is_running: bool) -> None:
    """Writes `report.html` of the run in `folder`, and logs its verdict. A failure is one warning, because a run does
    not need its page."""
    try:
        run = read_run_files(folder, is_running=is_running)
        _write([run], folder / NAME)
        if run.step:
            logger.info("%s", judge(run).sentence)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        logger.warning("warning: the page %s was not written (%s); the run goes on", folder / NAME, reason)


def _write(runs: Sequence[RunFiles], out: Path) -> None:
    text = page(runs)
    with atomic(out) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(runs: Sequence[RunFiles], budget_bytes: int = BUDGET_BYTES) -> str:
    """Returns the text of the page."""
    shown = columns(runs)
    made, note = films(shown, budget_bytes)
    charts = {title: [as_json(chart) for chart in found] for title, found in sections(runs).items()}
    data = {
        "sections": charts,
        "marks": [vars(mark) for mark in marks(runs)],
        "library": _library(),
    }
    return _template().render(
        runs=runs,
        title=" · ".join(run.name for run in runs),
        refresh=REFRESH_SECONDS if any(run.is_running for run in runs) else None,
        written=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        recipes=dict.fromkeys(f"{r['method']} on {r['family']}" for run in runs if (r := run.config.get("recipe"))),
        comparison=compare(runs) if len(runs) > 1 else "",
        verdicts=[judge(run) for run in runs],
        columns=shown,
        films=made,
        film_note=note,
        sections=charts,
        plans=[rows for run in runs if (rows := list(_planned(run)))],
        starts=[_starts(run) for run in runs],
        layouts=[(run, list(_layouts(run))) for run in runs],
        changes=runs[0].starts[-1].changes if len(runs) == 1 and runs[0].starts else None,
        differences=_differences(runs) if len(runs) > 1 else [],
        headings=_ageless(HEADINGS),
        checkpoints=[[*map(_ageless, describe_steps(run.folder / CHECKPOINTS))] for run in runs],
        evaluations=[(run, *_evaluation(run.evaluation)) for run in runs if run.evaluation],
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        style=_asset("page.css"),
        script=_asset("page.js"),
    )


def _ageless(row: Sequence[str]) -> list[str]:
    """Returns a row of the table of checkpoints without their age, which does not hold when the page is read."""
    return [cell for cell, heading in zip(row, HEADINGS) if heading != "age"]


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("page.html"))


def _asset(name: str) -> str:
    return (files("titan_distill.validation.report") / name).read_text(encoding="utf-8")


@cache
def _library() -> str:
    """Returns plotly's script as base64, compressed at the level that takes little of a run's time."""
    # A path in its distribution, because an import of plotly takes longer than all the rest.
    script = Path(str(distribution("plotly").locate_file("plotly/package_data/plotly.min.js"))).read_bytes()
    return base64.b64encode(gzip.compress(script, 1, mtime=0)).decode()


def _planned(run: RunFiles) -> Iterator[tuple[str, str, str, str]]:
    """Yields title, run, planned and measured value of everything that was planned."""
    for key, (title, metric) in PLANNED.items():
        planned = run.plan.get(key)
        measured = MEASURED[key](run) if key in MEASURED else run.newest(metric) if metric else None
        if planned is not None:
            yield title, run.name, f"{planned:.3g}", "" if measured is None else f"{measured:.3g}"


def _seconds_per_step(run: RunFiles) -> float | None:
    """Returns the median over the logged lines of the seconds per step, without pauses."""
    found, last = [], 0
    for line in run.metrics:
        step = int(line["step"] or 0)
        seconds = sum(
            value or 0.0 for key, value in line.items() if key.startswith("time/") and key not in PAUSE_METRICS
        )
        if step > last and seconds:
            found.append(seconds / (step - last))
        last = step
    return sorted(found)[len(found) // 2] if found else None


def _checkpoint_gib(run: RunFiles) -> float | None:
    newest = next(iter(step_folders(run.folder / CHECKPOINTS)), None)
    return None if newest is None else num_bytes(newest) / 2**30


MEASURED = {"step_seconds": _seconds_per_step, "checkpoint_gib": _checkpoint_gib}
"""Measured values that no metric has."""


def _layouts(run: RunFiles) -> Iterator[tuple[str, str, str, str]]:
    """Yields role, layout in words, picture, and a note on what the picture leaves out."""
    for role, named in (run.starts[-1].layouts if run.starts else {}).items():
        degrees = Degrees(**named)
        yield (
            role,
            f"{degrees.world_size} rank{'s' * (degrees.world_size > 1)}: {degrees}",
            layout_picture(degrees),
            left_out(degrees),
        )


def _starts(run: RunFiles) -> list[list[str]]:
    return [
        [
            start.time + (" (restart)" if start.is_restart else ""),
            str(start.step),
            str(start.num_ranks),
            start.device,
            ", ".join(f"{name} {version}" for name, version in start.versions.items()),
        ]
        for start in run.starts
    ]


def _differences(runs: Sequence[RunFiles]) -> list[list[str]]:
    """Returns the keys whose values differ between runs, each with the value of each run."""
    flat = [dict(_flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = ([key, *(values.get(key, "–") for values in flat)] for key in keys if key != "job.name")
    return [row for row in rows if len({*row[1:]}) > 1]


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", toml_value(value)


def _evaluation(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns headings and rows of the table of `titan-distill evaluate`: a column for each subject, because there are
    more measures than subjects."""
    subjects = [subject for subject in evaluation.get("subjects", []) if isinstance(subject, dict)]
    plain = [key for key in ("steps", "guidance", "forwards_per_video", "seconds_per_video") if _any_has(subjects, key)]
    scores = list(dict.fromkeys(name for subject in subjects for name in subject.get("scores") or {}))
    rows: dict[str, list[Any]] = {key: [subject.get(key) for subject in subjects] for key in plain}
    rows |= {name: [(subject.get("scores") or {}).get(name) for subject in subjects] for name in scores}
    shown = [
        [name.replace("_", " "), *("–" if value is None else _short(value) for value in values)]
        for name, values in rows.items()
    ]
    return ["", *(str(subject.get("name", "")) for subject in subjects)], shown


def _any_has(subjects: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(subject.get(key) is not None for subject in subjects)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
