"""N + M: a family that the package has never heard of runs every method, with checkpoints, through the real trainer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from runs import REPOSITORY
from toy_run import JOBS, METHODS, toy_trainer

from titan_distill.models.base import model_family
from titan_distill.registry import FAMILIES, names
from titan_distill.trainer import NonFiniteError

SOURCES = sorted((REPOSITORY / "titan_distill" / "methods").glob("*.py"))


def test_every_method_has_a_job() -> None:
    missing = [f"tests/assets/toy_{method}.toml" for method in METHODS if method not in JOBS]
    assert not missing, "write them: the tests of every method train on them"


@pytest.mark.parametrize("name", [name for name in names(FAMILIES) if not name.endswith("_probe")])
def test_every_family_has_all_operations(name: str) -> None:
    """Its classes can be built: no operation of the interface is missing, and every key has a default."""
    family = model_family(name)
    assert not family.__abstractmethods__
    family.pipeline_config_class()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_toy_family(method: str, tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, method, "--checkpoint.enabled", "true", "--checkpoint.interval", "4")
    before = [p.clone() for p in trainer.roles["student"].parameters()]
    trainer.run()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.roles["student"].parameters(), strict=True))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps == ["step-00000004", "step-00000008"]


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_can_be_extended(method: str, tmp_path: Path) -> None:
    checkpointing = ("--checkpoint.enabled", "true", "--checkpoint.resume_from", "latest")
    toy_trainer(tmp_path, method, *checkpointing).run()
    longer = toy_trainer(tmp_path, method, *checkpointing, "--training.steps", "12")
    assert longer.state.step == 8
    assert longer.state.samples_seen == 64
    longer.run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))


def test_another_seed_cannot_resume(tmp_path: Path) -> None:
    checkpointing = ("--checkpoint.enabled", "true", "--checkpoint.resume_from", "latest")
    toy_trainer(tmp_path, "finetune", *checkpointing).run()
    with pytest.raises(ValueError, match=r"cannot be resumed with job\.seed: 0 -> 7; set it back, or start a new run"):
        toy_trainer(tmp_path, "finetune", *checkpointing, "--job.seed", "7")


def test_a_non_finite_loss_stops_before_the_optimizer(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, "finetune")
    before = [p.clone() for p in trainer.roles["student"].parameters()]
    real = trainer.method.updates

    def poisoned(step: int) -> list:
        (update,) = real(step)

        def loss(batch, step):  # type: ignore[no-untyped-def]
            result = update.loss(batch, step)
            return type(result)(result.losses_B * float("nan"))

        return [type(update)(update.role, loss)]

    trainer.method.updates = poisoned  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"loss/student is not finite at step 1:.*\[0, 1, 2, 3, 4, 5, 6, 7\]"):
        trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.roles["student"].parameters(), strict=True))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_methods_know_no_family_and_stay_short(source: Path) -> None:
    text = source.read_text()
    assert not re.search(r"\b(wan|videos?|frames?|tiles?|patch(es)?)\b", text, re.IGNORECASE)
    assert not re.search(r"^\s*(from|import) titan_distill\.models\.(?!base|head|streaming)", text, re.MULTILINE)
    assert len(text.splitlines()) <= 400


def test_validation_gives_its_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder's blocks are of no use to training; before the first step, and after the last."""
    trainer, emptied = toy_trainer(tmp_path, "finetune", "--validation.enabled", "true", "--training.steps", "2"), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(trainer.state.step))
    assert trainer.run()
    assert emptied == [0, 2]
