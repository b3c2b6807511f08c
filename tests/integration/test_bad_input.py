"""A user's mistakes are told in one sentence with exit code 2, before anything is built."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY, tiny_argv

from titan_distill.cli import main as cli
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
    "adapters wider than the layers": (
        ("--roles.student.lora.rank", "129"),
        ("roles.student.lora.rank = 129 is above the width of the layers, 128", "or to 0"),
    ),
    "a teacher without steps": (("--method_config.teacher_steps", "0"), ("method_config.teacher_steps = 0", "1000")),
    "a teacher with endless steps": (("--method_config.teacher_steps", "1000000000"), ("teacher_steps = 1000000000",)),
    "guidance that is no number": (("--method_config.guidance_scale", "nan"), ("guidance_scale", "a finite number")),
    "guidance without end": (("--method_config.guidance_scale", "inf"), ("guidance_scale", "a finite number")),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--guidance-scale", "nan"), "--guidance-scale nan is out of range; choose -100 to 100"),
        (("--guidance-scale", "inf"), "--guidance-scale inf is out of range"),
        (("--num-steps", "0"), "--num-steps 0 is out of range; choose 1 to 1000"),
        (("--num-steps", "1000000000"), "--num-steps 1000000000 is out of range"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "ode-pairs"])
def test_sampling_options_of_commands(
    command: str, options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before weights are loaded, which these paths do not have."""
    words = {
        "generate": ["generate", "--checkpoint", "no", "--prompt", "a", "--out", str(tmp_path / "x.mp4")],
        "ode-pairs": ["data", "ode-pairs", "no.toml", "--prompts", "no.txt", "--out", str(tmp_path / "pairs")],
    }
    with pytest.raises(SystemExit) as leaving:
        cli([*words[command], *options])
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(("fps", "message"), [("nan", "--fps nan is not positive"), ("1e9", "--fps 1e+09 repeats")])
def test_rates_of_preprocessing(fps: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "captions.csv").write_text("file_name,caption\na.mp4,x\n")
    words = ["data", "preprocess", str(tmp_path), "--captions", str(tmp_path / "captions.csv"), "--fps", fps]
    with pytest.raises(SystemExit) as leaving:
        cli([*words, "--out", str(tmp_path / "out"), "--vae", "no", "--text-encoder", "no"])
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


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
