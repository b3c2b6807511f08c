"""Recipe cards, one page per shipped job: `python -m benchmarks.recipe_cards`.

    python -m benchmarks.recipe_cards                       writes docs/recipes/ anew
    python -m benchmarks.recipe_cards record outputs/NAME   keeps a finished run as a result, and writes docs/recipes/

A card says what a job does, what it needs, what its run looks like, and where it departs from the published recipe. All
figures come from files: the job's TOML, its line `# Planned: …` (which `benchmarks.budget` writes), recorded runs
(`benchmarks/results/recipes/`) and golden curves. What no file says stands in `benchmarks/recipes.toml`; in its texts
{section.key} stands for the job's value. A test compares docs/recipes/ with what this command writes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import golden, recipe_plots
from benchmarks.recipe_results import (
    CONFIGS,
    REPOSITORY,
    Measured,
    changed,
    flatten,
    golden_curves,
    golden_values,
    measured,
    record,
)
from titan_distill.config.config import Config
from titan_distill.config.loading import load_config
from titan_distill.config.parsing import read_toml
from titan_distill.config.text import to_dict
from titan_distill.diffusion.schedule import few_step_sigmas
from titan_distill.methods.base import method_class

FOLDER = REPOSITORY / "docs" / "recipes"
TEXTS = REPOSITORY / "benchmarks" / "recipes.toml"
COMMAND = "python -m benchmarks.recipe_cards"
PLANNED = re.compile(
    r"^# Planned: (?P<ranks>\d+) × (?P<gpu>\w+), (?P<gib>[\d.]+) of [\d.]+ GiB.*?, (?P<seconds>[\d.]+) s per step.*$",
    re.MULTILINE,
)
COMMAND_LINE = re.compile(r"^#   ((?:NGPU=\d+ )?(?:titan-distill|torchrun|\./run_train\.sh|python) .*?)$", re.MULTILINE)
SHOWN_SCORES = ("prompt_accuracy", "sliced_wasserstein_excess")
BARE = {"", "ours"}
"""Comments beside a value that give no reason for it."""


@dataclass(frozen=True)
class Plan:
    """The plan that a TOML quotes."""

    ranks: int
    gpu: str
    gib: float
    seconds: float


@dataclass(frozen=True)
class Job:
    """A shipped job: its TOML, and what `benchmarks/recipes.toml` says of it."""

    name: str
    source: str
    config: Config
    hand: Mapping[str, Any]

    @property
    def file(self) -> str:
        return f"train_configs/{self.name}.toml"

    @property
    def is_small(self) -> bool:
        return self.name.startswith("tiny_")

    @functools.cached_property
    def values(self) -> dict[str, Any]:
        """Values of all keys, defaults included."""
        return flatten(to_dict(self.config))

    @functools.cached_property
    def plan(self) -> Plan | None:
        found = PLANNED.search(self.source)
        if found is None:
            return None
        return Plan(int(found["ranks"]), found["gpu"], float(found["gib"]), float(found["seconds"]))

    @functools.cached_property
    def measured(self) -> Measured | None:
        return measured(self.name)

    def fill(self, text: str) -> str:
        """A hand-written text with the job's values in place of {section.key} and {num_steps}."""
        known = {"num_steps": len(self.values.get("method_config.denoising_steps", ()))} | self.values
        return re.sub(r"\{([\w.]+)\}", lambda found: show(known[found[1]]), text)


