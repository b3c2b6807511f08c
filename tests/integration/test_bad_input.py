"""A user's mistakes are told in one sentence with exit code 2, before anything is built."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY, tiny_argv

from titan_distill.train import CHECK, main

CASES = {
    "wrong key": (("--training.stepz", "5"), ("training.stepz", "training.steps")),
    "wrong type": (("--training.steps", "many"), ("training.steps", "many")),
    "wrong literal": (("--training.dtype", "float8"), ("training.dtype", "bfloat16")),
    "unknown method": (("--recipe.method", "dmd3"), ("dmd3", "dmd2")),
    "a base class for a method": (
        ("--recipe.method", "adversarial"),
        ("recipe.method = 'adversarial'", "one of ", "dmd2"),
    ),
    "a file that is no family": (("--recipe.family", "head"), ("recipe.family = 'head' is not known", "wan")),
    "another file that is no family": (("--recipe.family", "streaming"), ("recipe.family = 'streaming'", "wan")),
    "a family with a typo": (("--recipe.family", "wam"), ("did you mean 'wan'?",)),
    "unknown scorer": (("--validation.scorer", "shape"), ("validation.scorer = 'shape' is not known", "none")),
    "trainable teacher": (("--roles.teacher.trainable", "true"), ("roles.teacher.trainable", "false")),
    "missing weights": (("--roles.student.path", "no/such/folder"), ("roles.student.path", "no/such/folder")),
    "missing data": (("--data.path", "no/such.parquet"), ("data.path", "no/such.parquet")),
    "missing prompts": (
        ("--validation.enabled", "true", "--validation.prompts", "no.txt"),
        ("validation.prompts", "no.txt"),
    ),
    "missing checkpoint": (("--checkpoint.resume_from", "no/step-1"), ("checkpoint.resume_from", "no/step-1")),
    "batch that does not divide": (("--training.local_batch_size", "3"), ("global_batch_size", "3")),
    "latents that are not there": (("--method_config.rollout", "data"), ("prompts.parquet, row 0", "only text")),
    "size that the latents contradict": (("--pipeline_config.num_frames", "18"), ("num_frames", "17")),
}


@pytest.mark.parametrize("name", CASES)
def test_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    overrides, expected = CASES[name]
    assert main(tiny_argv("dmd2", tmp_path, *overrides)) == 2
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("error: ")
    assert "\n" not in shown
    assert all(part in shown for part in expected), shown
    assert "did you mean 'adversarial'" not in shown


LAYOUT_CASES = {
    "degree that does not divide the ranks": (("tensor", "3"), ("tensor = 3", "4", "2 or 4")),
    "ranks that share no sample": (("sequence", "3"), ("sequence = 3", "set it to 2 or 4")),
    "ranks that are not there": (
        ("tensor", "2", "dp_shard", "4"),
        ("makes 8 ranks", "set dp_shard to 2"),
    ),
    "overlap without a GPU": (("tensor", "2", "async_tensor", "true"), ("async_tensor", "CUDA", "false")),
}


@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_layouts_are_checked_before_ranks_start(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("WORLD_SIZE", "4")
    keys, expected = LAYOUT_CASES[name]
    overrides = [f"--parallelism.{part}" if index % 2 == 0 else part for index, part in enumerate(keys)]
    assert (
        main([*tiny_argv("dmd2", tmp_path, "--training.local_batch_size", "1", "--compile.enabled", *overrides), CHECK])
        == 2
    )
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("error: ") and "\n" not in shown
    assert all(part in shown for part in expected), shown


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_through_the_launcher(num_ranks: int, tmp_path: Path) -> None:
    """Also on several ranks, where torchrun would answer with a traceback a rank."""
    done = subprocess.run(
        ["./run_train.sh", "--job.output_dir", str(tmp_path), "--training.stepz", "5"],
        cwd=REPOSITORY,
        env={**os.environ, "NGPU": str(num_ranks), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "training.steps" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_role_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (REPOSITORY / "train_configs" / "tiny_wan_dmd2.toml").read_text()
    without_critic = tmp_path / "job.toml"
    without_critic.write_text(re.sub(r"\[roles\.critic\].*?\n\n", "", whole, flags=re.DOTALL))
    assert main(["--job.config_file", str(without_critic)]) == 2
    shown = capsys.readouterr().err.strip()
    assert "\n" not in shown
    assert "[roles.critic]" in shown


def test_missing_file_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--job.config_file", str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err
