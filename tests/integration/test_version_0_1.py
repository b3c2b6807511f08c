"""Files of version 0.1 keep their meaning: a run folder (configuration, checkpoint) and an exported network.

`tests/assets/version_0_1` holds a run of two steps and `continued.json`, the metrics of steps 3 and 4 as version 0.1
continued it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from titan_distill import cli, train
from titan_distill.config import load_config
from titan_distill.models.wan.state_dict import read_config

ASSET = Path("tests/assets/version_0_1")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSET / "run", tmp_path / "run"))


def test_resume(run_folder: Path) -> None:
    """The stored config.toml, with a scorer that it names without importing it, continues with the same numbers."""
    file, continuing = str(run_folder / "config.toml"), ("--checkpoint.resume_from", "latest", "--training.steps", "4")
    assert train.main(["--job.config_file", file, "--job.output_dir", str(run_folder), *continuing]) == 0
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    expected = json.loads((ASSET / "continued.json").read_text())
    assert [row["step"] for row in rows] == [3, 4]
    for row, before in zip(rows, expected, strict=True):
        assert {name: row[name] for name in before} == pytest.approx(before, rel=1e-5, abs=1e-7)


def test_configuration_means_the_same() -> None:
    """The resolved file equals what the job's own file resolves to today."""
    written = load_config(["--job.config_file", str(ASSET / "run/config.toml")])
    assert written == load_config(["--job.config_file", str(ASSET / "job.toml")])


def test_tools_read_the_checkpoint(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(run_folder / "checkpoints/latest")
    cli.main(["checkpoint", "verify", checkpoint])
    cli.main(["checkpoint", "list", str(run_folder)])
    assert "step-00000002" in capsys.readouterr().out
    cli.main(["checkpoint", "export", "--checkpoint", checkpoint, "--out", str(tmp_path / "export")])
    before, now = load_file(ASSET / "export" / WEIGHTS), load_file(tmp_path / "export" / WEIGHTS)
    assert before.keys() == now.keys() and all(before[name].equal(now[name]) for name in before)
    assert read_config(ASSET / "export/transformer") == read_config(tmp_path / "export/transformer")


def test_roles_start_from_what_was_written(run_folder: Path, tmp_path: Path) -> None:
    """From an export, and from a role in a checkpoint."""
    reference = f"{run_folder}/checkpoints/latest#critic:raw"
    roles = ["--roles.student.path", str(ASSET / "export/transformer"), "--roles.critic.path", ""]
    job = ["--job.config_file", str(ASSET / "job.toml"), "--job.output_dir", str(tmp_path / "next")]
    assert train.main([*job, *roles, "--roles.critic.init_from", reference, "--training.steps", "1"]) == 0