@dataclass(frozen=True)
class Departure:
    """A value that differs from the published one."""

    key: str
    published: Any
    here: Any
    reason: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes docs/recipes/."""
    parser = argparse.ArgumentParser(description="Writes docs/recipes/ from the shipped jobs and their results.")
    parser.add_argument("action", nargs="?", choices=["write", "record"], default="write")
    parser.add_argument("folders", nargs="*", type=Path, help="folders of finished runs, for `record`")
    options = parser.parse_args(arguments)
    for folder in options.folders:
        print(f"wrote {record(folder)}")
    written = pages()
    for path in [*FOLDER.glob("*.md"), *FOLDER.glob("*.svg")]:
        if path.name not in written:
            path.unlink()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """All files of docs/recipes/ by their names: cards, plots and the table of all jobs."""
    all_jobs = jobs()
    plots = {f"{job.name}.svg": plot for job in all_jobs if (plot := _plot(job))}
    return {f"{job.name}.md": card(job) for job in all_jobs} | plots | {"README.md": overview(all_jobs)}


@functools.cache
def texts() -> dict[str, Any]:
    """The hand-written part: `published`, `methods`, `data`, `small` and `jobs`."""
    return read_toml(str(TEXTS))


def jobs() -> list[Job]:
    """All shipped jobs. Raises ValueError for a job that `benchmarks/recipes.toml` does not have, or has in vain."""
    files = sorted(CONFIGS.glob("*.toml"))
    hand = texts()["jobs"]
    if different := sorted({path.stem for path in files} ^ set(hand)):
        raise ValueError(f"train_configs/ and [jobs] of benchmarks/recipes.toml do not agree on {', '.join(different)}")
    return [Job(path.stem, path.read_text(encoding="utf-8"), _load(path), hand[path.stem]) for path in files]


def _load(path: Path) -> Config:
    return load_config(["--job.config_file", str(path)])


# A card -------------------------------------------------------------------------------------------


def card(job: Job) -> str:
    """The page of one job."""
    method = texts()["methods"][job.config.recipe.method]
    sections = [
        f"# {job.name}",
        f"<!-- Written by `{COMMAND}` from {job.file} and benchmarks/recipes.toml. -->",
        job.fill(job.hand["does"]),
        _at_a_glance(job),
        "## Command",
        _commands(job),
        "## Needs",
        *_needs(job),
        "## Expected curve",
        *_expected(job),
        "## What to look at",
        _bullets(job, [*job.hand.get("look", []), *method["look"]]),
        "## What goes wrong",
        _bullets(job, [*job.hand.get("wrong", []), *method["wrong"]]),
        "## The published recipe, and departures",
        *_recipe(job, method),
    ]
    return "\n\n".join(sections) + "\n"


def _at_a_glance(job: Job) -> str:
    config, values = job.config, job.values
    pipeline = config.pipeline_config
    rows = [("configuration", f"`{job.file}`"), ("method", f"`{config.recipe.method}`")]
    rows += [(name, _role(job, name)) for name in config.roles]
    size = f"{pipeline.num_frames} frames of {pipeline.width} × {pipeline.height}"
    rows.append(("video", f"{size}, shift {show(pipeline.flow_shift)}"))
    if "method_config.denoising_steps" in values:
        schedule = values["method_config.denoising_steps"]
        levels = few_step_sigmas(schedule, pipeline.flow_shift, values["method_config.warp"]).tolist()
        timesteps = ", ".join(f"{1000 * level:.4g}" for level in levels if level > 0)
        rows.append(("student's samples", f"{len(schedule)} steps, at timesteps {timesteps}, without guidance"))
    updates = method_class(config.recipe.method).num_updates(config.method_config, config.training.steps)
    shown = ", ".join(f"{name} {show(number)}" for name, number in updates.items())
    steps = f"{show(config.training.steps)} steps of {config.training.global_batch_size} samples"
    rows.append(("training", f"{steps}; updates: {shown}"))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _role(job: Job, name: str) -> str:
    role = job.config.roles[name]
    start = role.path or role.init_from
    parts = [
        role.flavor,
        f"{role.attention} attention" if name != "discriminator" else "",
        f"from `{start}`" if start else "from random weights",
    ]
    if not role.trainable:
        parts.append("frozen")
    else:
        trained = f"LoRA of rank {role.lora.rank}" if role.lora.rank else "all weights"
        parts.append(f"trained ({trained}), learning rate {show(role.optimizer.lr)}")
    return ", ".join(part for part in parts if part)


def _commands(job: Job) -> str:
    return "\n".join(["```", *(job.fill(command) for command in commands(job)), "```"])


def commands(job: Job) -> list[str]:
    """Commands in the order in which they run: data, earlier stages, plan, training."""
    joined = re.sub(r" \\\n#\s+", " ", job.source)  # lines that a backslash continues
    quoted = [command for command in COMMAND_LINE.findall(joined) if " data " in command]
    data = job.hand["data"]
    made = [texts()["data"]["videos"]["command"]] if data == "videos" and not quoted else quoted
    before = [*([] if data == "shipped" else made), *job.hand.get("before", [])]
    ranks = f"NGPU={job.plan.ranks} " if job.plan else ""
    plan = [f"{ranks}titan-distill plan {job.file}"] if job.plan else []
    name = "" if job.name == "tiny_wan_dmd2" else f" --job.config_file {job.file}"
    return [*before, *plan, f"{ranks}./run_train.sh{name}"]


def _needs(job: Job) -> Iterator[str]:
    yield f"**Data.** {job.fill(texts()['data'][job.hand['data']]['text'])}"
    paths = [job.values["pipeline_config.path"], *(role.path or role.init_from for role in job.config.roles.values())]
    if prompts := job.config.validation.prompts:
        yield f"**Prompts of validations.** `{prompts}`."
    within = tuple(f"{path}/" for path in paths)
    weights = dict.fromkeys(path for path in paths if path and not path.startswith(("outputs/", *within)))
    if weights:
        yield f"**Weights.** {', '.join(f'`{path}`' for path in weights)}."
    earlier = [path for path in paths if path.startswith("outputs/")]
    if earlier:
        yield f"**Earlier runs.** {', '.join(f'`{path}`' for path in earlier)}: see {_link(job.hand['after'])}."
    yield f"**Hours and memory.** {_hours(job)}"


def _hours(job: Job) -> str:
    found, plan = job.measured, job.plan
    shown = []
    if plan:
        hours = plan.seconds * job.config.training.steps / 3600
        shown.append(
            f"Planned for {plan.ranks} × {plan.gpu}: {show(hours)} hours ({show(hours * plan.ranks)} GPU-hours) for "
            f"{show(job.config.training.steps)} steps of {plan.seconds} s at assumed rates, without validations and "
            f"saves; {plan.gib} GiB on the fullest rank."
        )
    if found:
        shown.append(
            f"Measured on {_machine(found)}: {_duration(found.seconds)} from start to end, validations included; peak "
            f"memory of the process {found.memory_gib} GiB."
        )
    if not shown and (time := job.hand.get("logged", {}).get("time")):
        shown.append(f"Measured on a CPU: {time}, see below; its memory is not recorded.")
    return " ".join(shown or ["A CPU is enough; neither time nor memory is recorded."])


def _machine(found: Measured) -> str:
    kind = found.machine["accelerator"] or found.machine["processor"]
    return f"{found.machine['num_cores']} shared cores of {kind}, {found.machine['date']}"


def _expected(job: Job) -> Iterator[str]:
    if found := job.measured:
        yield (
            f"A recorded run, {found.machine['date']}: `{found.command}`. Lines are means of neighbouring steps, bands "
            "their spread."
        )
        if differences := _old_values(job, found.values):
            yield differences.strip()
    elif pair := golden_curves(job.name):
        yield (
            f"The golden curve `tests/golden/{pair[0]}.json`: the first steps of this job in small batches, which any "
            f"machine repeats within {golden.AGAINST_FILE:g} (`python -m benchmarks.golden check --only {pair[0]}`). A "
            f"run of the whole job is not recorded.{_old_values(job, golden_values(pair[0]), 'The golden job has')}"
        )
    elif job.is_small:
        yield "No run is recorded: `python -m benchmarks.recipe_cards record` keeps one."
    else:
        yield "This job has not been run: no curve and no score is known."
    if _plot(job):
        yield f"![Curves of {job.name}]({job.name}.svg)"
    if small := job.hand.get("small"):
        yield f"For figures of the same method at small size, see {_link(small)}."
    if found:
        yield _scores(found)
    elif logged := job.hand.get("logged"):
        figures = ", ".join(logged[figure] for figure in ("time", "score") if figure in logged)
        yield f"From `docs/log.md`, {logged['section']}: {figures}.{_old_values(job, logged['values'])}"


def _old_values(job: Job, values: Mapping[str, Any], begin: str = "That run had") -> str:
    """A sentence on values of a run that are not those of the job's TOML; "" without such."""
    different = changed(values, job.values).items()
    listed = ", ".join(f"`{key}` = {show(old)} (now {show(new)})" for key, (old, new) in different)
    return f" {begin} other values: {listed}." if listed else ""


