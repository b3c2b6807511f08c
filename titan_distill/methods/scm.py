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
not know of it. Time enters a network through features as fast as cos(1000 σ). Where training never made a network
smooth in them, the exact derivative is that of its ripples and not of its trend, and nothing can be learnt from it.
`derivative_step` then takes the slope over a finite step instead: another pass, no forward mode, and a little of the
error of a finite step.

Sources: sCM (2410.11081), algorithm 1; rCM (2510.08431).
"""

from __future__ import annotations

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
class TangentConfig(GuidedFewStepConfig):
    """Noise levels of tangents, and their normalisation."""

    timestep_distribution: Literal["uniform", "logit_normal"] = logged("logit_normal")
    """Distribution of the noise level before the shift of pipeline_config.flow_shift. With `logit_normal`, σ / (1 − σ)
    is log-normal, as in the papers."""
    logit_mean: float = logged(-0.8)
    """Mean of the logit-normal distribution, to which the shift s adds log s: rCM's means less log s. Default: rCM's at
    s = 1."""
    logit_std: float = logged(1.6)
    """Standard deviation of the logit-normal distribution. Default: that of rCM's code."""
    tangent_warmup: int = 1000
    """Training steps over which the weight of the student's own derivative grows from 0 to 1."""
    tangent_floor: float = logged(0.1)
    """Constant added to a tangent's norm before the tangent is divided by it."""
    derivative_step: float = logged(0.0)
    """0: the student's derivative is exact, by forward-mode differentiation. Above 0: it is the slope over σ ±
    derivative_step on the teacher's tangent line, for students that are not smooth in time; needs float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "logit_std", "tangent_floor", above=0)
        check_range(self, "tangent_warmup", least=0)
        check_range(self, "derivative_step", least=0, below=0.5)
        if 0 < self.derivative_step < 1e-4:
            raise ValueError(
                f"derivative_step = {self.derivative_step} is lost in the rounding of float32; choose 0 for the exact "
                "derivative, or at least 0.0001"
            )
        check_range(self, "logit_std", most=20)
        check_range(self, "logit_mean", least=-20, most=20)


@dataclass(frozen=True)
class ScmConfig(TangentConfig):
    """[method_config] of `recipe.method = "scm"`."""


class TangentTraining(FewStepTraining):
    """The continuous-time consistency loss, for the methods that train with it."""

    form: ClassVar[losses.TangentForm]
    uses_loss_mask = False  # a tangent's norm runs over all elements

    @classmethod
    def validate(cls, config: Config) -> None:
        super().validate(config)
        exact = not config.method_config.derivative_step
        what = "differentiates the student in forward mode" if exact else "takes differences of velocities"
        for setting, is_set, remedy in (
            ("roles.student.attention = 'sparse'", exact and config.roles["student"].attention == "sparse", "'dense'"),
            ("compile.enabled = true", exact and config.compile.enabled, "false"),
            ("training.dtype = 'bfloat16'", not exact and config.training.dtype == "bfloat16", "'float32'"),
            ("float8.enabled = true", config.float8.for_role("student").enabled, "false, or float8.roles to others"),
        ):
            if is_set:
                raise ValueError(
                    f"recipe.method = {config.recipe.method!r} {what} (method_config.derivative_step = "
                    f"{config.method_config.derivative_step}), which does not go with {setting}; set it to {remedy}"
                )

    @classmethod
    def unreached(cls, config: Config) -> list[str]:
        warmup, num_steps = config.method_config.tangent_warmup, config.training.steps
        if warmup < num_steps:
            return []
        return [
            f"method_config.tangent_warmup = {warmup} leaves none of the {num_steps} steps: the student's own "
            f"derivative never counts in full, but with a weight of at most {(num_steps - 1) / warmup:.2g}"
        ]

    @classmethod
    def tangent_passes(cls, config: TangentConfig, updates_per_step: float) -> list[Passes]:
        """Returns the passes that compute one tangent. The forward-mode pass counts as two."""
        num_forwards, num_conditions = (3, 1) if config.derivative_step else (1, 2)
        return [
            guided_passes("student", "teacher", config.teacher_guidance, updates_per_step),
            Passes(
                "student",
                "student",
                "tangent",
                num_forwards,
                updates_per_step,
                num_conditions=num_conditions,
                forward_mode=not config.derivative_step,
            ),
        ]

    def tangent_loss(self, batch: Batch, step: int) -> LossResult:
        """Returns ‖F − F⁻ − g‖² of each sample, where F⁻ is F without gradient, and as a metric the norm of g before
        normalisation."""
        assert batch.latents is not None
        config = self.config
        sigma_B = schedule.training_sigma(
            self.noise.uniform("scm/timestep", step, batch.sample_ids),
            distribution=config.timestep_distribution,
            shift=self.adapter.flow_shift,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
        )
        x = self.adapter.add_noise(batch.latents, self.normal("scm/noise", batch, step), sigma_B)
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
        """Returns the tangent g at x_σ before normalisation: float64, shape of x."""
        condition = self.adapter.text_condition(batch)
        v_teacher = self.teacher_velocity(x, sigma_B, condition)
        with self.timer("tangent"):
            v, dv = self._velocity_and_slope(x, sigma_B, v_teacher, condition)
        warmup = self.config.tangent_warmup
        ramp = min(1.0, step / warmup) if warmup else 1.0
        return losses.consistency_tangent(self.form, x, v, v_teacher, dv, sigma_B, ramp)

    def _velocity_and_slope(
        self, x: Tensor, sigma_B: Tensor, dx: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor]:
        """Returns the student's velocity and its derivative along (dx, 1)."""
        student, h = self.roles["student"], self.config.derivative_step
        if not h:
            return self.adapter.predict_velocity_jvp(student, x, sigma_B, dx, torch.ones_like(sigma_B), condition)
        ends_2B = torch.stack([(sigma_B + h).clamp(max=1), (sigma_B - h).clamp(min=0)])
        ahead, behind = (
            self.adapter.predict_velocity(student, schedule.euler_step(x, dx, sigma_B, end_B), end_B, condition)
            for end_B in ends_2B
        )
        slope = (ahead - behind) / schedule.broadcast_sigma(ends_2B[0] - ends_2B[1], x)
        return self.adapter.predict_velocity(student, x, sigma_B, condition), slope


@register_method("scm")
class Scm(TangentTraining):
    """Role `student` is trained, `teacher` is frozen; one update per step."""

    form = "scm"
    config_class: ClassVar[type] = ScmConfig

    @classmethod
    def passes(cls, config: ScmConfig) -> list[Passes]:
        student = Passes("student", "student", "student", 1, 1.0, backward=True)
        return [*cls.tangent_passes(config, 1.0), student]

    def updates(self, step: int) -> list[Update]:
        return [Update("student", self.tangent_loss)]

    @classmethod
    def num_updates(cls, config: Any, num_steps: int) -> dict[str, int]:
        return {"student": num_steps}
