"""The doctor on the small Wan: every planted failure is named with its step, and healthy shipped jobs are silent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import REPOSITORY, TINY_SHAPES, TINY_WAN, read_metrics
from safetensors.torch import load_file, save_file

from titan_distill.train import main

WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")
FEW = ("--validation.num_prompts", "4", "--validation.num_videos", "4", "--method_config.teacher_steps", "12")
UNVALIDATED = ("--validation.enabled", "false")
HEALTHY = ("a14b", "cm", "dmd2", "dmd2_gan", "dmd2_sparse", "finetune", "lora", "rcm", "scm", "sparse", "ti2v")
"""Shipped jobs that start from what is in the repository."""


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def run(job: str, folder: Path, steps: int, *overrides: str) -> list[dict[str, Any]]:
    """Trains a shipped job for some steps. Returns the doctor's alarms."""
    arguments = [
        "--job.config_file", f"train_configs/tiny_wan_{job}.toml", "--job.output_dir", str(folder / "run"),
        "--training.steps", str(steps), "--checkpoint.enabled", "false", *overrides,
    ]  # fmt: skip
    assert main(arguments) == 0
    return [json.loads(line) for line in (folder / "run" / "doctor.jsonl").read_text().splitlines()]


def named(alarms: Sequence[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(alarm["role"], alarm["measure"]) for alarm in alarms}


def scaled_teacher(folder: Path) -> Path:
    """A copy of the small Wan whose network predicts twice the velocity."""
    shutil.copytree(TINY_WAN, folder / "teacher")
    weights = load_file(folder / "teacher" / WEIGHTS)
    scaled = {name: 2 * tensor if name.startswith("proj_out.") else tensor for name, tensor in weights.items()}
    save_file(scaled, folder / "teacher" / WEIGHTS, {"format": "pt"})
    return folder / "teacher"


def one_prompt(folder: Path) -> Path:
    """The first row of the prompts, 64 times."""
    row = pq.read_table(TINY_SHAPES / "prompts.parquet").slice(0, 1)
    pq.write_table(pa.concat_tables([row] * 64), folder / "prompts.parquet")
    return folder / "prompts.parquet"


def test_weights_in_bfloat16_that_cannot_move_are_named(tmp_path: Path) -> None:
    """Both roles are measured in their first update; the sums travel with the next update, of whichever role."""
    options = [
        *(f"--roles.{role}.{key}" for role in ("student", "critic") for key in ("dtype=bfloat16", "optimizer.lr=1e-7")),
        *("--lr_scheduler.warmup_steps=1", "--training.global_batch_size=1", "--training.local_batch_size=1"),
        *("--pipeline_config.num_frames=5", "--pipeline_config.height=32", "--pipeline_config.width=32"),
    ]
    alarms = run("dmd2", tmp_path, 2, *UNVALIDATED, *(word for option in options for word in option.split("=")))
    found = [(alarm["step"], alarm["role"], alarm["measure"]) for alarm in alarms]
    assert found == [(1, "student", "update_size"), (2, "critic", "update_size")]
    assert all(alarm["value"] < 0.05 for alarm in alarms)


@pytest.mark.nightly
def test_a_frozen_critic_is_named(tmp_path: Path) -> None:
    alarms = run("dmd2", tmp_path, 20, *UNVALIDATED, "--roles.critic.optimizer.lr", "1e-12")
    assert named(alarms) == {("critic", "update_size")} and alarms[0]["step"] <= 20


@pytest.mark.nightly
def test_guidance_times_five_is_named(tmp_path: Path) -> None:
    alarms = run("dmd2", tmp_path, 2, *FEW, "--method_config.guidance_scale", "10")
    assert ("teacher", "start_error") in named(alarms)
    assert alarms[0]["step"] == 0 and alarms[0]["value"] > 5


@pytest.mark.nightly
def test_a_teacher_of_another_scale_is_named(tmp_path: Path) -> None:
    alarms = run("dmd2", tmp_path, 2, *FEW, "--roles.teacher.path", str(scaled_teacher(tmp_path)))
    assert ("teacher", "start_error") in named(alarms)
    assert alarms[0]["step"] == 0 and alarms[0]["value"] > 5


@pytest.mark.nightly
def test_one_repeated_prompt_is_named(tmp_path: Path) -> None:
    alarms = run("dmd2", tmp_path, 6, *UNVALIDATED, "--data.path", str(one_prompt(tmp_path)))
    assert [(alarm["step"], alarm["measure"]) for alarm in alarms] == [(4, "prompts")]


@pytest.mark.nightly
@pytest.mark.parametrize("job", HEALTHY)
def test_a_healthy_job_is_silent(job: str, tmp_path: Path) -> None:
    """100 steps with three validations. The doctor takes at most 1 % of the time of the steps."""
    prompts = ("--validation.num_prompts", "8", "--validation.num_videos", "8", "--validation.interval", "50")
    assert run(job, tmp_path, 100, *prompts) == []
    lines = read_metrics(tmp_path / "run")
    last = [key for line in lines if line["step"] == 100 for key in line if key.startswith("doctor/")]
    assert {"doctor/student/contrast", "doctor/student/motion", "doctor/student/diversity"} <= {*last}
    seconds = {
        phase: sum(value for line in lines for key, value in line.items() if key == f"time/{phase}")
        for phase in {key.removeprefix("time/") for line in lines for key in line if key.startswith("time/")}
    }
    pauses = ("validation", "checkpoint")
    assert seconds["doctor"] <= 0.01 * sum(value for phase, value in seconds.items() if phase not in pauses)