def _plot(job: Job) -> str | None:
    """Plot of the losses, and of what a run with several validations has shown; None without curves."""
    if found := job.measured:
        return recipe_plots.svg({name: curve for name, curve in found.curves.items() if _is_shown(name, curve)})
    if pair := golden_curves(job.name):
        losses = {name: values for name, values in pair[1].items() if name.startswith("loss/")}
        return recipe_plots.svg({name: (range(1, len(values) + 1), values) for name, values in losses.items()})
    return None


def _is_shown(name: str, curve: tuple[list[int], list[float]]) -> bool:
    return not name.startswith("validation/") or (len(curve[0]) > 2 and name.endswith(SHOWN_SCORES))


def _scores(found: Measured) -> str:
    """Table of the last validation: a row per set of samples, a column per metric."""
    pairs = [key.rsplit("/", 1) for key in found.scores]
    metrics = list(dict.fromkeys(metric for _, metric in pairs))
    rows = [
        f"| {label.replace('_', ' ')} | "
        + " | ".join(
            f"{found.scores[key]:.3g}" if (key := f"{label}/{metric}") in found.scores else "" for metric in metrics
        )
        + " |"
        for label in dict.fromkeys(label for label, _ in pairs)
    ]
    head = [
        f"| samples | {' | '.join(metric.replace('_', ' ') for metric in metrics)} |",
        "|---" * (len(metrics) + 1) + "|",
    ]
    return "\n".join([*head, *rows]) if rows else "Its validations have videos and no score."


