"""No value of a secret-named environment variable is in any file of a run or on its terminal, failing or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy_family
from runs import HELPERS, REPOSITORY

SECRETS = {
    name: f"s3cr3t-{index}-{'f' * 31}"
    for index, name in enumerate(
        ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DATABASE_PASSWORD", "MY_PRIVATE_KEY", "SMTP_AUTH")
    )
}


@pytest.mark.parametrize("fails", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_secrets_of_the_environment_stay_there(fails: bool, tmp_path: Path) -> None:
    data = toy_family.write_data(tmp_path / "toy.parquet")
    run = tmp_path / "run"
    failing = ("--job.imports", "toy_family,raising_method", "--recipe.method", "raising") if fails else ()
    done = subprocess.run(
        [
            "./run_train.sh", "--job.config_file", "tests/assets/toy_finetune.toml", "--data.path", str(data),
            "--job.output_dir", str(run), "--training.steps", "2", "--checkpoint.enabled", "true",
            "--metrics.wandb", "true", "--metrics.tensorboard", "true", "--metrics.wandb_project", "secrets", *failing,
        ],
        cwd=REPOSITORY,
        env={
            **os.environ, **SECRETS, "PYTHON": sys.executable, "NGPU": "1", "WANDB_MODE": "offline",
            "PYTHONPATH": str(HELPERS), "NETRC": str(tmp_path / "netrc"),
        },
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == int(fails), done.stderr[-2000:]
    files = [path for path in run.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) and any("tfevents" in path.name for path in files)
    written = {str(path): path.read_bytes() for path in files} | {"stdout": done.stdout, "stderr": done.stderr}
    for place, content in written.items():
        for name, value in SECRETS.items():
            assert value.encode() not in content, f"{name} is in {place}"
