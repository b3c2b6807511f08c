"""docs/recipes/: every shipped job has the card that the command writes, and what the cards say is true.

A card is made of files, so the comparison also fails for a TOML that changes without its card. Commands are parsed by
the real command line, keys are those of the job's configuration.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from noted_calls import note_calls
from runs import REPOSITORY

from benchmarks import recipe_cards, recipe_plots, recipe_results
from titan_distill import cli
from titan_distill.config.config import Config
from titan_distill.config.degrees import resolve_layout
from titan_distill.config.loading import load_config
from titan_distill.config.text import field_types

JOBS = {job.name: job for job in recipe_cards.jobs()}
SMALL_JOB = JOBS["tiny_wan_cm"]
MOST_BYTES = 1_000_000
SECTIONS = "|".join(field_types(Config))


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_the_folder_has_what_the_command_writes() -> None:
    written = recipe_cards.pages()
    files = {path.name: path.read_text(encoding="utf-8") for path in recipe_cards.FOLDER.iterdir()}
    different = sorted(name for name in written.keys() | files.keys() if written.get(name) != files.get(name))
    assert not different, "run python -m benchmarks.recipe_cards"


def test_every_job_has_a_card_and_a_row() -> None:
    jobs = {path.stem for path in (REPOSITORY / "train_configs").glob("*.toml")}
    assert jobs == set(JOBS) == {path.stem for path in recipe_cards.FOLDER.glob("*.md")} - {"README"}
    rows = re.findall(r"^\| \[([\w.]+)\]\(\1\.md\)", page("README"), re.MULTILINE)
    assert sorted(rows) == sorted(jobs)


def test_a_job_without_texts_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path in recipe_cards.CONFIGS.glob("tiny_*.toml"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "new_job.toml").touch()
    monkeypatch.setattr(recipe_cards, "CONFIGS", tmp_path)
    with pytest.raises(ValueError, match=r"\[jobs\] of benchmarks/recipes.toml do not agree on .*new_job"):
        recipe_cards.jobs()


def page(name: str) -> str:
    return (recipe_cards.FOLDER / f"{name}.md").read_text(encoding="utf-8")


# A card follows its sources -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "shown"),
    [
        ("steps = 240", "steps = 250", "250 steps of 4 samples"),
        ("[1000.0, 750.0, 500.0, 250.0]", "[1000.0, 500.0]", "2 steps, at timesteps 1000, 750,"),
        ("lr = 1e-4", "lr = 2e-4", "learning rate 0.0002"),
        ("latents.parquet", "prompts.parquet", "`tests/assets/tiny_shapes/prompts.parquet`"),
    ],
)
def test_a_changed_toml_changes_its_card(old: str, new: str, shown: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny_wan_cm.toml"
    assert old in SMALL_JOB.source
    path.write_text(SMALL_JOB.source.replace(old, new), encoding="utf-8")
    config = load_config(["--job.config_file", str(path)])
    card = recipe_cards.card(recipe_cards.Job("tiny_wan_cm", path.read_text(encoding="utf-8"), config, SMALL_JOB.hand))
    assert shown in card and shown not in page("tiny_wan_cm")


def test_hours_come_from_the_planned_line() -> None:
    line = "# Planned: 4 × H100, 12.5 of 71.2 GiB on the fullest rank, 9.0 s per step at assumed rates"
    text = recipe_cards.PLANNED.sub(line, JOBS["wan1.3b_finetune"].source)
    job = recipe_cards.Job("wan1.3b_finetune", text, JOBS["wan1.3b_finetune"].config, {})
    hours = 9.0 * job.config.training.steps / 3600
    assert f"4 × H100: {hours:.3g} hours ({4 * hours:.3g} GPU-hours)" in recipe_cards._hours(job)
    assert "12.5 GiB" in recipe_cards._hours(job)


@pytest.mark.parametrize("name", [name for name in JOBS if not name.startswith("tiny_")])
def test_large_jobs_are_planned_and_not_said_to_have_run(name: str) -> None:
    assert "Planned for" in page(name)
    assert ("has not been run" in page(name)) == (JOBS[name].measured is None)


# What a card names exists -------------------------------------------------------------------------


@pytest.mark.parametrize("name", JOBS)
def test_named_keys_exist(name: str) -> None:
    keys = set(re.findall(rf"`((?:{SECTIONS})\.[\w.]+)`", page(name)))
    unknown = sorted(key for key in keys if key not in JOBS[name].values)
    assert keys and not unknown


def test_an_unknown_key_is_found() -> None:
    with pytest.raises(KeyError):
        SMALL_JOB.fill("{training.stops}")
    assert "training.stops" not in SMALL_JOB.values


@pytest.mark.parametrize("name", JOBS)
def test_named_files_exist(name: str) -> None:
    named = re.findall(r"`((?:train_configs|tests|docs|benchmarks|scripts)/[\w./-]+)`", page(name))
    assert named and not [path for path in named if not (REPOSITORY / path).exists()]
    links = re.findall(r"\]\((?!https://)([^)]+)\)", page(name) + page("README"))
    assert not [link for link in links if not (recipe_cards.FOLDER / link).exists()]


@pytest.mark.parametrize("name", recipe_cards.texts()["published"])
def test_published_keys_are_keys_of_a_job_that_is_compared_with_them(name: str) -> None:
    compared = [job for job in JOBS.values() if job.hand.get("published") == name]
    unknown = [
        key
        for key in recipe_cards.texts()["published"][name]["values"]
        if not any(key in job.values for job in compared)
    ]
    assert compared and not unknown


@pytest.mark.parametrize("name", JOBS)
def test_departures_have_reasons_and_stand_in_the_card(name: str) -> None:
    found = recipe_cards.departures(JOBS[name])
    assert not [each.key for each in found if each.reason in recipe_cards.BARE]
    assert not [each.key for each in found if f"| `{each.key}` |" not in page(name)]
    assert ("published" in JOBS[name].hand) != ("unpublished" in JOBS[name].hand)


def test_a_departure_without_a_reason_is_found() -> None:
    job = JOBS["rcm_wan14b_to_1.3b"]
    silent = recipe_cards.Job(job.name, re.sub(r" *#.*", "", job.source), job.config, {"published": "rcm"})
    found = {each.key: each.reason for each in recipe_cards.departures(silent)}
    assert found == dict.fromkeys(("training.max_grad_norm", "training.steps", "ema.decay"), "")


def test_reasons_are_those_of_departures() -> None:
    """A reason for a value that is the published one would be wrong."""
    for job in JOBS.values():
        keys = {each.key for each in recipe_cards.departures(job)}
        assert set(job.hand.get("reasons", {})) <= keys, job.name


# Commands -----------------------------------------------------------------------------------------

COMMANDS = list(dict.fromkeys(line for job in JOBS.values() for line in recipe_cards.commands(job)))


def test_cards_have_these_commands() -> None:
    shown = {line for name in JOBS for line in re.search(r"```\n(.*?)\n```", page(name), re.DOTALL)[1].splitlines()}
    assert shown == {job.fill(line) for job in JOBS.values() for line in recipe_cards.commands(job)}


@pytest.mark.parametrize("name", JOBS)
def test_commands_parse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = note_calls(monkeypatch)
    block = re.search(r"```\n(.*?)\n```", page(name), re.DOTALL)
    assert block is not None and "./run_train.sh" in block[1].splitlines()[-1]
    tools = 0
    for command in block[1].splitlines():
        environment, program, arguments = re.split(r"(\./run_train\.sh|titan-distill|-m titan_distill\.cli)", command)
        if program == "./run_train.sh":
            ranks = re.fullmatch(r"NGPU=(\d+) ", environment)
            given = shlex.split(arguments) or ["--job.config_file", "train_configs/tiny_wan_dmd2.toml"]
            resolve_layout(load_config(given), int(ranks[1]) if ranks else 1)
        else:
            cli.main(shlex.split(arguments))
            tools += 1
    assert len(called) == tools


# Results and plots --------------------------------------------------------------------------------


def run_folder(folder: Path, steps: int = 240) -> Path:
    """A run's folder as `train` leaves it, of tiny_wan_cm with another learning rate."""
    folder.mkdir()
    toml = SMALL_JOB.source.replace("steps = 240", f"steps = {steps}").replace("lr = 1e-4", "lr = 3e-4")
    (folder / "config.toml").write_text(toml, encoding="utf-8")
    command = ["--job.config_file", "x.toml", "--job.output_dir", "/somewhere", "--optimizer.lr", "3e-4"]
    (folder / "run.json").write_text(
        json.dumps({"created": "2026-11-28T10:00:00+00:00", "command": command}), encoding="utf-8"
    )
    rows: list[dict[str, Any]] = [{"step": 0, "validation/student_before/sliced_wasserstein_excess": 0.3}]
    rows += [{"step": step, "loss/student": 1 / step, "memory_gib": 0.5} for step in range(1, 241)]
    rows[-1] |= {"validation/student/sliced_wasserstein_excess": 0.15, "validation/student/prompt_accuracy": 1.0}
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


