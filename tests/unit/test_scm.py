"""Continuous-time consistency and rCM: the tangent at and off its known optimum, the training, spies and mutants.

The teacher's guided law is N(4, 0.49), whose consistency map is f(x, σ) = m + s (x − (1 − σ) m) / √((1 − σ)² s² + σ²).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
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
from titan_distill.methods import losses
from titan_distill.methods.dmd2 import Dmd2
from titan_distill.methods.rcm import Rcm
from titan_distill.methods.scm import ScmConfig, TangentTraining
from titan_distill.models.base import Adapter, Guidance
from titan_distill.roles import RoleHandle
from titan_distill.trainer import Trainer

FP64 = torch.float64
MEAN, STD = 4.0, 0.7
NO_WARMUP = ("--method_config.tangent_warmup", "0")


def consistency_map(x: Tensor, sigma: Tensor) -> Tensor:
    return MEAN + STD * (x - (1 - sigma) * MEAN) / ((1 - sigma) ** 2 * STD**2 + sigma**2).sqrt()


class ExactTeacher(nn.Module):
    """The velocities of N(1, 0.49) and N(-0.5, 0.49), which guidance 3 makes that of N(4, 0.49)."""

    def forward(self, x: Tensor, sigma_B1: Tensor, label_B1: Tensor) -> Tensor:
        mean, alpha = 1.5 * label_B1.double() - 0.5, 1 - sigma_B1
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma_B1**2)
        return (x - mean - gain * (x - alpha * mean)) / sigma_B1


class ExactStudent(nn.Module):
    """The velocity whose x0 is the consistency map, off by `error` sin(x + 2 σ)."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = nn.Parameter(torch.tensor(error, dtype=FP64))

    def forward(self, x: Tensor, sigma_B1: Tensor, label_B1: Tensor) -> Tensor:
        return (x - consistency_map(x, sigma_B1)) / sigma_B1 + self.error * (x + 2 * sigma_B1).sin()


