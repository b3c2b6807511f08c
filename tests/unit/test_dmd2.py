"""DMD2: outcomes with a known optimum (T1), and spies for what outcomes cannot show.

Each mutant named in the literature as a silent mistake is planted here, and the test that guards against it must then
fail.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from mutants import is_caught
from torch import Tensor
from toy_run import toy_trainer

from titan_distill.data.loader import Batch
from titan_distill.methods import dmd2, losses
from titan_distill.methods.dmd2 import Dmd2, Dmd2Config
from titan_distill.roles import RoleHandle
from titan_distill.trainer import Trainer


@dataclass
class Call:
    role: str
    x: Tensor
    sigma: float
    gradient: bool
    num_conditions: int


@dataclass
class Spy:
    """Records every forward pass of every role, and every EMA tick."""

    calls: list[Call] = field(default_factory=list)

    def watch(self, trainer: Trainer) -> Spy:
        real = trainer.adapter.predict_velocity

        def predict(role: Any, x: Tensor, sigma_B: Tensor, condition: Any) -> Tensor:
            self.calls.append(Call(role.name, x.detach(), sigma_B[0].item(), torch.is_grad_enabled(), len(x)))
            return real(role, x, sigma_B, condition)

        trainer.adapter.predict_velocity = predict  # type: ignore[method-assign]
        return self

    def of(self, role: str) -> list[Call]:
        return [call for call in self.calls if call.role == role]


def method_of(trainer: Trainer) -> Dmd2:
    assert isinstance(trainer.method, Dmd2)
    return trainer.method


def one_batch(trainer: Trainer) -> Batch:
    return trainer.adapter.prepare_batch(next(trainer.loader))


# --- spies
# ---------------------------------------------------------------------------------------------------------------


def check_forwards_and_gradient_modes(folder: Path) -> None:
    """As many student forwards as the exit says, each at its level of the schedule, and only the last with gradient."""
    trainer = toy_trainer(folder, "dmd2")
    spy, method, batch = Spy().watch(trainer), method_of(trainer), one_batch(trainer)
    exits = set()
    for step in range(12):
        spy.calls.clear()
        method.student_loss(batch, step)
        exit_index = len(spy.of("student")) - 1
        exits.add(exit_index)
        assert exit_index == trainer.method.noise.index("dmd2/student/exit", step, 4)
        assert [call.sigma for call in spy.of("student")] == pytest.approx([1.0, 0.75, 0.5, 0.25][: exit_index + 1])
        assert [call.gradient for call in spy.of("student")] == [False] * exit_index + [True]
        assert [call.gradient for call in spy.of("teacher") + spy.of("critic")] == [False, False]
    assert exits == {0, 1, 2, 3}


def check_critic_update_inputs(folder: Path) -> None:
    """The critic sees the student's own samples, re-noised, from every exit; only it carries gradient."""
    trainer = toy_trainer(folder, "dmd2")
    student = trainer.roles["student"].transformer
    with torch.no_grad():  # a student far from the data: what the critic is fed tells the two apart
        student.affine.copy_(torch.tensor([[0.0, 40.0 + level] for level in range(4)]))
    spy, method, batch = Spy().watch(trainer), method_of(trainer), one_batch(trainer)
    seen = set()
    for step in range(12):
        spy.calls.clear()
        method.critic_loss(batch, step)
        assert not any(call.gradient for call in spy.of("student"))
        (call,) = spy.of("critic")
        assert call.gradient
        clean = call.x.mean().item() / (1 - _mean_sigma(method, batch, step))
        exit_index = len(spy.of("student")) - 1
        assert clean == pytest.approx(40 + exit_index, abs=4.0)
        seen.add(exit_index)
    assert seen == {0, 1, 2, 3}


def _mean_sigma(method: Dmd2, batch: Batch, step: int) -> float:
    u_B = method.noise.uniform("dmd2/critic/timestep", step, batch.sample_ids)
    return method._score_sigma(u_B, 0).mean().item()


def check_gradients_stay_home(folder: Path) -> None:
    """A student update leaves no gradient on teacher or critic; a critic update none on the student."""
    trainer = toy_trainer(folder, "dmd2")
    method, batch = method_of(trainer), one_batch(trainer)
    method.student_loss(batch, 0).losses_B.sum().backward()
    assert all(p.grad is None for role in ("teacher", "critic") for p in trainer.roles[role].transformer.parameters())
    assert all(p.grad is not None for p in trainer.roles["student"].parameters())
    trainer.roles["student"].transformer.zero_grad(set_to_none=True)
    method.critic_loss(batch, 0).losses_B.sum().backward()
    assert all(p.grad is None for p in trainer.roles["student"].parameters())


