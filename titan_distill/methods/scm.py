"""Continuous-time consistency distillation, sCM: the grid of `consistency` with steps of length zero.

Between two points of a trajectory that lie infinitely close, the difference of the student's predictions becomes a
derivative, the *tangent*: how the predicted end changes along the teacher's trajectory. It should not change at all.
There is no grid to choose and no error of a finite step; the price is a derivative of the network with respect to its
input and its time at once, which forward-mode differentiation gives in one pass (`Adapter.predict_velocity_jvp`).

Tangents differ by orders of magnitude between samples and noise levels, so each is divided by its own norm, and the
part of them that comes from the student's own derivative is led in over `tangent_warmup` steps. The formulas are those
of `losses.consistency_tangent`, in the trigonometric time of the papers; the networks stay what they are, models of
rectified flow, and both times are functions of σ.

The tangent runs without gradient, beside the forward that has one: gathered weights and recomputed activations need
not know of it. Time enters a network through features as fast as cos(1000 σ), whose derivative is large and multiplies
every error of the weights; expect a continuous-time student to want lower learning rates than a discrete one.

Sources: sCM (2410.11081), algorithm 1; rCM (2510.08431) for video.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from titan_distill.config_world import role_parallelism
from titan_distill.data.loader import Batch
from titan_distill.diffusion import schedule
from titan_distill.dispatch import register_method
from titan_distill.methods import losses
from titan_distill.methods.base import LossResult, Passes, TrainingMethod, Update, ValidationRequest
from titan_distill.methods.consistency import FewStepConfig, few_step_validation
from titan_distill.models.base import Guidance

if TYPE_CHECKING:
    from titan_distill.config import Config


@dataclass(frozen=True)
class TangentConfig:
    """Where tangents are taken and how they are tamed."""

    timestep_distribution: Literal["uniform", "logit_normal"] = "logit_normal"
    """Law of the noise level before the shift of pipeline_config.flow_shift. ``logit_normal`` is the papers' log-normal
    law of tan t = σ / (1 − σ)."""
    logit_mean: float = -0.8
    """Mean of the logit-normal law; the shift s adds log s to it."""
    logit_std: float = 1.6
    """Standard deviation of the logit-normal law."""
    tangent_warmup: int = 1000
    """Training steps over which the student's own derivative is led in."""
    tangent_floor: float = 0.1
    """What is added to a tangent's norm before it is divided by it."""

    def check_tangent(self) -> None:
        """Raises ValueError for values outside their range."""
        if self.logit_std <= 0:
            raise ValueError(f"logit_std = {self.logit_std} must be positive")
        if self.tangent_warmup < 0:
            raise ValueError(f"tangent_warmup = {self.tangent_warmup} must be at least 0")
        if self.tangent_floor <= 0:
            raise ValueError(f"tangent_floor = {self.tangent_floor} must be positive")


@dataclass(frozen=True)
class ScmConfig(TangentConfig, FewStepConfig):
    """[method_config] of ``recipe.method = "scm"``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_tangent()


class TangentTraining(TrainingMethod):
    """The continuous-time consistency loss, for the methods that train with it."""

    form: ClassVar[losses.TangentForm]
    uses_loss_mask = False  # a tangent's norm runs over all elements

    @classmethod
    def validate(cls, config: Config) -> None:
        super().validate(config)
        parallelism = role_parallelism(config, "student")
        for setting, is_set, remedy in (
            ("roles.student.attention = 'sparse'", config.roles["student"].attention == "sparse", "set it to 'dense'"),
            ("compile.enabled = true", config.compile.enabled, "set it to false"),
            ("float8", config.float8.for_role("student").enabled, "name other roles in float8.roles, or disable it"),
            (f"parallelism.sequence = {parallelism.sequence}", parallelism.sequence > 1, "set it to 1 for the student"),
            (f"parallelism.tensor = {parallelism.tensor}", parallelism.tensor > 1, "set it to 1 for the student"),
        ):
            if is_set:
                raise ValueError(
                    f"recipe.method = {config.recipe.method!r} differentiates the student in forward mode, which does "
                    f"not go with {setting}; {remedy}"
                )

    @classmethod
    def tangent_work(cls, guidance: Guidance, updates_per_step: float) -> list[Passes]:
        """The passes that make one tangent; the dual one does the work of two forwards."""
        num_conditions = 1 if guidance.is_identity else 2
        return [
            Passes("student", "teacher", "teacher", 1, updates_per_step, num_conditions=num_conditions),
            Passes("student", "student", "tangent", 1, updates_per_step, num_conditions=2),
        ]

    def tangent_loss(self, batch: Batch, step: int) -> LossResult:
        """‖F − F⁻ − g‖² a sample, with the size of g before it was normalised."""
        assert batch.latents is not None
        config, x0, ids = self.config, batch.latents, batch.sample_ids
        sigma_B = schedule.training_sigma(
            self.noise.uniform("scm/timestep", step, ids),
            distribution=config.timestep_distribution,
            shift=self.adapter.flow_shift,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
        ).to(x0.device)
        noise = self.noise.normal("scm/noise", step, ids, x0.shape[1:], device=x0.device)
        x = self.adapter.add_noise(x0, noise, sigma_B)
        g = self.tangent(batch, x, sigma_B, step)
        with self.timer("student"):
            condition = self.adapter.text_condition(batch)
            velocity = self.adapter.predict_velocity(self.roles["student"], x, sigma_B, condition)
        output = schedule.trigonometric_velocity(x, velocity, sigma_B)
        size_B = g.square().flatten(1).mean(1).sqrt()
        losses_B = losses.tangent_loss(output, losses.normalise_tangent(g, config.tangent_floor))
        return LossResult(losses_B, {"scm/tangent_size": size_B})

    @torch.no_grad()
    def tangent(self, batch: Batch, x: Tensor, sigma_B: Tensor, step: int) -> Tensor:
        """g at x_σ, not yet normalised; float64, shape of x."""
        condition = self.adapter.text_condition(batch)
        with self.timer("teacher"):
            v_teacher = self.adapter.guided_velocity(
                self.roles["teacher"], x, sigma_B, condition, self.config.teacher_guidance
            )
        with self.timer("tangent"):
            v, dv = self.adapter.predict_velocity_jvp(
                self.roles["student"], x, sigma_B, v_teacher, torch.ones_like(sigma_B), condition
            )
        warmup = self.config.tangent_warmup
        ramp = min(1.0, step / warmup) if warmup else 1.0
        return losses.consistency_tangent(self.form, x, v, v_teacher, dv, sigma_B, ramp)


@register_method("scm")
class Scm(TangentTraining):
    """Role ``student`` is trained, ``teacher`` is frozen; one update a step."""

    form = "scm"
    config_class: ClassVar[type] = ScmConfig
    roles_required: ClassVar[dict[str, bool]] = {"student": True, "teacher": False}

    @classmethod
    def work(cls, config: ScmConfig) -> list[Passes]:
        student = Passes("student", "student", "student", 1, 1.0, backward=True)
        return [*cls.tangent_work(config.teacher_guidance, 1.0), student]

    def updates(self, step: int) -> list[Update]:
        return [Update("student", self.tangent_loss)]

    def validation_request(self) -> ValidationRequest:
        return few_step_validation(self.config, self.adapter.flow_shift)
