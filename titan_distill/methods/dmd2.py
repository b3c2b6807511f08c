"""Distribution matching distillation, DMD2 (arXiv 2405.14867), for few-step generators.

There are three roles. The *student* runs a few denoising steps from pure noise, as at inference (backward simulation).
For a re-noised student sample, the *teacher* estimates the direction towards the data, and the *critic* the direction
towards the student's own samples. The difference of these scores is the gradient of the KL divergence between the two
distributions. The critic is trained on the student's current samples, several times per student update.

Every random choice is a keyed draw. The *exit* of a rollout is the random step at which it ends. It is drawn once for
the global batch from a key that all ranks have, so all ranks run the same number of forward passes without
communication.

Equation numbers and defaults: DMD (2311.18828) eq. 7–8, DMD2 §4; Self-Forcing (2506.08009).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from titan_distill.config.parsing import check_range
from titan_distill.config.resume import logged
from titan_distill.data.loader import Batch
from titan_distill.diffusion import schedule
from titan_distill.diffusion.requests import MAX_GUIDANCE, SampleRequest, ValidationRequest
from titan_distill.methods import losses
from titan_distill.methods.adversarial import AdversarialConfig, AdversarialTraining
from titan_distill.methods.base import LossResult, Passes, Update
from titan_distill.methods.few_step import guided_passes
from titan_distill.models.base import Condition, Guidance
from titan_distill.registry import register_method


@dataclass(frozen=True)
class Dmd2Config(AdversarialConfig):
    """[method_config] of `recipe.method = "dmd2"`."""

    rollout: Literal["simulate", "data"] = logged("simulate")
    """`simulate`: the student denoises pure noise up to the exit step, where the rollout ends. `data`: a real latent is
    noised to the level of the exit step."""
    last_step_only: bool = logged(False)
    """True: the exit step is the last of denoising_steps. False: it is drawn uniformly from them."""
    update_ratio: int = 5
    """Steps per student update. The critic is updated at every step, with exclusive = true only at the steps without a
    student update."""
    exclusive: bool = False
    """True: every update_ratio-th step updates only the student, every other step only the critic; ratio 5 then gives
    four critic updates per student update. False: every step updates the critic, so ratio 5 gives five."""
    fake_guidance_scale: float = logged(1.0)
    """Scale of the critic's classifier-free guidance, standard form. 1 is without guidance."""
    min_step: float = logged(20.0)
    """Lowest timestep at which scores are compared."""
    max_step: float = logged(980.0)
    """Highest timestep at which scores are compared."""
    ts_schedule: bool = logged(False)
    """True: the score timestep is not drawn below the step after the exit step, where the rollout would go on."""
    ts_schedule_max: bool = logged(False)
    """True: the score timestep is not drawn above the exit step. Both switches apply to student and critic."""
    clamp: Literal["after_shift", "resample"] = logged("after_shift")
    """Way to keep the score timestep between min_step and max_step. `after_shift` clamps the shifted timestep,
    `resample` draws between the two."""
    critic_loss: losses.CriticLoss = logged("flow")
    """Quantity that the critic regresses. All have the same minimum, but weigh noise levels differently: relative to
    `flow`, `x0` by σ², `noise` by (1 - σ)², `v` by n⁴ and `trigflow` (rCM's) by n², with n² = (1 - σ)² + σ²."""
    normalise: bool = logged(True)
    """True: the score difference of each sample is divided by its mean |x - x_real| (DMD eq. 8)."""
    student_sampler: Literal["sde", "ode"] = logged("sde")
    """Transition between two steps of a rollout: `sde` re-noises the x0 estimate with fresh noise, `ode` takes an Euler
    step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "update_ratio", least=1)
        check_range(self, "fake_guidance_scale", least=-MAX_GUIDANCE, most=MAX_GUIDANCE)
        if self.exclusive and self.update_ratio < 2:
            raise ValueError("exclusive = true leaves no step for the critic at update_ratio = 1; use at least 2")
        if not 0.0 <= self.min_step < self.max_step <= schedule.NUM_TRAIN_TIMESTEPS:
            raise ValueError(
                f"min_step = {self.min_step} and max_step = {self.max_step} must keep 0 <= min_step < max_step <= 1000"
            )

    @property
    def critic_guidance(self) -> Guidance:
        return Guidance(self.fake_guidance_scale)


@dataclass(frozen=True)
class Rollout:
    """Student samples of one micro-batch, and the exit step of their rollout."""

    x0: Tensor
    exit_index: int
    mask: Tensor | None = None
    """Mask of the elements that the student's loss counts, broadcast to `x0`; None for all."""