def check_loss_against_transcription(folder: Path) -> None:
    """Student gradient of a whole update against the formulas of DMD eq. 7-8, written out literally in fp64."""
    trainer = toy_trainer(folder, "dmd2", "--method_config.last_step_only", "true")
    method, batch = method_of(trainer), one_batch(trainer)
    spy = Spy().watch(trainer)
    captured: list[Tensor] = []
    real_loss = losses.dmd_loss

    def capture(x: Tensor, g: Tensor, mask: Tensor | None = None) -> Tensor:
        x.retain_grad()
        captured.append(x)
        return real_loss(x, g, mask)

    with patch.object(losses, "dmd_loss", capture):
        method.student_loss(batch, 0).losses_B.sum().backward()
    x_g = captured[0].detach().double()
    u_B = method.noise.uniform("dmd2/student/timestep", 0, batch.sample_ids)
    sigma = u_B.clamp(0.02, 0.98)[:, None]
    noise = method.noise.normal("dmd2/student/noise", 0, batch.sample_ids, (64,), device="cpu").double()
    x_t = (1 - sigma) * x_g + sigma * noise
    assert torch.allclose(spy.of("critic")[0].x.double(), x_t, atol=1e-5)
    fake = _x0(trainer, "critic", x_t, sigma, 1.0)
    conditional, unconditional = (_x0(trainer, "teacher", x_t, sigma, label) for label in (1.0, 0.0))
    real = unconditional + 3.0 * (conditional - unconditional)
    expected = torch.stack(
        [(f - r) / (x - r).abs().mean() / f.numel() for f, r, x in zip(fake, real, x_g, strict=True)]
    )
    assert captured[0].grad is not None
    torch.testing.assert_close(captured[0].grad.double(), expected, rtol=2e-4, atol=1e-6)


def _x0(trainer: Trainer, role: str, x: Tensor, sigma_B1: Tensor, label: float) -> Tensor:
    module = trainer.roles[role].transformer
    with torch.no_grad():
        v = module(x.float(), sigma_B1.float(), torch.full((len(x), 1), label)).double()
    return x - sigma_B1 * v


def check_critic_loss_against_transcription(folder: Path) -> None:
    """‖v − (ε − x_g)‖², mean over a sample, written out in fp64 for the noised samples that the critic really saw."""
    trainer = toy_trainer(folder, "dmd2")
    method, batch = method_of(trainer), one_batch(trainer)
    spy = Spy().watch(trainer)
    result = method.critic_loss(batch, 0)
    (call,) = spy.of("critic")
    sigma = method.noise.uniform("dmd2/critic/timestep", 0, batch.sample_ids).clamp(0.02, 0.98)[:, None]
    noise = method.noise.normal("dmd2/critic/noise", 0, batch.sample_ids, (64,), device="cpu").double()
    x_g = (call.x.double() - sigma * noise) / (1 - sigma)
    with torch.no_grad():
        v = trainer.roles["critic"].transformer(call.x, sigma.float(), torch.ones(len(sigma), 1)).double()
    torch.testing.assert_close(result.losses_B.double(), (v - (noise - x_g)).square().mean(1), rtol=1e-4, atol=1e-6)


def check_cadence_and_ema(folder: Path) -> None:
    """Ratio 3: student on steps 0, 3, 6 before the critic; the critic always; the EMA ticks with the student only."""
    trainer = toy_trainer(folder, "dmd2", "--method_config.update_ratio", "3", "--ema.decay", "0.9")
    log: list[str] = []
    real = trainer.run_update
    ticks: list[int] = []
    ema = trainer.roles["student"].ema
    assert ema is not None
    real_tick = ema.update

    def run_update(update: Any, batch: Batch) -> dict[str, float]:
        log.append(f"{trainer.state.step}{update.role[0]}")
        return real(update, batch)

    with (
        patch.object(trainer, "run_update", run_update),
        patch.object(ema, "update", lambda module, n: (ticks.append(n), real_tick(module, n))),
    ):
        trainer.run()
    assert log == ["0s", "0c", "1c", "2c", "3s", "3c", "4c", "5c", "6s", "6c", "7c"]
    assert ticks == [0, 3, 6]


