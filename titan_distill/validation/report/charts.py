"""Charts of the page, as data: which metrics share a chart, in which section, with which marks on the axis.

A metric `name/series` is one line of the chart `name`. The page draws the charts with plotly in the reader's browser.
A long curve is thinned to `MAX_POINTS`, of which every second is a lowest and every other a highest value of its
stretch, so that no spike is lost.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from titan_distill.observability.metrics import PAUSE_METRICS
from titan_distill.validation.report.measures import MEASURES
from titan_distill.validation.report.run_files import SAMPLES, RunFiles
from titan_distill.validation.report.verdict import DISTANCES

MAX_POINTS = 400
NUM_DIGITS = 5
"""Significant digits of the values in the page."""

TITLES = {
    "loss": "Loss",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "vsa_sparsity": "Sparsity of attention",
    "sliced_wasserstein_excess": "Distance to the reference (sliced Wasserstein, without its floor)",
    "sliced_wasserstein": "Distance to the reference (sliced Wasserstein)",
    "tokens_per_second": "Tokens per second",
    "tflops": "TFLOP per second and rank",
    "mfu": "MFU: model FLOPs utilisation",
    "hfu": "HFU: hardware FLOPs utilisation",
    "memory_gib": "Memory in GiB (on a CPU: of the process)",
    "nonfinite_skips": "Skipped updates",
}
SPEED = ("tokens_per_second", "tflops", "mfu", "hfu")
LOGARITHMIC = ("loss", "grad_norm")
FROM_ZERO = (*DISTANCES, "memory_gib", "seconds")
COLORS = {"student": 0, "teacher": 1, "critic": 2, "student before": 3, "teacher few steps": 4}
MERGED = {"vsa_sparsity_executed": ("vsa_sparsity", "executed")}
"""Metrics that belong in the chart of another, and the names of their lines there."""
NOT_SHOWN = ("step", "samples_seen")
PLANNED = "planned"
"""Line of a value that the planner computed."""
SECTIONS = ("Scores", "Training", "Speed and memory", "Doctor")


@dataclass
class Series:
    """One line of a chart."""

    name: str
    own: str
    """The name within its run."""
    x: list[int]
    y: list[float | None]
    color: int
    """Number of the colour."""
    dash: int = 0
    """Number of the dash pattern; 0 is a solid line."""


@dataclass
class Chart:
    """One chart."""

    title: str
    series: list[Series] = field(default_factory=list)
    is_logarithmic: bool = False
    is_stacked: bool = False
    starts_at_zero: bool = False
    is_dotted: bool = False
    """Points alone, for values that have nothing in between."""
    healthy: tuple[float | None, float | None] | None = None
    """Range of healthy values, drawn as a band."""


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step of all charts: a resume, a restart, a skipped update, an alarm."""

    step: int
    text: str
    is_fault: bool


def sections(runs: Sequence[RunFiles]) -> dict[str, list[Chart]]:
    """Returns the charts of one run, or of several in the same axes, by the title of their section."""
    found: dict[str, dict[str, Chart]] = {section: {} for section in SECTIONS}
    for number, run in enumerate(runs):
        keys = dict.fromkeys(key for line in run.metrics for key in line if key not in NOT_SHOWN)
        for key in keys:
            if not key.startswith("time/"):
                section, name, own = _place(key, run)
                chart = found[section].setdefault(name, Chart(_title(name), is_logarithmic=name in LOGARITHMIC))
                _add(chart, _points(run, key), own, number, run, len(runs))
        memory = found["Speed and memory"].get("memory_gib")
        planned = run.plan.get("memory_gib")
        if memory and isinstance(planned, (int, float)) and run.step:
            _add(memory, ([0, run.step], [planned, planned]), PLANNED, number, run, len(runs))
        _add_seconds(found["Speed and memory"], run, number, len(runs))
    for name, judged in found["Doctor"].items():
        if measure := MEASURES.get(name.removeprefix("doctor/")):
            judged.title, judged.healthy = f"{judged.title} (healthy: {measure.range_text()})", measure.healthy
    for charts in found.values():
        for chart in charts.values():
            values = [value for series in chart.series for value in series.y if value is not None]
            chart.is_logarithmic &= bool(values) and min(values) > 0
    for name, chart in (item for charts in found.values() for item in charts.items()):
        chart.starts_at_zero = name in FROM_ZERO or name.endswith("accuracy")
    order = [*DISTANCES, *(name for name in found["Scores"] if name not in DISTANCES)]
    found["Scores"] = {name: found["Scores"][name] for name in order if name in found["Scores"]}
    return {section: [*charts.values()] for section, charts in found.items() if charts}


def marks(runs: Sequence[RunFiles]) -> list[Mark]:
    """Returns the marks of all runs."""
    found: list[Mark] = []
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        for before, start in zip(run.starts, run.starts[1:]):
            ranks = f" on {start.num_ranks} ranks" if start.num_ranks != before.num_ranks else ""
            found.append(Mark(start.step, f"{prefix}{'restart' if start.is_restart else 'resume'}{ranks}", False))
        if run.starts and run.starts[0].step:
            found.append(Mark(run.starts[0].step, f"{prefix}start from another run", False))
        num_skips: dict[str, float] = {}
        for line in run.metrics:
            for key in (key for key in line if key.startswith("nonfinite_skips/")):
                if (value := line[key] or 0.0) > num_skips.get(key, 0.0):
                    num_skips[key] = value
                    found.append(Mark(int(line["step"] or 0), f"{prefix}skip of {key.partition('/')[2]}", True))
        found += [Mark(int(a["step"]), f"{prefix}alarm: {a.get('measure', '')}", True) for a in run.alarms]
    return found