@register_method("dmd2")
class Dmd2(AdversarialTraining):
    """Roles `student` and `critic` are trained, `teacher` is frozen; a `discriminator` on request."""

    config_class: ClassVar[type] = Dmd2Config
    roles_required: ClassVar[dict[str, bool]] = {"student": True, "teacher": False, "critic": True}
    signals: ClassVar[Mapping[str, str]] = {"score_difference": "dmd/gradient_size"}
    uses_loss_mask = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for exit_index in range(len(self.sigmas)):
            # An exit that leaves no score time raises its error now, not when it is drawn.
            self._score_sigma(torch.tensor([0.5], dtype=torch.float64), exit_index)

    @classmethod
    def needs_latents(cls, config: Dmd2Config) -> bool:
        return config.rollout == "data" or config.has_discriminator

    @classmethod
    def passes(cls, config: Dmd2Config) -> list[Passes]:
        last = len(config.denoising_steps) - 1
        before_exit = 0.0 if config.rollout == "data" else float(last) if config.last_step_only else last / 2
        students = 1 / config.update_ratio
        critics = 1 - students if config.exclusive else 1.0
        return [
            Passes("student", "student", "rollout", before_exit, students),
            Passes("student", "student", "student", 1, students, backward=True),
            guided_passes("student", "critic", config.critic_guidance, students),
            guided_passes("student", "teacher", config.teacher_guidance, students),
            Passes("critic", "student", "rollout", before_exit + 1, critics),
            Passes("critic", "critic", "critic", 1, critics, backward=True),
            *cls.adversarial_passes(config, before_exit + 1, students, critics),
        ]

    def updates(self, step: int) -> list[Update]:
        """Returns the updates due at a step: the student's when it is due, then the critic's and that of a
        discriminator. With `exclusive`, a step with a student update has no other."""
        student, *critics = self._all_updates()
        if step % self.config.update_ratio != 0:
            return critics
        return [student] if self.config.exclusive else [student, *critics]

    def held_out_updates(self, step: int) -> list[Update]:
        return self._all_updates()

    def _all_updates(self) -> list[Update]:
        prepare = self.with_weights if self.config.has_normalised_weights else None
        student = Update("student", self.student_loss, prepare=prepare)
        return [student, Update("critic", self.critic_loss), *self.discriminator_updates()]

    @classmethod
    def num_updates(cls, config: Any, num_steps: int) -> dict[str, int]:
        students = -(-num_steps // config.update_ratio)  # rounded up
        critics = num_steps - students if config.exclusive else num_steps
        return {"student": students, "critic": critics, **dict.fromkeys(cls.heads(config), critics)}

    def student_loss(self, batch: Batch, step: int) -> LossResult:
        """Moves the student's samples along the difference of the two scores."""
        condition = self.adapter.text_condition(batch)
        rollout = self.rollout(batch, condition, step, purpose="dmd2/student")
        with torch.no_grad():
            direction = self._direction(batch, condition, step, rollout)
        mask = self._mask(rollout, condition)
        losses_B = losses.dmd_loss(rollout.x0, direction, mask)
        trained = direction if mask is None else direction * mask
        metrics = {"dmd/gradient_size": trained.abs().flatten(1).mean(1)}
        if self.config.adversarial_weight:
            sigma_of = partial(self._score_sigma, exit_index=rollout.exit_index)
            adversarial_B = self.adversarial_term(batch, condition, step, rollout.x0, sigma_of)
            losses_B, metrics["dmd/adversarial"] = losses_B + adversarial_B, adversarial_B.detach()
        return LossResult(losses_B, metrics)

    def sample_for_discriminator(self, batch: Batch, condition: Condition, step: int) -> tuple[Tensor, Tensor]:
        rollout = self.rollout(batch, condition, step, purpose="dmd2/discriminator")
        u_B = self.noise.uniform("dmd2/discriminator/timestep", step, batch.sample_ids)
        return rollout.x0, self._score_sigma(u_B, rollout.exit_index)

    def critic_loss(self, batch: Batch, step: int) -> LossResult:
        """Trains the critic to denoise the student's current samples."""
        condition = self.adapter.text_condition(batch)
        with torch.no_grad():
            rollout = self.rollout(batch, condition, step, purpose="dmd2/critic")
        u_B = self.noise.uniform("dmd2/critic/timestep", step, batch.sample_ids)
        sigma_B = self._score_sigma(u_B, rollout.exit_index)
        noise = self.normal("dmd2/critic/noise", batch, step)
        x = self.adapter.add_noise(rollout.x0, noise, sigma_B)
        with self.timer("critic"):
            velocity = self.adapter.predict_velocity(self.roles["critic"], x, sigma_B, condition)
        mask = self.adapter.loss_mask(condition)
        return LossResult(losses.critic_loss(self.config.critic_loss, velocity, x, rollout.x0, noise, sigma_B, mask))

    def rollout(self, batch: Batch, condition: Condition, step: int, purpose: str) -> Rollout:
        """Runs the student up to a random exit step. Only the forward at the exit step may have gradients.

        All earlier forwards run without gradient, so the memory is that of one step.
        """
        num_steps = len(self.sigmas)
        last = num_steps - 1
        exit_index = last if self.config.last_step_only else self.noise.index(f"{purpose}/exit", step, num_steps)
        levels = self.rollout_levels(batch, step, purpose, exit_index)
        with self.timer("rollout"):
            with torch.no_grad():
                x = self._student_input(batch, condition, step, purpose, levels)
            return Rollout(self._student_x0(x, levels[-1], condition), exit_index)

    def rollout_levels(self, batch: Batch, step: int, purpose: str, exit_index: int) -> list[Tensor]:
        """Returns the noise levels [B] of a rollout's forwards, up to the exit step: those of the schedule."""
        size = len(batch.sample_ids)
        return [torch.full((size,), sigma, dtype=torch.float64) for sigma in self.sigmas[: exit_index + 1]]

    def _student_input(
        self, batch: Batch, condition: Condition, step: int, purpose: str, levels: Sequence[Tensor]
    ) -> Tensor:
        if self.config.rollout == "data":
            assert batch.latents is not None
            return self.adapter.add_noise(batch.latents, self.normal(f"{purpose}/noise/0", batch, step), levels[-1])
        return self.denoise(
            lambda x, sigma_B: self._student_x0(x, sigma_B, condition),
            lambda index: self.normal(f"{purpose}/noise/{index}", batch, step),
            levels,
        )

    def denoise(
        self,
        predict_x0: Callable[[Tensor, Tensor], Tensor],
        normal: Callable[[int], Tensor],
        levels: Sequence[Tensor],
    ) -> Tensor:
        """Denoises `normal(0)` at the first of `levels` up to the input of the forward at the last, as at inference."""
        x = normal(0)
        for index, (sigma_B, next_B) in enumerate(pairwise(levels)):
            x0 = predict_x0(x, sigma_B)
            if self.config.student_sampler == "sde":
                noise = normal(index + 1)
            else:
                noise = schedule.noise_from_velocity(x, schedule.velocity_from_x0(x, x0, sigma_B), sigma_B)
            x = self.adapter.add_noise(x0, noise, next_B)
        return x

    def _student_x0(self, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        return self.adapter.predict_x0(self.roles["student"], x, sigma_B, condition)

    def scored_sample(self, batch: Batch, condition: Condition, step: int) -> tuple[Tensor, Tensor]:
        return self._noised(batch, step, self.rollout(batch, condition, step, purpose="dmd2/student"))

    def _noised(self, batch: Batch, step: int, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Returns the samples at the noise levels [B] at which the student's update compares their scores."""
        u_B = self.noise.uniform("dmd2/student/timestep", step, batch.sample_ids)
        sigma_B = self._score_sigma(u_B, rollout.exit_index)
        noise = self.normal("dmd2/student/noise", batch, step)
        return self.adapter.add_noise(rollout.x0.detach(), noise, sigma_B), sigma_B

    def _direction(self, batch: Batch, condition: Condition, step: int, rollout: Rollout) -> Tensor:
        """Returns the direction against which the student's samples move: the difference of their scores, normalised
        and weighted."""
        config = self.config
        x, sigma_B = self._noised(batch, step, rollout)
        with self.timer("critic"):
            fake = self.adapter.predict_x0(self.roles["critic"], x, sigma_B, condition, config.critic_guidance)
        with self.timer("teacher"):
            real = self.adapter.predict_x0(self.roles["teacher"], x, sigma_B, condition, config.teacher_guidance)
        # Self-Forcing's mask of a long rollout belongs to the loss alone: its normaliser is that of the whole sample.
        mask = self.adapter.loss_mask(condition)
        direction = losses.dmd_direction(fake, real, rollout.x0.detach(), normalise=config.normalise, mask=mask)
        weight_B = self.weight(batch, x, sigma_B, condition)
        return direction if weight_B is None else direction * schedule.broadcast_sigma(weight_B, direction)

    def _mask(self, rollout: Rollout, condition: Condition) -> Tensor | None:
        """Returns the mask of elements that the student's loss counts: the rollout's, or else the elements that the
        condition does not give."""
        return self.adapter.loss_mask(condition) if rollout.mask is None else rollout.mask

    def _score_sigma(self, u_B: Tensor, exit_index: int) -> Tensor:
        """Returns the noise levels at which scores are compared, one per sample, from uniform draws."""
        config, shift = self.config, self.adapter.flow_shift
        exit_u, next_u = (schedule.unshift_sigma(s, shift) for s in (*self.sigmas, 0.0)[exit_index : exit_index + 2])
        return schedule.score_sigma(
            u_B,
            low=next_u if config.ts_schedule else 0.0,
            high=exit_u if config.ts_schedule_max else 1.0,
            shift=shift,
            min_step=config.min_step,
            max_step=config.max_step,
            clamp=config.clamp,
        )

    @classmethod
    def student_sample(cls, config: Any, flow_shift: float) -> SampleRequest:
        sample = super().student_sample(config, flow_shift)
        return sample if config.student_sampler == "sde" else replace(sample, solver="euler")

    @classmethod
    def validation_samples(cls, config: Any, flow_shift: float) -> ValidationRequest:
        return replace(super().validation_samples(config, flow_shift), denoisers=(("critic", "student"),))