class SmoothVelocity(nn.Module):
    """v = a(σ) x + b(σ), with Chebyshev polynomials of degree 6: smooth in time, as the continuous case wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(7, 2))

    def forward(self, x: Tensor, sigma_B1: Tensor, label_B1: Tensor) -> Tensor:
        basis = [torch.ones_like(sigma_B1), 2 * sigma_B1 - 1]
        for _ in range(5):
            basis.append(2 * basis[1] * basis[-1] - basis[-2])
        scale, shift = (torch.cat(basis, 1) @ self.coefficients).unsqueeze(-1).unbind(1)
        return scale * x + shift


@pytest.fixture(autouse=True)
def smooth_flavor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(toy_family.FLAVORS, "smooth", SmoothVelocity)


def exact_trainer(folder: Path, error: float, method: str = "scm", *overrides: str) -> Trainer:
    """A trainer whose teacher and student are known in fp64."""
    trainer = toy_trainer(folder, method, *NO_WARMUP, *overrides)
    trainer.roles["teacher"].modules["transformer"] = ExactTeacher()
    trainer.roles["student"].modules["transformer"] = ExactStudent(error)
    return trainer


def exact_point(trainer: Trainer) -> tuple[Any, Tensor, Tensor]:
    batch = trainer.adapter.prepare_batch(next(trainer.loader))
    sigma_B = torch.tensor([0.05, 0.2, 0.35, 0.5, 0.6, 0.75, 0.9, 0.99], dtype=FP64)
    noise = torch.randn(8, 64, dtype=FP64, generator=torch.Generator().manual_seed(0))
    return batch, schedule.add_noise(batch.latents.double(), noise, sigma_B), sigma_B


def tangent_method(trainer: Trainer) -> TangentTraining:
    assert isinstance(trainer.method, TangentTraining)
    return trainer.method


# --- T0: no training, fp64 ---


def check_tangent_vanishes_at_the_map(folder: Path) -> None:
    trainer = exact_trainer(folder, 0.0)
    batch, x, sigma_B = exact_point(trainer)
    assert tangent_method(trainer).tangent(batch, x, sigma_B, 0).abs().max() < 1e-12


def check_tangent_is_the_derivative_of_x0(folder: Path) -> None:
    """g = cos t · df/dt, with f differenced along the teacher's trajectory in trigonometric time, and F along with it
    for the two warm-ups. Nothing here uses the rectified flow's formulas but the networks' inputs."""
    trainer = exact_trainer(folder, 0.3)
    batch, x, sigma_B = exact_point(trainer)
    student, teacher = (trainer.roles[name].transformer for name in ("student", "teacher"))
    sigma = sigma_B[:, None]
    t, x_t = torch.atan2(sigma, 1 - sigma), x / ((1 - sigma) ** 2 + sigma**2).sqrt()
    one = torch.ones(8, 1, dtype=FP64)

    def x0_of(network: Callable[..., Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        n = 1 / (t.cos() + t.sin())
        return n * x_t - n * t.sin() * network(n * x_t, n * t.sin(), one)

    def output(network: Callable[..., Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        return (t.cos() * x_t - x0_of(network, x_t, t)) / t.sin()

    def guided(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        unconditional = teacher(x, sigma, 0 * label)
        return unconditional + 3.0 * (teacher(x, sigma, label) - unconditional)

    with torch.no_grad():
        slope, h = output(guided, x_t, t), 1e-5
        ends = [(x_t + step * slope, t + step) for step in (h, -h)]
        d_x0, d_output = (
            (f(student, *ends[0]) - f(student, *ends[1])) / (2 * h) for f in (x0_of, output)
        )  # fmt: skip
        difference = output(student, x_t, t) - slope
    g = tangent_method(trainer).tangent(batch, x, sigma_B, 0)
    torch.testing.assert_close(g, t.cos() * d_x0, atol=1e-7, rtol=1e-7)
    assert g.abs().mean() > 0.05

    cos, sin = t.cos(), t.sin()
    velocities = student(x, sigma, one), guided(x, sigma, one)
    with torch.no_grad():
        _, dv = trainer.adapter.predict_velocity_jvp(
            trainer.roles["student"], x, sigma_B, velocities[1], torch.ones_like(sigma_B), {"label": one}
        )
    for ramp in (0.0, 0.4, 1.0):
        expected = {
            "scm": -(cos**2) * difference - ramp * (cos * sin * x_t + cos * sin * d_output),
            "rcm": -cos * (1 - ramp**2 * sin**2).sqrt() * difference - (ramp * cos * sin * x_t + cos * sin * d_output),
        }
        for form, value in expected.items():
            found = losses.consistency_tangent(form, x, *velocities, dv, sigma_B, ramp)
            torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-6)


def check_loss_against_transcription(folder: Path) -> None:
    """‖F − F⁻ − g / (‖g‖ + 0.1)‖² a sample, and −2 g as its gradient in F; the size that is logged is g's own."""
    trainer = exact_trainer(folder, 0.3)
    batch = trainer.adapter.prepare_batch(next(trainer.loader))
    tangents: list[Tensor] = []
    outputs: list[Tensor] = []
    method = tangent_method(trainer)
    real_tangent, real_loss = method.tangent, losses.tangent_loss

    def loss(output: Tensor, g: Tensor) -> Tensor:
        output.retain_grad()
        outputs.append(output)
        return real_loss(output, g)

    with (
        patch.object(method, "tangent", lambda *args: (tangents.append(real_tangent(*args)), tangents[-1])[1]),
        patch.object(losses, "tangent_loss", loss),
    ):
        result = method.tangent_loss(batch, 0)
    result.losses_B.sum().backward()
    (g,), (output,) = tangents, outputs
    norm_B = torch.stack([row.square().sum().sqrt() for row in g])
    assert not g.requires_grad and norm_B.max() > 0.5
    torch.testing.assert_close(result.losses_B, (norm_B / (norm_B + 0.1)) ** 2)
    assert output.grad is not None
    torch.testing.assert_close(output.grad, torch.stack([-2 * row / (row.norm() + 0.1) for row in g]))
    torch.testing.assert_close(result.metrics_B["scm/tangent_size"], norm_B / 8)


def check_descent_flattens_the_map(folder: Path) -> None:
    """A step against the loss's gradient makes the tangent smaller: the sign of everything together."""
    trainer = exact_trainer(folder, 0.3)
    batch, x, sigma_B = exact_point(trainer)
    method, error = tangent_method(trainer), trainer.roles["student"].transformer.error
    sizes = []
    for _ in range(2):
        method.tangent_loss(batch, 0).losses_B.sum().backward()
        sizes.append(method.tangent(batch, x, sigma_B, 0).norm().item())
        with torch.no_grad():
            error -= 1e-2 * error.grad.sign()
    assert sizes[1] < sizes[0]


