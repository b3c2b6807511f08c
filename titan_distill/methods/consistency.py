"""Discrete consistency distillation: one step of the teacher between two neighbouring predictions of the student.

A consistency model f(x_σ, σ) names the end of the trajectory through x_σ at once. It is learnt from two facts: at σ = 0
the end is x itself, and two points of one trajectory have one end. So a real latent is noised to a level of a fixed
grid, the frozen teacher (with guidance) takes one Euler step to the next lower level, and the student's prediction from
the upper point is pulled towards the prediction from the lower one. Truth enters at σ = 0 and climbs the grid. There
f(x, 0) = x needs no teaching: the networks predict velocities, and x0 = x − σ v is x itself at σ = 0.

The lower prediction is a target, made without gradient by an average of the student's weights: one that moves with
every update is chased by an error that it causes itself. This average is the role's own EMA ([ema]), in place of the
trained weights for one forward. That costs two copies of the rank's shard a micro-batch, but neither a third network
nor a second kind of state: it is sharded, saved, resumed and validated already, and the same in every layout. What it
forbids is a checkpoint that is copied beside training, and so might catch the average in the place of the weights.

Sources: consistency models (2303.01469), algorithm 2; latent consistency models (2310.04378) for guidance.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from titan_distill.data.loader import Batch
from titan_distill.diffusion import schedule
from titan_distill.diffusion.requests import SampleRequest, ValidationRequest
from titan_distill.methods import losses
from titan_distill.methods.base import LossResult, Passes, TrainingMethod, Update
from titan_distill.models.base import Condition, Guidance
from titan_distill.registry import register_method

if TYPE_CHECKING:
    from titan_distill.config.config import Config


@dataclass(frozen=True)
class FewStepConfig:
    """What all consistency methods share: the guided teacher, and how the student will sample."""

    denoising_steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    """The student's few-step schedule in validation, as timesteps; training does not depend on it."""
    warp: bool = True
    """Whether denoising_steps name entries of the shifted schedule (1000, 750, … at shift 5 is 1000, 937.5, …) or are
    final."""
    guidance_scale: float = 4.0
    """Teacher's classifier-free guidance, which the student learns and then does without."""
    guidance_form: Literal["standard", "offset"] = "standard"
    """``standard``: u + w (c - u). ``offset``: c + w (c - u)."""
    teacher_steps: int = 48
    """Sampling steps of the teacher's validation samples."""
    teacher_solver: Literal["euler", "unipc"] = "unipc"
    """ODE solver of the teacher's validation samples."""

    def __post_init__(self) -> None:
        schedule.few_step_sigmas(self.denoising_steps, 1.0, self.warp)

    @property
    def teacher_guidance(self) -> Guidance:
        return Guidance(self.guidance_scale, self.guidance_form)


def few_step_validation(config: FewStepConfig, flow_shift: float) -> ValidationRequest:
    """Teacher with many steps (the reference) and with as few as the student, the student before and now."""
    sigmas = tuple(schedule.few_step_sigmas(config.denoising_steps, flow_shift, config.warp).tolist())
    scale = config.guidance_scale + (1.0 if config.guidance_form == "offset" else 0.0)
    student = SampleRequest("student", "student", "sde", len(sigmas), sigmas)
    teacher = SampleRequest(
        "teacher", "teacher", config.teacher_solver, config.teacher_steps, guidance_scale=scale, baseline=True
    )
    return ValidationRequest(
        samples=(
            teacher,
            replace(teacher, label="teacher_few_steps", num_steps=len(sigmas), scored=False),
            replace(student, label="student_before", baseline=True, scored=False),
            student,
        ),
        reference="teacher",
    )


