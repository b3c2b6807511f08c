"""Flow-matching finetuning: regress a velocity at a random noise level.

The velocity is that of the data, `ε - x0`: the teacher of a distillation is made with this, and so is a student that
should first see new footage. Or it is a frozen teacher's (`target = "teacher"`): a student whose network changes,
from dense to sparse attention above all, then learns to be the model it was, instead of a new one. The teacher's
velocity is the mean of `ε - x0` over all data that could have led to the noisy input, so it is the same target with
far less noise.

Classifier-free guidance needs a model that also knows the negative prompt: with probability `cfg_dropout` a sample's
text is replaced by it. Timestep, noise and dropout are keyed draws, so the loss curve does not depend on the layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from titan_distill.config.parsing import check_range
from titan_distill.config.resume import logged
from titan_distill.data.loader import Batch
from titan_distill.diffusion import schedule
from titan_distill.diffusion.requests import MAX_GUIDANCE, MAX_STEPS, SampleRequest, ValidationRequest
from titan_distill.diffusion.transfer import to_device
from titan_distill.methods import losses
from titan_distill.methods.base import LossResult, Passes, TrainingMethod, Update
from titan_distill.models.base import Condition
from titan_distill.registry import register_method

NUM_LEVELS = 8
"""Noise levels of the held-out loss."""


@dataclass(frozen=True)
class FinetuneConfig:
    """[method_config] of `recipe.method = "finetune"`."""

    target: Literal["data", "teacher"] = logged("data")
    """Velocity to regress: that of the data, or that of the frozen role `teacher` for the same input and text."""
    cfg_dropout: float = logged(0.1)
    """Probability of training a sample on the negative prompt instead of its caption."""
    timestep_distribution: Literal["uniform", "logit_normal"] = logged("uniform")
    """Distribution of the noise level before the shift of pipeline_config.flow_shift."""
    logit_mean: float = logged(0.0)
    """Mean of the logit-normal distribution."""
    logit_std: float = logged(1.0)
    """Standard deviation of the logit-normal distribution."""
    weighting: Literal["none", "bell"] = logged("none")
    """`bell` weighs middle noise levels more, mean 1 over the grid (Self-Forcing's code)."""
    validation_steps: int = logged(48)
    """Sampling steps of the validation samples."""
    validation_guidance: float = logged(5.0)
    """Guidance scale of the validation samples, standard form."""
    validation_solver: Literal["euler", "unipc"] = logged("unipc")
    """ODE solver of the validation samples."""

    def __post_init__(self) -> None:
        check_range(self, "cfg_dropout", least=0, below=1)
        check_range(self, "logit_std", above=0, most=20)
        check_range(self, "validation_steps", least=1, most=MAX_STEPS)
        check_range(self, "validation_guidance", least=-MAX_GUIDANCE, most=MAX_GUIDANCE)
        check_range(self, "logit_mean", least=-20, most=20)


@register_method("finetune")
class Finetune(TrainingMethod):
    """Role `student`, one update per step; with target = "teacher" also the frozen role `teacher`."""

    config_class: ClassVar[type] = FinetuneConfig
    roles_required: ClassVar[dict[str, bool]] = {"student": True}
    num_held_out_draws = 1  # at NUM_LEVELS noise levels
    uses_loss_mask = True

    @classmethod
    def required_roles(cls, config: FinetuneConfig) -> dict[str, bool]:
        return cls.roles_required | ({"teacher": False} if config.target == "teacher" else {})

    @classmethod
    def passes(cls, config: FinetuneConfig) -> list[Passes]:
        student = Passes("student", "student", "student", 1, 1.0, backward=True)
        return [student, Passes("student", "teacher", "teacher", 1, 1.0)] if config.target == "teacher" else [student]

    def updates(self, step: int) -> list[Update]:
        return [Update("student", self.student_loss)]

    def held_out_updates(self, step: int) -> list[Update]:
        return [Update("student", self.held_out_loss)]

    @classmethod
    def num_updates(cls, config: Any, num_steps: int) -> dict[str, int]:
        return {"student": num_steps}

    def student_loss(self, batch: Batch, step: int) -> LossResult:
        """Velocity regression on noised real latents, per sample."""
        u_B = self.noise.uniform("finetune/timestep", step, batch.sample_ids)
        return LossResult(self._loss(batch, step, self._sigma(u_B)))

    def held_out_loss(self, batch: Batch, step: int) -> LossResult:
        """Returns the loss at NUM_LEVELS noise levels, each as a metric under its timestep, and their mean.

        The levels are the midpoints of equal parts of the timestep distribution, so their mean is an estimate of the
        training loss. Noise and caption dropout of a sample are the same at all levels.
        """
        levels: dict[str, Tensor] = {}
        for number in range(NUM_LEVELS):
            u_B = torch.full((len(batch.sample_ids),), (number + 0.5) / NUM_LEVELS, dtype=torch.float64)
            sigma_B = self._sigma(u_B)
            timestep = float(sigma_B[0]) * schedule.NUM_TRAIN_TIMESTEPS
            levels[f"loss/student/timestep_{timestep:.1f}"] = self._loss(batch, step, sigma_B)
        return LossResult(torch.stack([*levels.values()]).mean(0), levels)

    def _sigma(self, u_B: Tensor) -> Tensor:
        """Returns the noise levels at these quantiles of the timestep distribution."""
        config = self.config
        return schedule.training_sigma(
            u_B,
            distribution=config.timestep_distribution,
            shift=self.adapter.flow_shift,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
        )

    def _loss(self, batch: Batch, step: int, sigma_B: Tensor) -> Tensor:
        """Returns the losses [B] at given noise levels."""
        assert batch.latents is not None
        config, x0 = self.config, batch.latents
        noise = self.normal("finetune/noise", batch, step)
        x = self.adapter.add_noise(x0, noise, sigma_B)
        condition = self._condition(batch, step)
        velocity = self.adapter.predict_velocity(self.roles["student"], x, sigma_B, condition)
        weight_B = schedule.bell_weight(sigma_B, self.adapter.flow_shift) if config.weighting == "bell" else None
        mask = self.adapter.loss_mask(condition)
        if config.target == "data":
            target = schedule.velocity(x0.double(), noise.double())
        else:
            with torch.no_grad(), self.timer("teacher"):
                target = self.adapter.predict_velocity(self.roles["teacher"], x, sigma_B, condition)
        return losses.regression_loss(velocity, target, weight_B, mask)

    def _condition(self, batch: Batch, step: int) -> Condition:
        condition = self.adapter.text_condition(batch)
        dropped_B = self.noise.uniform("finetune/cfg_dropout", step, batch.sample_ids) < self.config.cfg_dropout
        if not dropped_B.any():
            return condition
        negative = self.adapter.negative_condition(len(batch.sample_ids))
        return {**condition, **{name: _where(dropped_B, value, condition[name]) for name, value in negative.items()}}

    def validation_request(self) -> ValidationRequest:
        config = self.config
        now = SampleRequest(
            "student", "student", config.validation_solver, config.validation_steps, None, config.validation_guidance
        )
        return ValidationRequest((now,))


def _where(mask_B: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    mask = to_device(mask_B, other.device).view(-1, *[1] * (other.ndim - 1))
    return torch.where(mask, chosen, other)