def check_slope_is_the_derivative_at_small_steps(folder: Path) -> None:
    """Central differences: off by the square of the step, inside [0, 1] at both ends, and by another way than the
    derivative's, which they replace."""
    exact = exact_trainer(folder, 0.3)
    batch, x, sigma_B = exact_point(exact)
    expected = tangent_method(exact).tangent(batch, x, sigma_B, 0)
    errors = []
    for step in ("0.004", "0.002"):
        trainer = exact_trainer(folder, 0.3, "scm", "--method_config.derivative_step", step)
        with patch.object(Adapter, "predict_velocity_jvp", side_effect=AssertionError):
            errors.append((tangent_method(trainer).tangent(batch, x, sigma_B, 0) - expected)[:-1].abs().max().item())
    assert errors[0] < 5e-3 and 3 < errors[0] / errors[1] < 5
    trainer = exact_trainer(folder, 0.0, "scm", "--method_config.derivative_step", "0.03")
    sigmas: list[float] = []
    real = trainer.adapter.predict_velocity

    def predict(role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Any) -> Tensor:
        sigmas.extend(sigma_B.tolist())
        return real(role, x, sigma_B, condition)

    with patch.object(trainer.adapter, "predict_velocity", predict):
        assert tangent_method(trainer).tangent(batch, x, sigma_B, 0).isfinite().all()
    assert min(sigmas) > 0.02 and max(sigmas) == 1.0


CHECKS: dict[str, Callable[[Path], None]] = {
    check.__name__: check
    for check in (
        check_tangent_vanishes_at_the_map,
        check_tangent_is_the_derivative_of_x0,
        check_loss_against_transcription,
        check_descent_flattens_the_map,
        check_slope_is_the_derivative_at_small_steps,
    )
}


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, tmp_path: Path) -> None:
    CHECKS[name](tmp_path)


ORIGINAL_JVP, ORIGINAL_TANGENT = Adapter.predict_velocity_jvp, losses.consistency_tangent
ORIGINAL_EULER = schedule.euler_step


def _without_x(self: Adapter, role: RoleHandle, x: Tensor, sigma: Tensor, dx: Tensor, dsigma: Tensor, c: Any) -> Any:
    return ORIGINAL_JVP(self, role, x, sigma, torch.zeros_like(dx), dsigma, c)


def _without_time(self: Adapter, role: RoleHandle, x: Tensor, sigma: Tensor, dx: Tensor, dsigma: Tensor, c: Any) -> Any:
    return ORIGINAL_JVP(self, role, x, sigma, dx, torch.zeros_like(dsigma), c)


def _without_jvp(self: Adapter, role: RoleHandle, x: Tensor, sigma: Tensor, *rest: Any) -> Any:
    v, dv = ORIGINAL_JVP(self, role, x, sigma, *rest)
    return v, torch.zeros_like(dv)


def _wrong_sign(*arguments: Any) -> Tensor:
    return -ORIGINAL_TANGENT(*arguments)


def _wrong_sign_of_jvp(form: Any, x: Tensor, v: Tensor, v_teacher: Tensor, dv: Tensor, *rest: Any) -> Tensor:
    return ORIGINAL_TANGENT(form, x, v, v_teacher, -dv, *rest)


def _one_sided(x: Tensor, v: Tensor, sigma: Tensor, end: Tensor) -> Tensor:
    return ORIGINAL_EULER(x, v, sigma, torch.maximum(sigma, end))


def _one_norm_a_batch(g: Tensor, floor: float) -> Tensor:
    return g / (g.norm() + floor)


MUTANTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]] = {
    "JVP without x": (
        lambda: patch.object(Adapter, "predict_velocity_jvp", _without_x), "check_tangent_vanishes_at_the_map"
    ),
    "JVP without time": (
        lambda: patch.object(Adapter, "predict_velocity_jvp", _without_time), "check_tangent_vanishes_at_the_map"
    ),
    "no JVP": (
        lambda: patch.object(Adapter, "predict_velocity_jvp", _without_jvp), "check_tangent_vanishes_at_the_map"
    ),
    "wrong sign of the JVP": (
        lambda: patch.object(losses, "consistency_tangent", _wrong_sign_of_jvp), "check_tangent_vanishes_at_the_map"
    ),
    "guidance dropped": (
        lambda: patch.object(ScmConfig, "teacher_guidance", property(lambda self: Guidance())),
        "check_tangent_vanishes_at_the_map",
    ),
    "wrong sign of the tangent, by its derivative": (
        lambda: patch.object(losses, "consistency_tangent", _wrong_sign), "check_tangent_is_the_derivative_of_x0"
    ),
    "wrong sign of the tangent, by descent": (
        lambda: patch.object(losses, "consistency_tangent", _wrong_sign), "check_descent_flattens_the_map"
    ),
    "slope without x on one side": (
        lambda: patch.object(schedule, "euler_step", _one_sided), "check_slope_is_the_derivative_at_small_steps"
    ),
    "missing normalisation": (
        lambda: patch.object(losses, "normalise_tangent", lambda g, floor: g), "check_loss_against_transcription"
    ),
    "one norm a batch": (
        lambda: patch.object(losses, "normalise_tangent", _one_norm_a_batch), "check_loss_against_transcription"
    ),
    "gradient through F⁻": (
        lambda: patch.object(losses, "tangent_loss", lambda output, g: g.square().sum(1) + 0 * output.sum(1)),
        "check_loss_against_transcription",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path) -> None:
    plant, check = MUTANTS[name]
    assert is_caught(lambda: CHECKS[check](tmp_path), plant())


def test_the_trigonometric_output_is_the_same_model() -> None:
    """x0 = cos t · x_t − sin t · F and x_t = cos t · x0 + sin t · ε, at all σ, both ends included."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 4, dtype=FP64, generator=generator)
    sigma_B = torch.tensor([0.0, 0.1, 0.5, 0.93, 1.0], dtype=FP64)
    x, v = schedule.add_noise(x0, noise, sigma_B), noise - x0
    cos, sin, n = schedule.trigonometric(sigma_B, x)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))
    torch.testing.assert_close(n * (cos + sin), torch.ones_like(cos))
    torch.testing.assert_close(x / n, cos * x0 + sin * noise)
    torch.testing.assert_close(cos * x / n - sin * schedule.trigonometric_velocity(x, v, sigma_B), x0)


# --- T1: training ---

TRAINING = (
    "--roles.student.flavor", "smooth",
    "--training.steps", "600",
    "--training.global_batch_size", "16",
    "--training.local_batch_size", "16",
    "--metrics.log_interval", "500",
    "--optimizer.lr", "6e-2",
    "--lr_scheduler.decay", "cosine",
)  # fmt: skip


def map_error(trainer: Trainer) -> float:
    """Mean distance to the consistency map over four levels, where the data's law is."""
    generator = torch.Generator().manual_seed(2)
    noise, clean = torch.randn(2, 512, 16, generator=generator)
    condition = trainer.adapter.encode_prompts(["a sample"] * 512)
    errors = []
    for sigma in (1.0, 0.75, 0.5, 0.25):
        x = (1 - sigma) * (1.0 + STD * clean) + sigma * noise
        sigma_B = torch.full((512,), sigma, dtype=FP64)
        with torch.no_grad():
            x0 = trainer.adapter.predict_x0(trainer.roles["student"], x, sigma_B, condition)
        errors.append((x0 - consistency_map(x.double(), torch.tensor(sigma, dtype=FP64))).abs().mean().item())
    return sum(errors) / len(errors)


OUTCOME_MUTANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "no JVP": lambda: patch.object(Adapter, "predict_velocity_jvp", _without_jvp),
    "wrong sign": lambda: patch.object(losses, "consistency_tangent", _wrong_sign),
}


NIGHTLY = [pytest.param(name, marks=() if name == "none" else pytest.mark.nightly) for name in OUTCOME_MUTANTS]


@pytest.mark.parametrize("name", NIGHTLY)
def test_training_reaches_the_map_and_mutants_do_not(name: str, tmp_path: Path) -> None:
    with OUTCOME_MUTANTS[name]():
        trainer = toy_trainer(tmp_path, "scm", *TRAINING, "--method_config.tangent_warmup", "50")
        trainer.run()
        error = map_error(trainer)
    assert (error < 0.05) == (name == "none"), error


# --- rCM ---