def as_json(chart: Chart) -> dict[str, Any]:
    """Returns a chart as plain values, rounded."""
    plain = asdict(chart)
    for series in plain["series"]:
        series["y"] = [None if value is None else float(f"{value:.{NUM_DIGITS}g}") for value in series["y"]]
    return plain


def _place(key: str, run: RunFiles) -> tuple[str, str, str]:
    """Returns section, chart and line of a metric."""
    first, _, rest = key.partition("/")
    if first == "doctor":
        middle, _, last = rest.rpartition("/")
        return "Doctor", f"doctor/{last}", middle
    if key.startswith(SAMPLES):
        middle, _, last = rest.partition("/")
        labels = {sample.label for sampled in run.validations for sample in sampled.request.samples}
        if middle in labels or (last and middle != "loss"):
            return "Scores", last, middle.replace("_", " ")
        return "Scores", f"held-out {middle}", last
    if key in MERGED:
        return ("Training", *MERGED[key])
    if key in SPEED or key == "memory_gib":
        return "Speed and memory", key, "measured" if key == "memory_gib" else ""
    if rest and rest not in run.config.get("roles", {rest: None}):
        return "Training", key, ""  # a method's metric, not a value per role
    return "Training", first, rest


def _title(name: str) -> str:
    plain = name.removeprefix("doctor/").replace("_", " ").replace("/", ": ")
    return TITLES.get(name) or plain[:1].upper() + plain[1:]


def _points(run: RunFiles, key: str) -> tuple[list[int], list[float | None]]:
    """Returns steps and values of a metric. A role in training begins where it was before training."""
    found = [(int(line["step"] or 0), line[key]) for line in run.metrics if key in line]
    sampled = run.latest
    if sampled and sampled.now and sampled.before and key.startswith(prefix := f"{SAMPLES}{sampled.now.label}/"):
        before = f"{SAMPLES}{sampled.before.label}/{key.removeprefix(prefix)}"
        found = [(0, line[before]) for line in run.metrics[:1] if before in line and not line["step"]] + found
    return [step for step, _ in found], [value for _, value in found]


def _add(
    chart: Chart,
    points: tuple[list[int], list[float | None]],
    own: str,
    number: int,
    run: RunFiles,
    num_runs: int,
) -> None:
    """Adds a line. Colours tell a chart's lines apart, and a role or set of samples has the same one in all charts;
    with several runs colours tell the runs apart, and dashes the lines of each."""
    name = own if num_runs == 1 else " · ".join(part for part in (run.name, own) if part)
    taken = {series.color for series in chart.series}
    free = next(color for color in itertools.chain([COLORS.get(own, 0)], itertools.count()) if color not in taken)
    color = free if num_runs == 1 else number
    names = list(dict.fromkeys([*(series.own for series in chart.series), own]))
    dash = names.index(own) if num_runs > 1 or own == PLANNED else 0
    chart.series.append(Series(name, own, *thin(*points), color, dash))


def _add_seconds(charts: dict[str, Chart], run: RunFiles, number: int, num_runs: int) -> None:
    """Adds the seconds per step by phase, and those of each pause. With several runs: the sum over phases."""
    phases: dict[str, tuple[list[int], list[float | None]]] = {}
    totals: tuple[list[int], list[float | None]] = ([], [])
    last = 0
    names = [key for key in dict.fromkeys(key for line in run.metrics for key in line) if key.startswith("time/")]
    training = [name for name in names if name not in PAUSE_METRICS]
    for line in run.metrics:
        step = int(line["step"] or 0)
        if step > last and any(name in line for name in training):
            seconds = {name: (line.get(name) or 0.0) / (step - last) for name in training}
            for name, value in seconds.items():
                steps, values = phases.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
            totals[0].append(step)
            totals[1].append(sum(seconds.values()))
        last = step
    per_step = charts.setdefault("seconds", Chart("Seconds per step, by phase", is_stacked=num_runs == 1))
    if num_runs == 1:
        for name, points in phases.items():
            _add(per_step, points, name.removeprefix("time/"), number, run, num_runs)
    elif totals[0]:
        per_step.title = "Seconds per step"
        _add(per_step, totals, "", number, run, num_runs)
    if not per_step.series:
        del charts["seconds"]
    for name in PAUSE_METRICS:
        if name in names:
            pauses = charts.setdefault("pauses", Chart("Seconds of each pause", is_dotted=True))
            _add(pauses, _points(run, name), name.removeprefix("time/"), number, run, num_runs)


def thin(x: list[int], y: list[float | None]) -> tuple[list[int], list[float | None]]:
    """Returns at most `MAX_POINTS` points: the lowest and the highest of each stretch, and the last point."""
    if len(x) <= MAX_POINTS:
        return x, y
    num_stretches = MAX_POINTS // 2 - 1
    kept = {len(x) - 1}
    for stretch in range(num_stretches):
        positions = range(stretch * len(x) // num_stretches, (stretch + 1) * len(x) // num_stretches)
        known = [(value, position) for position in positions if (value := y[position]) is not None]
        kept |= {min(known)[1], max(known)[1]} if known else {positions[0]}
    return [x[position] for position in sorted(kept)], [y[position] for position in sorted(kept)]
