"""The ordinary suite's share of the trials in tests/soak: broken configurations and data end in one sentence."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from config_mutations import KEYS, NUM_RANKS, Mutant, mutants, outcome, sweep
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parquet_mutations import good_records, mutate, read_some
from runs import REPOSITORY

from titan_distill.config.config import Config
from titan_distill.config.loading import load_config
from titan_distill.config.parsing import ConfigError
from titan_distill.config.text import field_types
from titan_distill.methods.finetune import FinetuneConfig


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(mutant=mutants(), num_ranks=st.sampled_from(NUM_RANKS))
def test_mutated_configurations(tmp_path: Path, mutant: Mutant, num_ranks: int) -> None:
    outcome(mutant, tmp_path, num_ranks)


def test_values_at_the_ends_of_their_types(tmp_path: Path) -> None:
    outcomes = [outcome(mutant, tmp_path, 1) for mutant in sweep()[::25]]
    assert any(isinstance(result, Config) for result in outcomes) and any(
        isinstance(result, str) for result in outcomes
    )


@pytest.mark.parametrize(("num_trials", "num_workers"), [(25, 0), (1, 2)])
def test_mutated_parquet_files(tmp_path: Path, num_trials: int, num_workers: int) -> None:
    records = good_records(tmp_path)
    results = []
    for seed in range(num_trials):
        draw, folder = random.Random(seed), tmp_path / str(seed)
        folder.mkdir()
        mutate(folder, records, draw)
        results.append(read_some(folder, max_bad_rows=draw.choice([0, 2, 100]), num_workers=num_workers))
    assert num_trials == 1 or {type(result) for result in results} == {str, list}


FINETUNE = {f"method_config.{name}" for name in field_types(FinetuneConfig)}
INFINITE = {"training.max_grad_norm", "roles.student.max_grad_norm", "pipeline_config.image_noise_mean"}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_are_finite(value: str) -> None:
    """Every key that is a number; but one that means something by inf may be infinite."""
    kinds = {float: value, tuple[float, ...]: f"[{value}]", tuple[float, float]: f"[0.5, {value}]", float | None: value}
    numbers = {key: kinds[kind] for key, kind in KEYS.items() if kind in kinds and "teacher." not in key}
    assert len(numbers) > 30
    for key, text in numbers.items():
        job = "finetune" if key in FINETUNE else "dmd2"
        argv = ["--job.config_file", str(REPOSITORY / "train_configs" / f"tiny_wan_{job}.toml"), f"--{key}={text}"]
        if key in INFINITE and value != "nan":
            continue
        with pytest.raises(ConfigError) as caught:
            load_config(argv)
        assert key in str(caught.value) and "number" in str(caught.value)