def test_rcm_is_the_weighted_sum_after_the_warmup(tmp_path: Path) -> None:
    """And before it the consistency term alone, with the ramp of its step."""
    trainer = toy_trainer(tmp_path, "rcm")
    method, batch = trainer.method, trainer.adapter.prepare_batch(next(trainer.loader))
    assert isinstance(method, Rcm)
    ramps: list[float] = []
    with patch.object(losses, "consistency_tangent", lambda *a: (ramps.append(a[-1]), ORIGINAL_TANGENT(*a))[1]):
        during, after = method.student_loss(batch, 1), method.student_loss(batch, 6)
    assert ramps == [0.25, 1.0]
    torch.testing.assert_close(during.losses_B, 50 / 64 * method.tangent_loss(batch, 1).losses_B)
    matching = Dmd2.student_loss(method, batch, 6)
    torch.testing.assert_close(
        after.losses_B, 50 / 64 * method.tangent_loss(batch, 6).losses_B + matching.losses_B
    )  # fmt: skip
    assert after.metrics_B.keys() == {"scm/tangent_size", "dmd/gradient_size"}
    after.losses_B.sum().backward()
    assert all(p.grad is None for name in ("teacher", "critic") for p in trainer.roles[name].transformer.parameters())


def check_rcm_total_gradient(folder: Path) -> None:
    """By default the gradient in F and in the student's sample is that of the paper's total, 100 ‖F − sg(F + g)‖² +
    ‖x − sg(x − d)‖² with sums over elements: twice their number times ours."""
    trainer = exact_trainer(folder, 0.3, "rcm")
    for name in ("student", "critic"):
        trainer.roles[name].transformer.double()
    method, batch = trainer.method, trainer.adapter.prepare_batch(next(trainer.loader))
    batch = replace(batch, latents=batch.latents.double())  # type: ignore[union-attr]
    captured: dict[str, Tensor] = {}
    real_tangent, real_dmd, real_normal = losses.tangent_loss, losses.dmd_loss, method.normal

    def tangent_loss(output: Tensor, g: Tensor) -> Tensor:
        output.retain_grad()
        captured.update(output=output, g=g)
        return real_tangent(output, g)

    def dmd_loss(x: Tensor, g: Tensor, mask: Tensor | None = None) -> Tensor:
        x.retain_grad()
        captured.update(x=x, d=g)
        return real_dmd(x, g, mask)

    with (
        patch.object(losses, "tangent_loss", tangent_loss),
        patch.object(losses, "dmd_loss", dmd_loss),
        patch.object(method, "normal", lambda *args: real_normal(*args).double()),
    ):
        method.student_loss(batch, 6).losses_B.sum().backward()  # type: ignore[attr-defined]
    output, x = (captured[name].detach().double().requires_grad_() for name in ("output", "x"))
    theirs = 100 * (output - (output + captured["g"]).detach()).square().sum()
    theirs = theirs + (x - (x - captured["d"]).detach()).square().sum()
    for found, expected in zip((captured["output"], captured["x"]), torch.autograd.grad(theirs, (output, x))):
        assert found.grad is not None and expected.abs().mean() > 1e-4
        torch.testing.assert_close(2 * 64 * found.grad.double(), expected, rtol=1e-12, atol=1e-12)


def check_rcm_rollout_times(folder: Path) -> None:
    """With random times each forward after the first is at min(shifted uniform, level before), drawn per sample, and
    its input is the prediction before it, noised to that level."""
    options = ("--method_config.rollout_times", "random", "--pipeline_config.flow_shift", "5")
    trainer = toy_trainer(folder, "rcm", *options, "--method_config.last_step_only", "true")
    method, batch = trainer.method, trainer.adapter.prepare_batch(next(trainer.loader))
    assert isinstance(method, Rcm)
    calls: list[tuple[Tensor, Tensor]] = []
    real = trainer.adapter.predict_velocity

    def predict(role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Any) -> Tensor:
        calls.append((x.detach(), sigma_B))
        return real(role, x, sigma_B, condition)

    with patch.object(trainer.adapter, "predict_velocity", predict):
        method.rollout(batch, trainer.adapter.text_condition(batch), 6, "test")
    expected = [torch.ones(8, dtype=FP64)]
    for index in (1, 2, 3):
        u = method.noise.uniform(f"test/time/{index}", 6, batch.sample_ids)
        expected.append(torch.minimum(5 * u / (1 + 4 * u), expected[-1]))
    torch.testing.assert_close(torch.stack([sigma for _, sigma in calls]), torch.stack(expected))
    assert torch.stack(expected).std(1)[1:].min() > 0.01
    student = trainer.roles["student"].transformer
    for index, ((x, sigma), (following, level)) in enumerate(pairwise(calls), start=1):
        with torch.no_grad():
            v = student(x, sigma.float()[:, None], torch.ones(8, 1))
        x0 = x.double() - sigma[:, None] * v.double()
        noise = method.normal(f"test/noise/{index}", batch, 6).double()
        literal = (1 - level[:, None]) * x0 + level[:, None] * noise
        torch.testing.assert_close(following.double(), literal, rtol=1e-5, atol=1e-5)


