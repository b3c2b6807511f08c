"""Discrete consistency distillation: its known optimum, spies for what outcomes cannot show, and mutants for both.

The teacher's guided law is N(4, 0.49), and on a grid of N steps the consistency map that belongs to it is the product
of N Euler steps, each affine. A student with one affine velocity for each level of the grid can be that map exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import toy_family
from mutants import is_caught
from torch import Tensor, nn
from toy_run import toy_trainer

from titan_distill.diffusion import schedule
from titan_distill.methods import consistency, losses
from titan_distill.methods.consistency import Consistency, ConsistencyConfig
from titan_distill.models.base import Guidance
from titan_distill.roles import RoleHandle
from titan_distill.trainer import Trainer

NUM_LEVELS = 8


class GridVelocity(nn.Module):
    """v = a x + b, with two numbers for each level of the grid. At σ = 0 it is asked, and its answer has no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.affine = nn.Parameter(torch.zeros(NUM_LEVELS + 1, 2))

    def forward(self, x: Tensor, sigma_B1: Tensor, label_B1: Tensor) -> Tensor:
        index_B = (sigma_B1[:, 0] * NUM_LEVELS).round().long()
        scale, shift = self.affine[index_B].unsqueeze(-1).unbind(1)
        return scale * x + shift


@pytest.fixture(autouse=True)
def grid_flavor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(toy_family.FLAVORS, "grid", GridVelocity)


def trainer_of(folder: Path, *overrides: str) -> Trainer:
    return toy_trainer(folder, "consistency", "--roles.student.flavor", "grid", *overrides)


# --- outcome ---

TRAINING = (
    "--training.steps", "600",
    "--training.global_batch_size", "32",
    "--training.local_batch_size", "32",
    "--metrics.log_interval", "500",
    "--optimizer.lr", "5e-2",
    "--lr_scheduler.decay", "cosine",
    "--method_config.loss", "l2",
)  # fmt: skip


def map_error(trainer: Trainer) -> float:
    """Greatest distance between the student's map and the teacher's guided Euler steps, over all levels."""
    x = torch.linspace(-2.0, 6.0, 16).expand(2, 16)
    condition = trainer.adapter.encode_prompts(["a sample"] * 2)
    worst = 0.0
    with torch.no_grad():
        for level in range(1, NUM_LEVELS + 1):
            predicted = trainer.adapter.predict_x0(
                trainer.roles["student"], x, torch.full((2,), level / NUM_LEVELS, dtype=torch.float64), condition
            )
            worst = max(worst, (predicted - _euler_to_data(x[0].double(), level)).abs().max().item())
    return worst


def _euler_to_data(x: Tensor, level: int) -> Tensor:
    """Written out: the velocity of N(4, 0.49) and steps of 1 / N, in floats."""
    mean, variance = 4.0, 0.49
    for step in range(level, 0, -1):
        sigma = step / NUM_LEVELS
        gain = (1 - sigma) * variance / ((1 - sigma) ** 2 * variance + sigma**2)
        x0 = mean + gain * (x - (1 - sigma) * mean)
        x = x - (x - x0) / sigma / NUM_LEVELS
    return x


ORIGINAL_STEP = schedule.euler_step
OUTCOME_MUTANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "step in the wrong direction": lambda: patch.object(
        schedule, "euler_step", lambda x, v, sigma, lower: ORIGINAL_STEP(x, -v, sigma, lower)
    ),
    "no step at all": lambda: patch.object(schedule, "euler_step", lambda x, v, sigma, lower: x),
    "guidance dropped": lambda: patch.object(ConsistencyConfig, "teacher_guidance", property(lambda self: Guidance())),
}


NIGHTLY = [pytest.param(name, marks=() if name == "none" else pytest.mark.nightly) for name in OUTCOME_MUTANTS]


@pytest.mark.parametrize("name", NIGHTLY)
def test_the_student_becomes_the_teachers_map_and_mutants_do_not(name: str, tmp_path: Path) -> None:
    with OUTCOME_MUTANTS[name]():
        trainer = trainer_of(tmp_path, *TRAINING)
        trainer.run()
        error = map_error(trainer)
    assert (error < 0.03) == (name == "none"), error


# --- spies ---


@dataclass
class Call:
    role: str
    x: Tensor
    sigma_B: Tensor
    gradient: bool
    weights: Tensor


def watched(trainer: Trainer) -> list[Call]:
    """Every forward pass of every role from now on, with the weights that made it."""
    calls: list[Call] = []
    real = trainer.adapter.predict_velocity

    def predict(role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Any) -> Tensor:
        weights = next(role.transformer.parameters()).detach().clone()
        calls.append(Call(role.name, x.detach(), sigma_B, torch.is_grad_enabled(), weights))
        return real(role, x, sigma_B, condition)

    trainer.adapter.predict_velocity = predict  # type: ignore[method-assign]
    return calls


