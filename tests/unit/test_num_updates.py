"""Number of updates of each role: the methods' formulas against counting, and runs of any length."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import is_caught
from toy_run import METHODS, toy_trainer

from titan_distill.methods.base import TrainingMethod, method_class
from titan_distill.methods.dmd2 import Dmd2, Dmd2Config
from titan_distill.methods.rcm import RcmConfig

DISCRIMINATORS: tuple[dict[str, Any], ...] = ({}, {"adversarial_weight": 0.1, "discriminator_depths": (1,)})


def scheduling_part(name: str, config: Any) -> TrainingMethod:
    """A method that can only say which updates are due: it has a configuration, and no roles."""
    method = object.__new__(method_class(name))
    method.config = config
    return method


@st.composite
def configurations(draw: st.DrawFn, name: str) -> Any:
    kind = method_class(name).config_class
    options: dict[str, Any] = {}
    if issubclass(kind, Dmd2Config):
        options = {"exclusive": draw(st.booleans()), **draw(st.sampled_from(DISCRIMINATORS))}
        options["update_ratio"] = draw(st.integers(2 if options["exclusive"] else 1, 7))
    if issubclass(kind, RcmConfig):
        options["tangent_warmup"] = draw(st.integers(0, 20))
    return kind(**options)


def check_formula(name: str) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(config=configurations(name), num_steps=st.integers(0, 60))
    def check(config: Any, num_steps: int) -> None:
        method = scheduling_part(name, config)
        counted = Counter(update.role for step in range(num_steps) for update in method.updates(step))
        formula = method_class(name).num_updates(config, num_steps)
        assert {role: number for role, number in formula.items() if number} == counted

    check()


@pytest.mark.parametrize("name", METHODS)
def test_the_formula_is_what_counting_gives(name: str) -> None:
    check_formula(name)


def test_a_formula_that_rounds_down_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded_down(cls: type[Dmd2], config: Any, num_steps: int) -> dict[str, int]:
        students = num_steps // config.update_ratio
        critics = num_steps - students if config.exclusive else num_steps
        return {"student": students, "critic": critics, **dict.fromkeys(cls.heads(config), critics)}

    monkeypatch.setattr(Dmd2, "num_updates", classmethod(rounded_down))
    assert is_caught(lambda: check_formula("dmd2"))


@pytest.mark.parametrize("method", ["finetune", "dmd2", "rcm"])
def test_a_run_of_any_length_starts_at_once(method: str, tmp_path: Path) -> None:
    """Counting 10¹⁸ steps one by one would take longer than anybody waits."""
    trainer = toy_trainer(tmp_path, method, "--training.steps", str(10**18), "--lr_scheduler.decay", "linear")
    trainer.train_step()
    assert trainer.state.step == 1
    rate = trainer.config.roles["student"].optimizer.lr
    assert trainer.roles["student"].learning_rate == pytest.approx(rate, rel=1e-9)