def test_a_recorded_run_is_shown_with_what_has_changed_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_results, "RESULTS", tmp_path / "results")
    recipe_results.record(run_folder(tmp_path / "run"))
    job = recipe_cards.Job("tiny_wan_cm", SMALL_JOB.source, SMALL_JOB.config, SMALL_JOB.hand)
    card = recipe_cards.card(job)
    assert "That run had other values: `optimizer.lr` = 0.0003 (now 0.0001)." in card
    assert "`./run_train.sh --job.config_file x.toml --optimizer.lr 3e-4`" in card and "/somewhere" not in card
    assert "| student | 0.15 | 1 |" in card and "| student before | 0.3 |  |" in card
    assert "excess 0.30 → 0.15, measured" in recipe_cards.overview([job])
    plot = recipe_cards._plot(job)
    assert plot is not None and "loss/student" in plot and "step 1<" in plot


@pytest.mark.parametrize("name", [name for name, job in JOBS.items() if "logged" in job.hand])
def test_figures_from_the_log_stand_in_the_named_section(name: str) -> None:
    logged = JOBS[name].hand["logged"]
    sections = (REPOSITORY / "docs" / "log.md").read_text(encoding="utf-8").split("\n## ")
    (section,) = [text for text in sections if text.startswith(f"{logged['section']}\n")]
    figures = re.findall(r"\d+(?:\.\d+)?", f"{logged.get('time', '')} {logged['score']}")
    assert figures and not [
        figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d])", section)
    ]
    keys = {"method_config.denoising_steps"} & JOBS[name].values.keys()
    assert keys <= logged["values"].keys()