def _bullets(job: Job, lines: Sequence[str]) -> str:
    return "\n".join(f"- {job.fill(line)}" for line in lines)


def _recipe(job: Job, method: Mapping[str, Any]) -> Iterator[str]:
    papers = ", ".join(f"[{name}](https://arxiv.org/abs/{number})" for name, number in method["papers"].items())
    yield (f"Papers of the method: {papers}. {texts()['formulas']}" if papers else "The method is plain regression.")
    name = job.hand.get("published")
    if not name:
        yield job.fill(job.hand["unpublished"])
        return
    published = texts()["published"][name]
    yield f"Compared with [{published['name']}]({published['source']}). {published['text']}"
    found = departures(job)
    same = [key for key in published["values"] if key in job.values and key not in {each.key for each in found}]
    yield f"Same values: {', '.join(f'`{key}`' for key in same)}."
    if found:
        rows = [f"| `{each.key}` | {show(each.published)} | {show(each.here)} | {each.reason} |" for each in found]
        yield "\n".join(["| key | published | here | reason |", "|---|---|---|---|", *rows])
    if others := job.hand.get("also"):
        yield _bullets(job, ["Other departures:"])[2:] + "\n\n" + _bullets(job, others)


def departures(job: Job) -> list[Departure]:
    """Values of a job that differ from its published recipe. A key that the job's method lacks is no departure."""
    published = texts()["published"][job.hand["published"]]["values"] if "published" in job.hand else {}
    keys = [key for key, theirs in published.items() if key in job.values and not _equal(theirs, job.values[key])]
    return [Departure(key, published[key], job.values[key], job.fill(reason(job, key))) for key in keys]


