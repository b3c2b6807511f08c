"""The banner shows each role's own layout, and a batch whose factors multiply to the global batch size."""

from __future__ import annotations

import math
import re

import pytest
from runs import REPOSITORY

from titan_distill.config.degrees import Degrees
from titan_distill.observability.banner import layout
from titan_distill.train import main

ROLES = ("teacher", "student", "critic")
LAYOUTS = {
    "one process": (1, (), "unsharded", "unsharded"),
    "FSDP": (4, (), "FSDP 4", "FSDP 4"),
    "hybrid": (4, ("--parallelism.dp_replicate", "2"), "dp_replicate 2 × FSDP 2", "dp_replicate 2 × FSDP 2"),
    "replicas": (4, ("--parallelism.dp_replicate", "4"), "dp_replicate 4", "dp_replicate 4"),
    "sequence": (4, ("--parallelism.sequence", "2"), "FSDP 2 × sequence 2", "FSDP 2 × sequence 2"),
    "tensor for all": (4, ("--parallelism.tensor", "2"), "FSDP 2 × tensor 2", "FSDP 2 × tensor 2"),
    "tensor for the teacher": (4, ("--roles.teacher.parallelism.tensor", "4"), "tensor 4", "FSDP 4"),
    "offloaded teacher": (
        8,
        ("--roles.teacher.parallelism.cpu_offload", "true"),
        "FSDP 8, offloaded to the CPU",
        "FSDP 8",
    ),
}
"""Ranks, overrides, layout of the teacher, layout of student and critic. Never two ranks: PyTorch remembers meshes by
their ranks, and later tests in this process fork two real ones."""


@pytest.fixture(params=LAYOUTS)
def described(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[list[str], str, str]:
    """The lines of a dry run of the default job, on the meta device of a fake world; the layouts that it should show
    for the teacher and for the others."""
    num_ranks, overrides, teacher, others = LAYOUTS[request.param]
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
    batch = ("--training.global_batch_size", "16", "--training.local_batch_size", "2")
    assert main(["--job.config_file", "train_configs/tiny_wan_dmd2.toml", "--job.dry_run", *batch, *overrides]) == 0
    return capsys.readouterr().out.splitlines(), teacher, others


def test_each_role_shows_its_own_layout(described: tuple[list[str], str, str]) -> None:
    lines, teacher, others = described
    facts = {role: next(line for line in lines if line.startswith(f"  {role:<9} ")).split(" · ") for role in ROLES}
    assert [facts[role][3] for role in ROLES] == [teacher, others, others]
    assert facts["teacher"][0].split()[-1] == "frozen" and facts["student"][0].split()[-1] == "trained"
    assert all(re.fullmatch(r"\d+\.\d M parameters", found[1]) and found[2] == "float32" for found in facts.values())
    assert facts["teacher"][4] == "dense attention"


def test_the_factors_of_the_batch_multiply_to_the_global_batch_size(described: tuple[list[str], str, str]) -> None:
    (line,) = (line for line in described[0] if line.startswith("  batch "))
    total, *factors = map(int, re.findall(r"\d+", line))
    assert total == math.prod(factors) == 16


def test_one_process_that_needs_a_process_group_is_unsharded_all_the_same() -> None:
    assert layout(Degrees(), cpu_offload=False) == "unsharded"
    assert layout(Degrees(), cpu_offload=True) == "unsharded, offloaded to the CPU"


def test_memory_settings_show_where_they_act(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("WORLD_SIZE", "4")
    argv = [
        "--job.config_file", "train_configs/tiny_wan_dmd2.toml", "--job.dry_run",
        "--training.global_batch_size", "16", "--training.local_batch_size", "2",
        "--training.reduce_gradients", "every", "--parallelism.exchange_groups", "in_turn",
        "--roles.teacher.parallelism.tensor", "4",
    ]  # fmt: skip
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  batch ") and line.endswith("gradients reduced after each") for line in lines)
    assert [
        role for role in ROLES if any(line.startswith(f"  {role:<9} ") and "at a time" in line for line in lines)
    ] == ["teacher"]