RCM_CHECKS = {check.__name__: check for check in (check_rcm_total_gradient, check_rcm_rollout_times)}


@pytest.mark.parametrize("name", RCM_CHECKS)
def test_rcm_check(name: str, tmp_path: Path) -> None:
    RCM_CHECKS[name](tmp_path)


def _levels_not_limited(self: Rcm, batch: Any, step: int, purpose: str, exit_index: int) -> list[Tensor]:
    draws = [self.noise.uniform(f"{purpose}/time/{i}", step, batch.sample_ids) for i in range(1, exit_index + 1)]
    return [torch.ones(8, dtype=FP64), *(schedule.shift_sigma(u, 5.0) for u in draws)]


def _summed_without_half(x: Tensor, g: Tensor, mask: Tensor | None = None) -> Tensor:
    return 2 * ORIGINAL_DMD_LOSS(x, g, mask)


ORIGINAL_DMD_LOSS = losses.dmd_loss
RCM_MUTANTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]] = {
    "times that may rise": (
        lambda: patch.object(Rcm, "rollout_levels", _levels_not_limited), "check_rcm_rollout_times"
    ),
    "matching twice as strong": (
        lambda: patch.object(losses, "dmd_loss", _summed_without_half), "check_rcm_total_gradient"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RCM_MUTANTS)
def test_rcm_mutant_is_caught(name: str, tmp_path: Path) -> None:
    plant, check = RCM_MUTANTS[name]
    assert is_caught(lambda: RCM_CHECKS[check](tmp_path), plant())


@pytest.mark.parametrize(
    "option",
    ["--method_config.ts_schedule=true", "--method_config.ts_schedule_max=true", "--method_config.rollout=data"],
)
def test_random_rollout_times_have_no_exit_step_to_follow(option: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which rollout_times = 'random' replaces; change one of the two"):
        toy_trainer(tmp_path, "rcm", "--method_config.rollout_times", "random", option)


def test_rcm_cadence(tmp_path: Path) -> None:
    """Four steps of warm-up with the student alone, then student and critic in turn."""
    trainer = toy_trainer(tmp_path, "rcm")
    due = [[update.role for update in trainer.method.updates(step)] for step in range(8)]
    assert due == [["student"]] * 4 + [["student"], ["critic"]] * 2
    trainer.run()
    assert (trainer.roles["student"].num_updates, trainer.roles["critic"].num_updates) == (6, 2)


# --- refusals and plans ---


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("--compile.enabled", "true"),
            r"forward mode .*, which does not go with compile\.enabled = true; set it to false",
        ),
        (("--roles.student.attention", "sparse"), r"roles\.student\.attention = 'sparse'; set it to 'dense'"),
        (("--float8.enabled", "true"), r"with float8\.enabled = true; set it to false, or float8\.roles to others"),
        (
            ("--method_config.derivative_step", "0.02", "--training.dtype", "bfloat16"),
            r"differences of velocities .* = 0\.02\), which does not go with training\.dtype = 'bfloat16'; set it to",
        ),
        (
            ("--method_config.derivative_step", "0.5"),
            r"derivative_step = 0\.5 is out of range; .* below 0\.5",
        ),
        (("--method_config.tangent_floor", "0"), "tangent_floor = 0.0 is out of range; choose above 0"),
    ],
)
@pytest.mark.parametrize("method", ["scm", "rcm"])
def test_refusals(method: str, overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        toy_trainer(tmp_path, method, *overrides)


def test_a_warmup_that_never_ends_trains_the_student_alone(tmp_path: Path) -> None:
    """A shortened run: the start says so (`test_unreached.py`)."""
    trainer = toy_trainer(tmp_path, "rcm", "--method_config.tangent_warmup", "8")
    critic = [p.detach().clone() for p in trainer.roles["critic"].parameters()]
    trainer.run()
    assert (trainer.roles["student"].num_updates, trainer.roles["critic"].num_updates) == (8, 0)
    assert all(map(torch.equal, trainer.roles["critic"].parameters(), critic))
