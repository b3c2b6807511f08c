"""The first idea of this project: the same TOML gives the same curve on any layout, and across a resume."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from runs import REPOSITORY, read_metrics, run_ranks, tiny_argv

from titan_distill.checkpoint.convert import role_tensors
from titan_distill.train import main

METHODS = ("dmd2", "finetune")
TOLERANCE = 1e-5
CURVES = ("loss/", "grad_norm/", "dmd/")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one run per method and layout, named ``<method>-<layout>``."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        for method in METHODS:
            for micro_batches, local in ((1, "4"), (2, "2"), (4, "1")):
                output = folder / f"{method}-micro{micro_batches}"
                interval = ("--checkpoint.interval", "4", "--checkpoint.keep", "2")
                assert main(tiny_argv(method, output, "--training.local_batch_size", local, *interval)) == 0
            sharded = ("--training.local_batch_size", "2", "--checkpoint.interval", "4")
            run_ranks(2, tiny_argv(method, folder / f"{method}-fsdp2", *sharded))
    return folder


def curves(run: Path) -> list[dict[str, float]]:
    lines = read_metrics(run)
    assert len(lines) == 8
    return [{key: value for key, value in line.items() if key.startswith(CURVES)} for line in lines]


@pytest.mark.parametrize("layout", ["micro2", "micro4", "fsdp2"])
@pytest.mark.parametrize("method", METHODS)
def test_layout_does_not_change_the_curve(runs: Path, method: str, layout: str) -> None:
    expected, found = curves(runs / f"{method}-micro1"), curves(runs / f"{method}-{layout}")
    assert any(line["grad_norm/student"] > 1e-4 for line in expected if "grad_norm/student" in line)
    for reference, line in zip(expected, found, strict=True):
        assert reference.keys() == line.keys()
        for key, value in reference.items():
            assert line[key] == pytest.approx(value, rel=TOLERANCE), key


@pytest.mark.parametrize("method", METHODS)
def test_four_steps_and_four_more_equal_eight(
    runs: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise, from the checkpoint of step 4: losses, and every weight and EMA of every trained role at step 8."""
    monkeypatch.chdir(REPOSITORY)
    whole = runs / f"{method}-micro1"
    source = whole / "checkpoints" / "step-00000004"
    assert main(tiny_argv(method, tmp_path / "resumed", "--checkpoint.resume_from", str(source))) == 0
    tail = read_metrics(tmp_path / "resumed")
    assert [line["step"] for line in tail] == [5, 6, 7, 8]
    for resumed, reference in zip(tail, read_metrics(whole)[4:], strict=True):
        curve = {key: value for key, value in reference.items() if key.startswith((*CURVES, "lr/", "samples_seen"))}
        assert {key: resumed[key] for key in curve} == curve
    last = "checkpoints/step-00000008"
    for role in ("student", "critic") if method == "dmd2" else ("student",):
        assert_same_weights(whole / last, tmp_path / "resumed" / last, role)


def assert_same_weights(first: Path, second: Path, role: str) -> None:
    for use_ema in (False, True) if role == "student" else (False,):
        pairs = zip(
            role_tensors(first, role, use_ema=use_ema), role_tensors(second, role, use_ema=use_ema), strict=True
        )
        for (name, a), (other, b) in pairs:
            assert name == other
            assert torch.equal(a, b), name


@pytest.mark.parametrize("method", METHODS)
def test_resume_on_another_layout(runs: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved by two FSDP ranks, resumed by one: the curve goes on within rounding."""
    monkeypatch.chdir(REPOSITORY)
    source = runs / f"{method}-fsdp2" / "checkpoints" / "step-00000004"
    assert main(tiny_argv(method, tmp_path / "resumed", "--checkpoint.resume_from", str(source))) == 0
    for resumed, reference in zip(curves_of(tmp_path / "resumed"), curves(runs / f"{method}-micro1")[4:], strict=True):
        for key, value in reference.items():
            assert resumed[key] == pytest.approx(value, rel=TOLERANCE), key


def curves_of(run: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key.startswith(CURVES)} for line in read_metrics(run)]


def test_metrics_have_the_promised_keys(runs: Path) -> None:
    line = read_metrics(runs / "dmd2-micro1")[0]
    promised = {"step", "samples_seen", "tokens_per_second", "memory_gib", "time/data", "time/rollout", "time/teacher"}
    promised |= {"time/critic", "time/backward", "time/optimizer"}
    promised |= {f"{kind}/{role}" for kind in ("loss", "grad_norm", "lr") for role in ("student", "critic")}
    assert promised <= line.keys()
    assert all(math.isfinite(value) for value in line.values())
