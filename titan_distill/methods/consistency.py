"""Discrete consistency distillation: one step of the teacher between two neighbouring predictions of the student.

A consistency model f(x_σ, σ) names the end of the trajectory through x_σ at once. It is learnt from two facts: at σ = 0
the end is x itself, and two points of one trajectory have one end. So a real latent is noised to a level of a fixed
grid, the frozen teacher (with guidance) takes one Euler step to the next lower level, and the student's prediction from
the upper point is pulled towards the prediction from the lower one. Truth enters at σ = 0 and climbs the grid. There
f(x, 0) = x needs no teaching: the networks predict velocities, and x0 = x − σ v is x itself at σ = 0.

The lower prediction is a target, made without gradient by an average of the student's weights: one that moves with
every update is chased by an error that it causes itself. This average is the role's own EMA ([ema]), in place of the
trained weights for one forward. That costs two copies of the rank's shard per micro-batch, but neither a third network
nor a second kind of state: it is sharded, saved, resumed and validated already, and the same in every layout. It
forbids asynchronous checkpoints, whose copy might catch the average in the place of the weights.

Sources: consistency models (2303.01469), algorithm 2; latent consistency models (2310.04378) for guidance.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from titan_distill.config.config import Config
from titan_distill.config.parsing import check_range
from titan_distill.config.resume import logged
from titan_distill.data.loader import Batch
from titan_distill.diffusion import schedule
from titan_distill.methods import losses
from titan_distill.methods.base import LossResult, Passes, Update
from titan_distill.methods.few_step import FewStepTraining, GuidedFewStepConfig, guided_passes
from titan_distill.models.base import Condition
from titan_distill.registry import register_method


@dataclass(frozen=True)
class ConsistencyConfig(GuidedFewStepConfig):
    """[method_config] of `recipe.method = "consistency"`."""

    num_grid_steps: int = logged(48)
    """Steps of the grid from noise to data. More steps make the teacher's step more exact, but it takes the student
    longer to learn the high noise levels."""
    target: Literal["ema", "student"] = logged("ema")
    """Weights whose prediction at the lower level is the target: the average of [ema], or the student's own, without
    gradient (iCT, 2310.14189)."""
    loss: losses.ConsistencyLoss = logged("pseudo_huber")
    """Distance of the two predictions: `l2`, or `pseudo_huber`, which limits the influence of outliers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "num_grid_steps", least=1, most=10_000)


@register_method("consistency")
class Consistency(FewStepTraining):
    """Role `student` is trained, `teacher` is frozen; one update per step."""

    config_class: ClassVar[type] = ConsistencyConfig
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
    def passes(cls, config: ConsistencyConfig) -> list[Passes]:
        return [
            guided_passes("student", "teacher", config.teacher_guidance, 1.0),
            Passes("student", "student", "target", 1, 1.0),
            Passes("student", "student", "student", 1, 1.0, backward=True),
        ]

    def updates(self, step: int) -> list[Update]:
        return [Update("student", self.student_loss)]

    @classmethod
    def num_updates(cls, config: Any, num_steps: int) -> dict[str, int]:
        return {"student": num_steps}

    def student_loss(self, batch: Batch, step: int) -> LossResult:
        """Pulls the prediction at one grid level towards that at the next lower one, per sample."""
        assert batch.latents is not None
        config, x0 = self.config, batch.latents
        u_B = self.noise.uniform("consistency/timestep", step, batch.sample_ids)
        sigma_B, lower_B = schedule.neighbouring_sigmas(u_B, config.num_grid_steps, self.adapter.flow_shift)
        x = self.adapter.add_noise(x0, self.normal("consistency/noise", batch, step), sigma_B)
        condition = self.adapter.text_condition(batch)
        # First the target: the trained weights must be back before a graph is built on them.
        lower = schedule.euler_step(x, self.teacher_velocity(x, sigma_B, condition), sigma_B, lower_B)
        target = self._target(lower, lower_B, condition)
        with self.timer("student"):
            predicted = self.adapter.predict_x0(self.roles["student"], x, sigma_B, condition)
        mask = self.adapter.loss_mask(condition)
        return LossResult(losses.consistency_loss(config.loss, predicted, target, mask))

    @torch.no_grad()
    def _target(self, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        student = self.roles["student"]
        with self.timer("target"), student.evaluation() if self.config.target == "ema" else nullcontext():
            return self.adapter.predict_x0(student, x, sigma_B, condition)