def test_an_unfinished_run_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_results, "RESULTS", tmp_path / "results")
    with pytest.raises(ValueError, match="ends at step 240 of 500; let the run finish"):
        recipe_results.record(run_folder(tmp_path / "run", steps=500))
    assert not (tmp_path / "results").exists()


def test_a_plot_has_the_curve_in_it() -> None:
    text = recipe_plots.svg({"loss/student": ([1, 2, 3], [4.0, None, 2.0]), "empty": ([1], [None])})
    drawn = ElementTree.fromstring(text)
    lines = [element.get("points") for element in drawn.iter() if element.tag.endswith("polyline")]
    left, right = recipe_plots.LEFT, recipe_plots.WIDTH - recipe_plots.RIGHT
    top, bottom = recipe_plots.TOP, recipe_plots.HEIGHT - recipe_plots.BOTTOM
    assert lines == [f"{left:.1f},{top:.1f} {right:.1f},{bottom:.1f}"]
    assert "empty" not in text


def test_long_curves_are_averaged() -> None:
    steps, values = list(range(1000)), [float(step % 2) for step in range(1000)]
    groups = list(recipe_plots._groups(steps, values))
    assert len(groups) == recipe_plots.MAX_POINTS
    assert {group[1:] for group in groups} == {(0.0, 0.5, 1.0)}


def test_golden_curves_are_found_by_their_job() -> None:
    found = {name: pair[0] for name in JOBS if (pair := recipe_results.golden_curves(name))}
    assert found == {f"tiny_wan_{name}": name for name in recipe_results.golden.NAMES}


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in recipe_cards.FOLDER.iterdir()) < MOST_BYTES


def test_pairs_of_a_job_are_those_that_its_method_asks_for() -> None:
    for name, job in JOBS.items():
        if job.hand["data"] == "pairs":
            line = next(line for line in recipe_cards.commands(job) if "ode-pairs" in line)
            assert f"train_configs/{name}.toml" in line and f"--out {job.config.data.path}" in line
