"""The acceptance figure of Self-Forcing: what the shipped jobs make of the small Wan, one after the other.

Recording, initialisation and Self-Forcing take some seven minutes of one core.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import REPOSITORY, TINY_SHAPES, read_metrics

from titan_distill.commands.ode_pairs import OdePairsOptions, ode_pairs
from titan_distill.train import main

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]


def job(name: str, folder: Path, *overrides: str) -> dict[str, float]:
    """The last validation of a shipped job."""
    output = folder / name
    arguments = [
        "--job.config_file",
        str(REPOSITORY / "train_configs" / f"{name}.toml"),
        "--job.output_dir",
        str(output),
    ]
    assert main([*arguments, *overrides]) == 0
    return {key: value for line in read_metrics(output) for key, value in line.items() if key.startswith("validation/")}


def test_few_steps_block_by_block_read_as_well_as_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    pairs, config = tmp_path / "pairs", REPOSITORY / "train_configs" / "tiny_wan_ode_init.toml"
    ode_pairs(OdePairsOptions(config, TINY_SHAPES / "prompts.parquet", pairs))
    job("tiny_wan_ode_init", tmp_path, "--data.path", str(pairs))
    weights = f"{tmp_path / 'tiny_wan_ode_init' / 'checkpoints' / 'latest'}#student:ema"
    scores = job("tiny_wan_self_forcing", tmp_path, "--roles.student.init_from", weights)
    assert scores["validation/student/prompt_accuracy"] >= 0.9 * scores["validation/teacher/prompt_accuracy"] > 0.8
