"""Every shipped TOML parses, builds on the meta device, and survives its own resolved form."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import REPOSITORY

from titan_distill.config.loading import load_config, to_toml
from titan_distill.train import main

CONFIGS = sorted((REPOSITORY / "train_configs").glob("*.toml"))


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_the_promised_jobs_are_there() -> None:
    promised = {"tiny_wan_dmd2", "tiny_wan_finetune", "wan1.3b_finetune"}
    promised |= {"wan14b_to_1.3b", "wan14b_to_1.3b_8gpu", "wan14b_to_1.3b_1gpu"}
    assert promised <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_dry_run(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Builds all roles without weights, on as many ranks as the file asks for."""
    config = load_config(["--job.config_file", str(path)])
    layout = config.parallelism
    ranks = layout.dp_replicate * max(1, layout.dp_shard) * layout.sequence * layout.tensor
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert main(["--job.config_file", str(path), "--job.dry_run"]) == 0
    shown = capsys.readouterr().out
    assert config.job.name in shown
    assert all(role in shown for role in config.roles)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_resolved_file_is_the_same_configuration(path: Path, tmp_path: Path) -> None:
    config = load_config(["--job.config_file", str(path)])
    resolved = tmp_path / "config.toml"
    resolved.write_text(to_toml(config), encoding="utf-8")
    assert load_config(["--job.config_file", str(resolved)]) == config
