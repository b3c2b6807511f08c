"""Faults of resumed runs: state that a resume forgets. The resume oracle must see each one in the steps that follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from titan_distill.checkpoint import state
from titan_distill.checkpoint.state import TrainState
from titan_distill.methods.dmd2 import Dmd2
from titan_distill.roles import RoleManager


def critic_optimizer_forgotten(patch: pytest.MonkeyPatch) -> None:
    def fault(roles: RoleManager, at: TrainState) -> TrainState:
        roles["critic"].optimizers["transformer"].state.clear()
        return at

    _after_restore(patch, fault)


def ema_begins_anew(patch: pytest.MonkeyPatch) -> None:
    """The average starts again from the weights, as where it is built after loading and not saved."""

    def fault(roles: RoleManager, at: TrainState) -> TrainState:
        ema = roles["student"].ema
        assert ema is not None
        ema.shadow = {name: p.detach().clone() for name, p in roles["student"].transformer.named_parameters()}
        return at

    _after_restore(patch, fault)


def update_counter_begins_anew(patch: pytest.MonkeyPatch) -> None:
    """The EMA waits for its start a second time."""

    def fault(roles: RoleManager, at: TrainState) -> TrainState:
        roles["student"].num_updates = 0
        return at

    _after_restore(patch, fault)


def schedule_begins_anew(patch: pytest.MonkeyPatch) -> None:
    def fault(roles: RoleManager, at: TrainState) -> TrainState:
        roles["critic"].schedulers["transformer"].last_epoch = 0
        return at

    _after_restore(patch, fault)


def cadence_begins_anew(patch: pytest.MonkeyPatch) -> None:
    """Updates due are counted from the resume."""
    updates = Dmd2.updates

    def fault(roles: RoleManager, at: TrainState) -> TrainState:
        patch.setattr(Dmd2, "updates", lambda method, step: updates(method, step - at.step))
        return at

    _after_restore(patch, fault)


def samples_counted_by_rank(patch: pytest.MonkeyPatch) -> None:
    _after_restore(patch, lambda roles, at: replace(at, samples_seen=at.samples_seen // 2))


def last_step_repeated(patch: pytest.MonkeyPatch) -> None:
    """The saved number of steps is read as the index of the last one."""
    _after_restore(
        patch, lambda roles, at: replace(at, step=at.step - 1, samples_seen=at.samples_seen * (at.step - 1) // at.step)
    )


def _after_restore(patch: pytest.MonkeyPatch, fault: Callable[[RoleManager, TrainState], TrainState]) -> None:
    restore = state.restore
    patch.setattr(state, "restore", lambda saved, roles: fault(roles, restore(saved, roles)))


MUTANTS = {
    mutant.__name__: mutant
    for mutant in (
        critic_optimizer_forgotten,
        ema_begins_anew,
        update_counter_begins_anew,
        schedule_begins_anew,
        cadence_begins_anew,
        samples_counted_by_rank,
        last_step_repeated,
    )
}
