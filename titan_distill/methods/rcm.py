"""rCM: continuous-time consistency, regularised by distribution matching.

Consistency follows the teacher's trajectories forward: whatever the data has, the student covers, a little blurred by
the errors that add up along the way. Distribution matching pulls the student's own samples to where the teacher finds
them likely: sharp, but free to forget modes. Their weighted sum has the diversity of the one and the detail of the
other. The tangent is `scm`'s, the second term and the critic that it needs are `dmd2`'s, unchanged.

Until `tangent_warmup` steps are done the consistency term trains alone. After that one update minimises the sum of both
terms: its two forwards share one backward, so that memory is that of two samples' activations; adding up two backwards
would give the same gradient.

Source: rCM (2510.08431).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from titan_distill.config.config import Config
from titan_distill.config.parsing import check_range
from titan_distill.config.resume import logged
from titan_distill.data.loader import Batch
from titan_distill.diffusion.schedule import shift_sigma
from titan_distill.methods.base import LossResult, Passes, Update
from titan_distill.methods.dmd2 import Dmd2, Dmd2Config
from titan_distill.methods.scm import TangentConfig, TangentTraining
from titan_distill.registry import register_method


@dataclass(frozen=True)
class RcmConfig(TangentConfig, Dmd2Config):
    """[method_config] of `recipe.method = "rcm"`."""

    exclusive: bool = True
    """True: after the warm-up every update_ratio-th step updates only the student, every other step only the critic;
    ratio 5 then gives four critic updates per student update. False: every step updates the critic, so ratio 5 gives
    five."""
    consistency_weight: float = logged(50.0)
    """Weight of the consistency term, a mean over elements. The term of distribution matching has weight 1 and contains
    a factor of 1/2, which the paper's code has not, so 50 here gives the balance of 100 and 1 there."""
    rollout_times: Literal["schedule", "random"] = logged("schedule")
    """Noise levels of a rollout after its first. `schedule`: those of denoising_steps, as in sampling. `random`: each
    sample draws its own, uniformly before the shift and never above the level before, as in the paper's code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "consistency_weight", above=0)
        if self.rollout_times == "schedule":
            return
        for name, is_set in (
            ("ts_schedule = true", self.ts_schedule),
            ("ts_schedule_max = true", self.ts_schedule_max),
            ("rollout = 'data'", self.rollout == "data"),
        ):
            if is_set:
                raise ValueError(
                    f"{name} takes the level of a rollout's exit from denoising_steps, which rollout_times = 'random' "
                    "replaces; change one of the two"
                )


@register_method("rcm")
class Rcm(TangentTraining, Dmd2):
    """Roles `student` and `critic` are trained, `teacher` is frozen."""

    form = "rcm"
    config_class: ClassVar[type] = RcmConfig

    @classmethod
    def unreached(cls, config: Config) -> list[str]:
        warmup, num_steps = config.method_config.tangent_warmup, config.training.steps
        if warmup < num_steps:
            return []
        consequence = "the student learns consistency alone, with part of its own derivative"
        return [
            f"method_config.tangent_warmup = {warmup} leaves none of the {num_steps} steps to distribution matching: "
            f"{consequence}"
        ]

    @classmethod
    def needs_latents(cls, config: Dmd2Config) -> bool:
        return True

    @classmethod
    def passes(cls, config: Any) -> list[Passes]:
        """Returns the passes of a step after the warm-up. Both forwards of the student share one backward, so they
        count as two conditions."""
        assert isinstance(config, RcmConfig)
        matching = Dmd2.passes(config)
        both = [replace(p, num_conditions=2) if p.backward and p.role == p.update == "student" else p for p in matching]
        return [*cls.tangent_passes(config, 1 / config.update_ratio), *both]

    def updates(self, step: int) -> list[Update]:
        """Returns the updates due at a step: the student's during the warm-up, and those of DMD2 afterwards."""
        if step < self.config.tangent_warmup:
            return [Update("student", self.student_loss)]
        return super().updates(step)

    def held_out_updates(self, step: int) -> list[Update]:
        return self.updates(step) if step < self.config.tangent_warmup else super().held_out_updates(step)

    @classmethod
    def num_updates(cls, config: Any, num_steps: int) -> dict[str, int]:
        warmup = min(num_steps, config.tangent_warmup)
        after, before = super().num_updates(config, num_steps), super().num_updates(config, warmup)
        return {role: after[role] - before[role] + (warmup if role == "student" else 0) for role in after}

    def rollout_levels(self, batch: Batch, step: int, purpose: str, exit_index: int) -> list[Tensor]:
        levels = super().rollout_levels(batch, step, purpose, exit_index)
        if self.config.rollout_times == "random":
            for index in range(1, len(levels)):
                u_B = self.noise.uniform(f"{purpose}/time/{index}", step, batch.sample_ids)
                levels[index] = torch.minimum(shift_sigma(u_B, self.adapter.flow_shift), levels[index - 1])
        return levels

    def student_loss(self, batch: Batch, step: int) -> LossResult:
        """Returns the weighted sum of both terms; during the warm-up the consistency term alone."""
        consistency = self.tangent_loss(batch, step)
        assert batch.latents is not None
        weighted_B = consistency.losses_B * (self.config.consistency_weight / batch.latents[0].numel())
        if step < self.config.tangent_warmup:
            return LossResult(weighted_B, consistency.metrics_B)
        matching = super().student_loss(batch, step)
        return LossResult(weighted_B + matching.losses_B, {**consistency.metrics_B, **matching.metrics_B})