def reason(job: Job, key: str) -> str:
    """The reason for a departure: of the job's texts, of those for all small jobs, or the TOML's comment."""
    own, small = job.hand.get("reasons", {}), texts()["small"]["reasons"] if job.is_small else {}
    written = comment(job.source, key)
    return own.get(key) or small.get(key) or ("" if written in BARE else written)


def comment(source: str, key: str) -> str:
    """Comment beside a key's value, with the comment lines that continue it; "" for none. The value may stand in an
    inline table."""
    *tables, name = key.split(".")
    written = [(".".join(tables), name), (".".join(tables[:-1]), tables[-1])]
    lines = next((lines for table, key in written if (lines := _lines_from(source, table, key))), [])
    if not lines or "#" not in lines[0]:
        return ""
    continued = itertools.takewhile(lambda line: re.match(r" +#", line), lines[1:])
    return " ".join(line.split("#", 1)[1].strip() for line in (lines[0], *continued))


def _lines_from(source: str, table: str, key: str) -> list[str]:
    """Lines of a table from the key's on; none without the key."""
    _, _, rest = source.partition(f"\n[{table}]\n")
    lines = rest.split("\n[", 1)[0].splitlines()
    return list(itertools.dropwhile(lambda line: not line.startswith(f"{key} ="), lines))


# All jobs -----------------------------------------------------------------------------------------


def overview(all_jobs: Sequence[Job]) -> str:
    """docs/recipes/README.md."""
    head = ["| job | method | time | score | needs |", "|---|---|---|---|---|"]
    rows = [
        [
            _link(job.name),
            f"`{job.config.recipe.method}`",
            _time(job),
            _score(job),
            _machine_needed(job),
        ]
        for job in all_jobs
    ]
    table = "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])
    return "\n\n".join(["# Recipes", f"<!-- Written by `{COMMAND}`. -->", *texts()["overview"], table]) + "\n"


def _machine_needed(job: Job) -> str:
    data = texts()["data"][job.hand["data"]]["short"]
    return f"{job.plan.ranks} × {job.plan.gpu}, {job.plan.gib} GiB; {data}" if job.plan else f"a CPU; {data}"


def _time(job: Job) -> str:
    if job.measured:
        return f"{_duration(job.measured.seconds)}, measured"
    if job.plan:
        return f"{_duration(job.plan.seconds * job.config.training.steps)}, planned"
    if time := job.hand.get("logged", {}).get("time"):
        return f"{time}, measured"
    return "not measured"


def _score(job: Job) -> str:
    found, logged = job.measured, job.hand.get("logged")
    if not found and logged:
        return f"{logged['score']}, measured{' with other values' if _old_values(job, logged['values']) else ''}"
    if not found:
        return "not recorded" if job.is_small else "not run"
    scores, shown = found.scores, []
    for metric, name in (("prompt_accuracy", "accuracy"), ("sliced_wasserstein_excess", "excess")):
        before, now = scores.get(f"student_before/{metric}"), scores.get(f"student/{metric}")
        if now is not None:
            shown.append(f"{name} {f'{before:.2f} → ' if before is not None else ''}{now:.2f}")
    return f"{', '.join(shown) or 'no score'}, measured{' with other values' if _old_values(job, found.values) else ''}"


def _link(name: str) -> str:
    return f"[{name}]({name}.md)"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _equal(theirs: Any, ours: Any) -> bool:
    return list(theirs) == list(ours) if isinstance(theirs, list | tuple) else bool(theirs == ours)


def show(value: Any) -> str:
    """A value as a page shows it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 1e-3 or value <= 0 else f"{value:g}"
    return str(value)


if __name__ == "__main__":
    main()