def check_target(folder: Path) -> None:
    """One teacher step, a target from the averaged weights without gradient, a prediction from the trained ones with;
    afterwards both sets of weights are where they were. The loss and its gradient are those of the formula."""
    trainer = trainer_of(folder, "--method_config.loss", "l2")
    trainer.run()
    student, method = trainer.roles["student"], trainer.method
    assert isinstance(method, Consistency) and student.ema is not None
    average, trained = student.ema.shadow["affine"].clone(), student.transformer.affine.detach().clone()
    assert (average - trained).abs().max() > 1e-3
    batch = trainer.adapter.prepare_batch(next(trainer.loader))
    calls = watched(trainer)
    losses_B = method.student_loss(batch, 11).losses_B
    losses_B.sum().backward()

    assert [(call.role, call.gradient) for call in calls] == [("teacher", False), ("student", False), ("student", True)]
    _, target, prediction = calls
    assert torch.equal(target.weights, average) and torch.equal(prediction.weights, trained)
    assert torch.equal(student.ema.shadow["affine"], average) and torch.equal(student.transformer.affine, trained)
    assert all(p.grad is None for p in trainer.roles["teacher"].transformer.parameters())

    sigma, lower = prediction.sigma_B[:, None], target.sigma_B[:, None]
    torch.testing.assert_close(sigma - lower, torch.full_like(sigma, 1 / NUM_LEVELS))
    assert len(set(prediction.sigma_B.tolist())) > 2, "each sample has its own level"
    noise = method.noise.normal("consistency/noise", 11, batch.sample_ids, (64,), device="cpu").double()
    x = (1 - sigma) * batch.latents.double() + sigma * noise
    torch.testing.assert_close(prediction.x.double(), x, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        conditional, unconditional = (
            trainer.roles["teacher"].transformer(x.float(), sigma.float(), torch.full((len(x), 1), label)).double()
            for label in (1.0, 0.0)
        )
    x_lower = x + (lower - sigma) * (unconditional + 3.0 * (conditional - unconditional))
    torch.testing.assert_close(target.x.double(), x_lower, atol=1e-4, rtol=1e-4)

    affine = trained.double().requires_grad_()
    expected_B = (_x0(affine, x, sigma) - _x0(average.double(), x_lower, lower)).square().mean(1)
    torch.testing.assert_close(losses_B, expected_B, atol=1e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad(expected_B.sum(), affine)
    torch.testing.assert_close(student.transformer.affine.grad.double(), gradient, atol=1e-3, rtol=1e-3)


def _x0(affine: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    scale, shift = affine[(sigma[:, 0] * NUM_LEVELS).round().long()].unsqueeze(-1).unbind(1)
    return x - sigma * (scale * x + shift)


def check_boundary(folder: Path) -> None:
    """At the lowest level the target is the teacher's point itself, whatever the network says."""
    trainer = trainer_of(folder, "--method_config.num_grid_steps", "1")
    assert trainer.roles["student"].ema is not None
    trainer.roles["student"].ema.shadow["affine"].fill_(1.0)
    calls = watched(trainer)
    method, batch = trainer.method, trainer.adapter.prepare_batch(next(trainer.loader))
    assert isinstance(method, Consistency)
    with patch.object(consistency.losses, "consistency_loss") as loss:
        loss.return_value = torch.zeros(8)
        method.student_loss(batch, 0)
    _, _, target, mask = loss.call_args.args
    assert mask is None
    assert calls[1].sigma_B.abs().max() == 0 and torch.equal(target, calls[1].x)


SPIES = {check.__name__: check for check in (check_target, check_boundary)}


@pytest.mark.parametrize("name", SPIES)
def test_spy(name: str, tmp_path: Path) -> None:
    SPIES[name](tmp_path)


def _target_with_gradient(self: Consistency, x: Tensor, sigma_B: Tensor, condition: Any) -> Tensor:
    return self.adapter.predict_x0(self.roles["student"], x, sigma_B, condition)


def _target_from_above(self: Consistency, x: Tensor, sigma_B: Tensor, condition: Any) -> Tensor:
    return ORIGINAL_TARGET(self, x, sigma_B + 1 / NUM_LEVELS, condition)


def _one_level_a_batch(u: Tensor, num_steps: int, shift: float) -> tuple[Tensor, Tensor]:
    return ORIGINAL_NEIGHBOURS(u[:1].expand_as(u), num_steps, shift)


ORIGINAL_TARGET, ORIGINAL_NEIGHBOURS = Consistency._target, schedule.neighbouring_sigmas
MUTANTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]] = {
    "target from the trained weights": (
        lambda: patch.object(RoleHandle, "evaluation", lambda self: nullcontext()), "check_target"
    ),
    "gradient through the target": (
        lambda: patch.object(Consistency, "_target", _target_with_gradient), "check_target"
    ),
    "target asked for the upper level": (
        lambda: patch.object(Consistency, "_target", _target_from_above), "check_target"
    ),
    "no boundary condition": (
        lambda: patch.object(schedule, "x0_from_velocity", lambda x, v, sigma: x - v), "check_boundary"
    ),
    "step in the wrong direction": (
        OUTCOME_MUTANTS["step in the wrong direction"], "check_target"
    ),
    "guidance dropped": (OUTCOME_MUTANTS["guidance dropped"], "check_target"),
    "one level for the whole batch": (
        lambda: patch.object(schedule, "neighbouring_sigmas", _one_level_a_batch), "check_target"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path) -> None:
    plant, spy = MUTANTS[name]
    assert is_caught(lambda: SPIES[spy](tmp_path), plant())


# --- losses, the grid, micro-batches, refusals ---


@pytest.mark.parametrize("size", [4, 400])
def test_losses_against_their_formulas(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(3, size, dtype=torch.float64, generator=generator, requires_grad=True)
    target = predicted.detach() + torch.tensor([[1e-5], [1e-3], [1.0]], dtype=torch.float64).expand(3, size)
    target.requires_grad_()
    for kind in ("l2", "pseudo_huber"):
        found_B = losses.consistency_loss(kind, predicted, target)
        for found, one, other in zip(found_B, predicted, target, strict=True):
            squared = sum(d * d for d in (one - other).tolist())
            width = 0.00054 * size**0.5  # iCT's, whose loss grows with √size
            huber = ((squared + width**2) ** 0.5 - width) / size**0.5
            assert found.item() == pytest.approx(squared / size if kind == "l2" else huber, rel=1e-9)
        found_B.sum().backward()
        assert target.grad is None
    with pytest.raises(ValueError, match="choose 'l2' or 'pseudo_huber'"):
        losses.consistency_loss("l1", predicted, target)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_neighbours_cover_the_grid_evenly(shift: float) -> None:
    from titan_distill.diffusion.sampler import ode_sigmas

    u = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    upper, lower = schedule.neighbouring_sigmas(u, 8, shift)
    grid = ode_sigmas(8, shift).flip(0)
    torch.testing.assert_close(upper, grid[1:].repeat_interleave(2), atol=1e-15, rtol=0)
    torch.testing.assert_close(lower, grid[:-1].repeat_interleave(2), atol=1e-15, rtol=0)
    assert upper.max() == 1 and lower.min() == 0


def test_micro_batches_make_the_same_update(tmp_path: Path) -> None:
    """The average is put in place of the weights for each of them, between backwards that add up."""
    ends = []
    for size in ("8", "2"):
        trainer = trainer_of(tmp_path / size, "--training.local_batch_size", size, "--data.path", _data(tmp_path))
        trainer.run()
        ends.append(trainer.roles["student"].transformer.affine.detach())
    torch.testing.assert_close(*ends, atol=1e-5, rtol=1e-5)


def _data(folder: Path) -> str:
    path = folder / "shared.parquet"
    return str(path if path.exists() else toy_family.write_data(path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--ema.decay", "0"), r"needs the student's average, but ema\.decay = 0"),
        (("--checkpoint.mode", "async"), r"set checkpoint\.mode to 'sync'"),
        (("--method_config.num_grid_steps", "0"), r"num_grid_steps = 0 is out of range; choose at least 1"),
        (("--method_config.denoising_steps", "[500.0, 1000.0]"), r"must descend strictly"),
    ],
)
def test_refusals(overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, *overrides)


def test_the_students_own_target_needs_no_average(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "--ema.decay", "0", "--method_config.target", "student")
    trainer.run()
    assert trainer.roles["student"].ema is None


def test_a_resumed_run_has_the_same_targets(tmp_path: Path) -> None:
    """The average is part of the checkpoint: eight steps at once, or four and four."""
    data = ("--data.path", _data(tmp_path), "--checkpoint.enabled", "true", "--checkpoint.resume_from", "latest")
    whole = trainer_of(tmp_path / "whole", *data)
    whole.run()
    trainer_of(tmp_path / "parts", *data, "--training.steps", "4").run()
    resumed = trainer_of(tmp_path / "parts", *data)
    assert resumed.state.step == 4
    resumed.run()
    assert torch.equal(resumed.roles["student"].transformer.affine, whole.roles["student"].transformer.affine)
