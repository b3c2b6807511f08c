"""A run that is too short for a schedule says so once, with the consequence, and trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy_family
from runs import REPOSITORY, tiny_argv
from toy_run import ASSETS

from titan_distill.config.loading import load_config
from titan_distill.methods.base import method_class
from titan_distill.methods.unreached import unreached_schedules
from titan_distill.train import CHECK, main

EMA = ("--ema.decay", "0.9")
SPARSE = (
    "--roles.student.attention", "sparse", "--sparse_attention.sparsity", "0.9",
    "--sparse_attention.schedule_rate", "0.1", "--sparse_attention.schedule_interval", "10",
)  # fmt: skip
NEVER = (
    "ema.start_step = {} is beyond the last update of the student in training.steps = {}: EMA never starts, and raw "
    "weights are sampled and exported"
)

# In toy_dmd2.toml every step updates the critic, and every fifth the student.
CASES: dict[str, tuple[str, tuple[str, ...], list[str]]] = {
    "nothing": ("dmd2", (), []),
    "warm-up": (
        "dmd2",
        ("--training.steps", "20", "--lr_scheduler.warmup_steps", "10"),
        [
            "lr_scheduler.warmup_steps = 10 is longer than the run (student has 4 updates): the learning rate ends at "
            "0.4 of its peak or below"
        ],
    ),
    "warm-up that ends with the last update": (
        "finetune",
        ("--training.steps", "20", "--lr_scheduler.warmup_steps", "20"),
        [],
    ),
    "warm-up of both": (
        "dmd2",
        ("--training.steps", "20", "--lr_scheduler.warmup_steps", "25"),
        [
            "lr_scheduler.warmup_steps = 25 is longer than the run (student has 4 updates, critic has 20 updates): the "
            "learning rate ends at 0.8 of its peak or below"
        ],
    ),
    # Of the 20 steps the last one that updates the student is the 16th.
    "average": ("dmd2", (*EMA, "--training.steps", "20", "--ema.start_step", "16"), [NEVER.format(16, 20)]),
    "average of one update": ("dmd2", (*EMA, "--training.steps", "20", "--ema.start_step", "15"), []),
    "average of a later run": (
        "dmd2",
        (*EMA, "--training.steps", "20", "--ema.start_step", "200"),
        [NEVER.format(200, 20)],
    ),
    "start without average": ("dmd2", ("--training.steps", "20", "--ema.start_step", "200"), []),
    "sparsity": (
        "finetune",
        (*SPARSE, "--training.steps", "90"),
        [
            "sparse_attention.schedule_rate = 0.1 does not reach sparsity = 0.9 in training.steps = 90: the last step "
            "has 0.8"
        ],
    ),
    "sparsity below the crossover": (
        "finetune",
        (*SPARSE, "--training.steps", "50"),
        [
            "sparse_attention.schedule_rate = 0.1 does not reach sparsity = 0.9 in training.steps = 50: the last step "
            "has 0.4, below crossover = 0.5, so that attention is dense"
        ],
    ),
    "sparsity in the last step": ("finetune", (*SPARSE, "--training.steps", "91"), []),
    "tangents": (
        "scm",
        ("--training.steps", "20", "--method_config.tangent_warmup", "20"),
        [
            "method_config.tangent_warmup = 20 leaves none of the 20 steps: the student's own derivative never counts "
            "in full, but with a weight of at most 0.95"
        ],
    ),
    "tangents of the last step": ("scm", ("--training.steps", "20", "--method_config.tangent_warmup", "19"), []),
    "tangents before matching": (
        "rcm",
        ("--training.steps", "20", "--method_config.tangent_warmup", "20"),
        [
            "roles.critic has no update in training.steps = 20: it stays as it is",
            "method_config.tangent_warmup = 20 leaves none of the 20 steps to distribution matching: the student "
            "learns consistency alone, with part of its own derivative, and the critic nothing",
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_sentences(case: str) -> None:
    method, overrides, expected = CASES[case]
    config = load_config(["--job.config_file", str(ASSETS / f"toy_{method}.toml"), *overrides])
    assert unreached_schedules(config, method_class(config.recipe.method)) == expected


def test_the_start_says_it_on_rank_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where nothing is trained, and before a run that trains nonetheless."""
    monkeypatch.chdir(REPOSITORY)
    line = f"warning: {NEVER.format(20, 6)}"
    argv = tiny_argv("dmd2", tmp_path / "tiny", "--training.steps", "6", "--ema.start_step", "20")
    for word in (CHECK, "--job.dry_run"):
        assert main([*argv, word]) == 0
        assert capsys.readouterr().out.splitlines().count(line) == 1
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*argv, "--training.local_batch_size", "2", CHECK]) == 0
    assert "warning" not in capsys.readouterr().out
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)

    data = toy_family.write_data(tmp_path / "toy.parquet")
    toy = ("--job.config_file", str(ASSETS / "toy_dmd2.toml"), "--data.path", str(data))
    short = ("--training.steps", "6", "--ema.decay", "0.9", "--ema.start_step", "20")
    assert main([*toy, *short, "--job.output_dir", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines().count(line) == 1