@dataclass(frozen=True)
class ConsistencyConfig(FewStepConfig):
    """[method_config] of ``recipe.method = "consistency"``."""

    num_grid_steps: int = 48
    """Steps of the grid from noise to data: more leave less error of the teacher's step, and a longer way for truth to
    climb."""
    target: Literal["ema", "student"] = "ema"
    """Whose prediction at the lower level is the target: the average of [ema], or the student's own, without gradient
    (iCT, 2310.14189)."""
    loss: losses.ConsistencyLoss = "pseudo_huber"
    """Distance of the two predictions: ``l2``, or ``pseudo_huber``, which a bad step cannot dominate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_grid_steps < 1:
            raise ValueError(f"num_grid_steps = {self.num_grid_steps} must be at least 1")


@register_method("consistency")
class Consistency(TrainingMethod):
    """Role ``student`` is trained, ``teacher`` is frozen; one update a step."""

    config_class: ClassVar[type] = ConsistencyConfig
    roles_required: ClassVar[dict[str, bool]] = {"student": True, "teacher": False}
    uses_loss_mask = True

    @classmethod
    def validate(cls, config: Config) -> None:
        super().validate(config)
        if config.method_config.target != "ema":
            return
        if not config.ema.decay or config.ema.role != "student":
            raise ValueError(
                "method_config.target = 'ema' needs the student's average, but ema.decay = "
                f"{config.ema.decay} with ema.role = {config.ema.role!r}; set ema.decay (0.95, say) for the student, "
                "or target to 'student'"
            )
        if config.checkpoint.mode == "async":
            raise ValueError(
                "method_config.target = 'ema' puts averaged weights in the place of the trained ones during a step, "
                "where checkpoint.mode = 'async' might copy them; set checkpoint.mode to 'sync'"
            )

    @classmethod
    def work(cls, config: ConsistencyConfig) -> list[Passes]:
        num_conditions = 1 if config.teacher_guidance.is_identity else 2
        return [
            Passes("student", "teacher", "teacher", 1, 1.0, num_conditions=num_conditions),
            Passes("student", "student", "target", 1, 1.0),
            Passes("student", "student", "student", 1, 1.0, backward=True),
        ]

    def updates(self, step: int) -> list[Update]:
        return [Update("student", self.student_loss)]

    def student_loss(self, batch: Batch, step: int) -> LossResult:
        """Pulls the prediction at one grid level towards that at the next lower one, per sample."""
        assert batch.latents is not None
        config, x0, ids = self.config, batch.latents, batch.sample_ids
        u_B = self.noise.uniform("consistency/timestep", step, ids)
        sigma_B, lower_B = schedule.neighbouring_sigmas(u_B, config.num_grid_steps, self.adapter.flow_shift)
        noise = self.noise.normal("consistency/noise", step, ids, x0.shape[1:], device=x0.device)
        x = self.adapter.add_noise(x0, noise, sigma_B)
        condition = self.adapter.text_condition(batch)
        # First the target: the trained weights must be back before a graph is built on them.
        target = self._target(self._teacher_step(x, sigma_B, lower_B, condition), lower_B, condition)
        with self.timer("student"):
            predicted = self.adapter.predict_x0(self.roles["student"], x, sigma_B, condition)
        mask = self.adapter.loss_mask(condition)
        return LossResult(losses.consistency_loss(config.loss, predicted, target, mask))

    @torch.no_grad()
    def _teacher_step(self, x: Tensor, sigma_B: Tensor, lower_B: Tensor, condition: Condition) -> Tensor:
        with self.timer("teacher"):
            velocity = self.adapter.guided_velocity(
                self.roles["teacher"], x, sigma_B, condition, self.config.teacher_guidance
            )
        return schedule.euler_step(x, velocity, sigma_B, lower_B)

    @torch.no_grad()
    def _target(self, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        student = self.roles["student"]
        with self.timer("target"), student.evaluation() if self.config.target == "ema" else nullcontext():
            return self.adapter.predict_x0(student, x, sigma_B, condition)

    def validation_request(self) -> ValidationRequest:
        return few_step_validation(self.config, self.adapter.flow_shift)
