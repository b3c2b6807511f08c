"""A run is resolved once: layouts, model family and the configuration of its networks are read at one place."""

from __future__ import annotations

import io
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from runs import REPOSITORY, tiny_argv

from titan_distill.config import ConfigError, load_config
from titan_distill.config import degrees as layouts
from titan_distill.config.degrees import Degrees
from titan_distill.fault_tolerance.signals import Stop
from titan_distill.models.base import ModelFamily
from titan_distill.resolve import resolve
from titan_distill.train import start


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_the_start_of_a_job_resolves_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line to the assembled trainer: one layout, one family, one look at each network's config."""
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str, label: str) -> None:
        real = getattr(owner, name)

        def counting(*arguments: Any, **named: Any) -> Any:
            counts[label] += 1
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, counting)

    real_open = io.open

    def open_(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if "b" not in mode and str(file).endswith(".json"):  # digests read bytes
            counts[str(file)] += 1
        return real_open(file, mode, *arguments, **named)

    weights = tmp_path / "weights"  # a folder that no earlier test has read
    weights.symlink_to(REPOSITORY / "tests/assets/tiny_wan/transformer", target_is_directory=True)
    paths = [word for role in ("teacher", "student", "critic") for word in (f"--roles.{role}.path", str(weights))]
    count(layouts, "_num_micro_batches", "layouts")
    count(ModelFamily, "__init__", "families")
    monkeypatch.setattr(io, "open", open_)
    with Stop() as stop, ExitStack() as held:
        trainer = start(tiny_argv("dmd2", tmp_path / "run", "--training.steps", "1", *paths), stop, held)
    assert trainer is not None
    trainer.metrics.close()
    assert (counts["layouts"], counts["families"]) == (1, 1)
    assert counts[str(weights / "config.json")] == 1


def test_a_run_has_its_layouts_and_classes(tmp_path: Path) -> None:
    argv = tiny_argv("dmd2", tmp_path, "--training.local_batch_size", "1", "--roles.teacher.parallelism.sequence", "2")
    run = resolve(load_config(argv), 2)
    assert run.layout.roles["teacher"] == Degrees(sequence=2)
    assert run.layout.default == run.layout.roles["student"] == Degrees(dp_shard=2)
    assert run.config.training.global_batch_size == run.layout.num_micro_batches * 2
    assert run.family.config is run.config
    assert set(run.method.roles_required) <= set(run.config.roles)


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "fault"),
    [
        (("--parallelism.tensor", "3"), 4, r"tensor = 3 does not divide"),
        (("--parallelism.sequence", "3", "--parallelism.sequence_method", "ulysses"), 3, "Ulysses"),
        (("--data.path", "none.parquet"), 1, r"data\.path = 'none\.parquet' is no existing"),
        (("--roles.student.path=", "--roles.student.init_from", "none#student"), 1, "none"),
    ],
)
def test_a_fault_names_the_file(overrides: tuple[str, ...], num_ranks: int, fault: str, tmp_path: Path) -> None:
    config = load_config(tiny_argv("dmd2", tmp_path, *overrides))
    with pytest.raises(ConfigError, match=f"^{config.job.config_file}: .*{fault}"):
        resolve(config, num_ranks)


def test_a_plan_needs_no_data(tmp_path: Path) -> None:
    resolve(load_config(tiny_argv("dmd2", tmp_path, "--data.path", "none.parquet")), 1, without_files=True)