def check_ema_start(folder: Path) -> None:
    """Ratio 3 and a start after 4 training steps: equal to the weights after the updates of steps 0 and 3, an average
    from that of step 6 on, which is the student's third."""
    options = ("--method_config.update_ratio", "3", "--ema.decay", "0.75", "--ema.start_step", "4")
    trainer = toy_trainer(folder, "dmd2", *options)
    student = trainer.roles["student"]
    assert student.ema is not None
    average: list[Tensor] = []
    for step in range(8):
        trainer.train_step()
        weights = [p.detach().clone() for p in student.parameters()]
        if step < 4:
            average = weights
        elif step == 6:
            average = [0.75 * a + 0.25 * w for a, w in zip(average, weights, strict=True)]
        for expected, found in zip(average, student.ema.shadow.values(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def check_per_sample_normaliser(folder: Path) -> None:
    """Two very unequal samples in one batch are each scaled by their own distance, not by a common one."""
    generated = torch.tensor([[1.0, 3.0], [100.0, 300.0]], dtype=torch.float64)
    real = torch.zeros(2, 2, dtype=torch.float64)
    fake = torch.tensor([[2.0, 2.0], [2.0, 2.0]], dtype=torch.float64)
    g = losses.dmd_direction(fake, real, generated)
    torch.testing.assert_close(g, torch.tensor([[1.0, 1.0], [0.01, 0.01]], dtype=torch.float64))


def check_score_times(folder: Path) -> None:
    """`ts_schedule` keeps score times from below the step after the exit, `ts_schedule_max` from above the exit, each
    alone; at shift 3, where the schedule's levels are 1, 0.9, 0.75 and 0.5."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for lower, upper in ((False, False), (True, False), (False, True), (True, True)):
        switches = ("--method_config.ts_schedule", str(lower), "--method_config.ts_schedule_max", str(upper))
        trainer = toy_trainer(folder, "dmd2", "--pipeline_config.flow_shift", "3", *(s.lower() for s in switches))
        for exit_index, (level, after) in enumerate(((1.0, 0.9), (0.9, 0.75), (0.75, 0.5), (0.5, 0.0))):
            expected = torch.tensor([after if lower else 0.0, level if upper else 1.0]).double().clamp(0.02, 0.98)
            torch.testing.assert_close(method_of(trainer)._score_sigma(ends, exit_index), expected)


SPIES: dict[str, Callable[[Path], None]] = {
    check.__name__: check
    for check in (
        check_forwards_and_gradient_modes,
        check_critic_update_inputs,
        check_gradients_stay_home,
        check_loss_against_transcription,
        check_critic_loss_against_transcription,
        check_cadence_and_ema,
        check_ema_start,
        check_score_times,
        check_per_sample_normaliser,
    )
}


@pytest.mark.parametrize("name", SPIES)
def test_spy(name: str, tmp_path: Path) -> None:
    SPIES[name](tmp_path)


# --- mutants: each must make its spy fail
# ------------------------------------------------------------------------------------


def _no_backward_simulation(self: Dmd2, batch: Batch, condition: Any, step: int, purpose: str, levels: Any) -> Tensor:
    return self.normal(f"{purpose}/noise/0", batch, step)


def _rollout_with_gradient(self: Dmd2, batch: Batch, condition: Any, step: int, purpose: str) -> dmd2.Rollout:
    exit_index = self.noise.index(f"{purpose}/exit", step, len(self.sigmas))
    levels = self.rollout_levels(batch, step, purpose, exit_index)
    x = self._student_input(batch, condition, step, purpose, levels)
    return dmd2.Rollout(self._student_x0(x, levels[-1], condition), exit_index)


def _last_exit_for_critic(self: Dmd2, batch: Batch, condition: Any, step: int, purpose: str) -> dmd2.Rollout:
    exit_index = 3 if "critic" in purpose else self.noise.index(f"{purpose}/exit", step, len(self.sigmas))
    levels = self.rollout_levels(batch, step, purpose, exit_index)
    with torch.no_grad():
        x = self._student_input(batch, condition, step, purpose, levels)
    return dmd2.Rollout(self._student_x0(x, levels[-1], condition), exit_index)


def _loss_through_the_scores(self: Dmd2, batch: Batch, step: int) -> Any:
    condition = self.adapter.text_condition(batch)
    rollout = self.rollout(batch, condition, step, purpose="dmd2/student")
    sigma_B = torch.full((len(rollout.x0),), 0.5)
    x = self.adapter.add_noise(rollout.x0, torch.zeros_like(rollout.x0), sigma_B)
    fake, real = (self.adapter.predict_x0(self.roles[name], x, sigma_B, condition) for name in ("critic", "teacher"))
    return dmd2.LossResult((fake - real).square().mean(1))


def _critic_on_real_data(self: Dmd2, batch: Batch, condition: Any, step: int, purpose: str) -> dmd2.Rollout:
    if "critic" in purpose:
        return dmd2.Rollout(batch.latents, self.noise.index(f"{purpose}/exit", step, 4))
    return ORIGINAL_ROLLOUT(self, batch, condition, step, purpose)


ORIGINAL_ROLLOUT = Dmd2.rollout
ORIGINAL_DIRECTION = losses.dmd_direction
ORIGINAL_CRITIC_LOSS = losses.critic_loss
ORIGINAL_STEP = RoleHandle.step


def _no_normaliser(fake: Tensor, real: Tensor, generated: Tensor, normalise: bool = True, **_: Any) -> Tensor:
    return ORIGINAL_DIRECTION(fake, real, generated, normalise=False)


def _batch_normaliser(fake: Tensor, real: Tensor, generated: Tensor, normalise: bool = True, **_: Any) -> Tensor:
    return (fake - real) / (generated - real).abs().mean()


def _wrong_sign(fake: Tensor, real: Tensor, generated: Tensor, normalise: bool = True, **_: Any) -> Tensor:
    return -ORIGINAL_DIRECTION(fake, real, generated, normalise)


def _always_student(self: Dmd2, step: int) -> list[Any]:
    return [dmd2.Update("student", self.student_loss), dmd2.Update("critic", self.critic_loss)]


def _both_bounds(u_B: Tensor, *, low: float, high: float, **options: Any) -> Tensor:
    """The upper bound follows the lower one."""
    return ORIGINAL_SCORE_SIGMA(u_B, low=low, high=high if low == 0 else min(high, low + 0.25), **options)


ORIGINAL_SCORE_SIGMA = dmd2.schedule.score_sigma


def _x0_critic_loss(kind: str, *tensors: Tensor) -> Tensor:
    return ORIGINAL_CRITIC_LOSS("x0", *tensors)


def _step_and_tick_again(self: RoleHandle, train_step: int, *, tick_ema: bool) -> None:
    ORIGINAL_STEP(self, train_step, tick_ema=tick_ema)
    if self.ema is not None:
        self.ema.update(self.transformer, train_step)


def _step_counts_updates(self: RoleHandle, train_step: int, *, tick_ema: bool) -> None:
    ORIGINAL_STEP(self, self.num_updates, tick_ema=tick_ema)


def _guidance_off_by_one(self: Dmd2Config) -> Any:
    return dmd2.Guidance(self.guidance_scale, "offset")


MUTANTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]] = {
    "no backward simulation": (
        lambda: patch.object(Dmd2, "_student_input", _no_backward_simulation),
        "check_forwards_and_gradient_modes",
    ),
    "gradient through the whole rollout": (
        lambda: patch.object(Dmd2, "rollout", _rollout_with_gradient),
        "check_forwards_and_gradient_modes",
    ),
    "critic trained on the last exit only": (
        lambda: patch.object(Dmd2, "rollout", _last_exit_for_critic),
        "check_critic_update_inputs",
    ),
    "critic trained on real data": (
        lambda: patch.object(Dmd2, "rollout", _critic_on_real_data),
        "check_critic_update_inputs",
    ),
    "gradient on teacher and critic": (
        lambda: patch.object(Dmd2, "student_loss", _loss_through_the_scores),
        "check_gradients_stay_home",
    ),
    "missing normaliser": (
        lambda: patch.object(losses, "dmd_direction", _no_normaliser),
        "check_loss_against_transcription",
    ),
    "one normaliser a batch": (
        lambda: patch.object(losses, "dmd_direction", _batch_normaliser),
        "check_per_sample_normaliser",
    ),
    "wrong sign": (lambda: patch.object(losses, "dmd_direction", _wrong_sign), "check_loss_against_transcription"),
    "guidance off by one": (
        lambda: patch.object(Dmd2Config, "teacher_guidance", property(_guidance_off_by_one)),
        "check_loss_against_transcription",
    ),
    "one student update for each critic update": (
        lambda: patch.object(Dmd2, "updates", _always_student),
        "check_cadence_and_ema",
    ),
    "EMA ticks twice an update": (
        lambda: patch.object(RoleHandle, "step", _step_and_tick_again),
        "check_cadence_and_ema",
    ),
    "one switch for both bounds of score times": (
        lambda: patch.object(dmd2.schedule, "score_sigma", _both_bounds),
        "check_score_times",
    ),
    "EMA starts by the role's updates": (
        lambda: patch.object(RoleHandle, "step", _step_counts_updates),
        "check_ema_start",
    ),
    "x0 loss for flow loss in the critic": (
        lambda: patch.object(losses, "critic_loss", _x0_critic_loss),
        "check_critic_loss_against_transcription",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path) -> None:
    plant, spy = MUTANTS[name]
    assert is_caught(lambda: SPIES[spy](tmp_path), plant())
