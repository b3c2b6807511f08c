"""Knowledge distillation: a few-step student regresses the clean latents at which a teacher's sampling ends.

The probability-flow ODE leads from each noise to one clean latent, and every state on its path determines this end. The
student is trained at the few noise levels of its schedule. Its input is the state x_t of a recorded trajectory, and its
x0 prediction is regressed to the end of the same trajectory,

    ‖x0_θ(x_t, t) − x_end‖²        (the ODE initialisation of CausVid 2412.07772 and Self-Forcing 2506.08009).

Pairs of input and target are exact, so that no second network runs and a few hundred updates go far; guidance is in the
targets, and the student needs none. The price is the regression's: where the student cannot represent the teacher's map
it answers with a mean, which is blurred. Hence its use as the start of a distribution matching run.

`titan-distill data ode-pairs` records the trajectories: column `trajectory`, states [S, *latent] at the timesteps of
column `trajectory_timesteps` [S], with the end as the row's latent. A file may hold more states than are trained on.
A level that it lacks is an error: pairs made for another shift would otherwise be learned at wrong times.

A bidirectional student has one time per sample, the same for all its latents. A causal one has a time for each of its
segments, drawn independently, and the end of the trajectory, time 0, is among them: its segments then learn from pasts
at every level, and from finished ones above all, which is what they will meet when the student is unrolled (the
initialisation of Self-Forcing). A segment at time 0 is context only: its own prediction is exact whatever the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from titan_distill.config.config import Config
from titan_distill.config.resume import logged
from titan_distill.data.loader import Batch
from titan_distill.data.parquet import LatentRow, RowCheck
from titan_distill.diffusion import schedule
from titan_distill.diffusion.requests import TrajectoryRequest, ValidationRequest
from titan_distill.diffusion.trajectory import TIMESTEP_TOLERANCE
from titan_distill.diffusion.transfer import to_device
from titan_distill.methods import losses
from titan_distill.methods.base import LossResult, Passes, Update
from titan_distill.methods.few_step import FewStepConfig, FewStepTraining
from titan_distill.registry import register_method

STATES, TIMESTEPS = "trajectory", "trajectory_timesteps"


@dataclass(frozen=True)
class KnowledgeDistillationConfig(FewStepConfig):
    """[method_config] of `recipe.method = "knowledge_distillation"`."""

    denoising_steps: tuple[float, ...] = logged((1000.0, 750.0, 500.0, 250.0))
    """The student's few-step schedule, as timesteps; each must be a state of the recorded trajectories."""
    guidance_scale: float = logged(4.0)
    """Scale of the teacher's classifier-free guidance, standard form, for recorded trajectories and for validation."""
    teacher_steps: int = logged(48)
    """Sampling steps of the teacher. Their timesteps must include denoising_steps, as those of 48 Euler steps include
    warped quarters."""
    teacher_solver: Literal["euler", "unipc"] = logged("euler")
    """ODE solver of the teacher's sampling."""
    teacher_in_validation: bool = logged(True)
    """True: validation also samples the role `teacher`. Training itself needs only the recorded trajectories."""


def check_trajectory(sigmas: tuple[float, ...], flow_shift: float, row: LatentRow) -> None:
    """Raises ValueError unless a row has the end of a trajectory and its states at all noise levels `sigmas`."""
    states, timesteps, end = row.extra[STATES], row.extra[TIMESTEPS].double(), row.vae_latent
    assert end is not None, "the loader refuses rows without latents"
    # A dataset stores every latent with four dims; missing ones are 1 and behind the others.
    state = (*states.shape[1:], *[1] * (end.ndim + 1 - states.ndim))
    if state != tuple(end.shape) or timesteps.shape != states.shape[:1]:
        raise ValueError(
            f"{STATES} of {list(states.shape)} at timesteps of {list(timesteps.shape)} for latents of "
            f"{list(end.shape)}; make them with `titan-distill data ode-pairs`"
        )
    for wanted in (sigma * schedule.NUM_TRAIN_TIMESTEPS for sigma in sigmas):
        if (timesteps - wanted).abs().min() > TIMESTEP_TOLERANCE:
            raise ValueError(
                f"a trajectory with the timesteps {[round(t, 2) for t in timesteps.tolist()]}, but denoising_steps at "
                f"shift {flow_shift:g} need {wanted:.2f}; change denoising_steps or the flow shift, or record the "
                "trajectories again"
            )


@register_method("knowledge_distillation")
class KnowledgeDistillation(FewStepTraining):
    """Role `student` is trained; the frozen `teacher` is only sampled from, in validation."""

    config_class: ClassVar[type] = KnowledgeDistillationConfig
    roles_required: ClassVar[dict[str, bool]] = {"student": True}
    causal_roles: ClassVar[frozenset[str]] = frozenset({"student"})

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sigmas_K = torch.tensor(self.sigmas, dtype=torch.float64)

    @classmethod
    def required_roles(cls, config: KnowledgeDistillationConfig) -> dict[str, bool]:
        return cls.roles_required | ({"teacher": False} if config.teacher_in_validation else {})

    @classmethod
    def extra_tensors(cls, config: KnowledgeDistillationConfig) -> tuple[str, ...]:
        return STATES, TIMESTEPS

    @classmethod
    def row_checks(cls, config: Config) -> tuple[RowCheck, ...]:
        shift = config.pipeline_config.flow_shift
        return (partial(check_trajectory, config.method_config.sigmas(shift), shift),)

    @classmethod
    def teacher_trajectory(cls, config: KnowledgeDistillationConfig, flow_shift: float) -> TrajectoryRequest:
        sigmas = config.sigmas(flow_shift)
        return TrajectoryRequest(sigmas, config.teacher_steps, config.teacher_solver, config.guidance_scale)

    @classmethod
    def passes(cls, config: KnowledgeDistillationConfig) -> list[Passes]:
        return [Passes("student", "student", "student", 1, 1.0, backward=True)]

    def updates(self, step: int) -> list[Update]:
        return [Update("student", self.student_loss)]

    @classmethod
    def num_updates(cls, config: Any, num_steps: int) -> dict[str, int]:
        return {"student": num_steps}

    def student_loss(self, batch: Batch, step: int) -> LossResult:
        """Regresses the end of each sample's trajectory from one of its states, or from one per segment; the states are
        keyed draws."""
        assert batch.latents is not None
        lengths = self.adapter.segment_lengths(self.roles["student"])
        x, sigma = self._whole(batch, step) if lengths is None else self._by_segment(batch, step, lengths)
        with self.timer("student"):
            x0 = self.adapter.predict_x0(self.roles["student"], x, sigma, self.adapter.text_condition(batch))
        return LossResult(losses.regression_loss(x0, batch.latents))

    def _whole(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Returns the states at one level per sample, and the levels [B]."""
        u_B = self.noise.uniform("knowledge_distillation/time", step, batch.sample_ids)
        choice_B = (u_B * len(self.sigmas_K)).long()
        return self._states(batch, choice_B), self.sigmas_K[choice_B]

    def _by_segment(self, batch: Batch, step: int, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Returns states in which every segment has its own level, and the levels, which broadcast to the states."""
        assert batch.latents is not None
        dim, start, parts, levels = self.adapter.sequence_dim, 0, [], []
        num_levels, ends = len(self.sigmas_K), torch.cat((self.sigmas_K, self.sigmas_K.new_zeros(1)))
        each = [-1] + [1] * (batch.latents.ndim - 1)
        for segment, length in enumerate(lengths):
            u_B = self.noise.uniform(f"knowledge_distillation/time/{segment}", step, batch.sample_ids)
            choice_B = (u_B * (num_levels + 1)).long()
            is_end = to_device(choice_B == num_levels, batch.latents.device).view(each)
            states = self._states(batch, choice_B.clamp(max=num_levels - 1))
            parts.append(torch.where(is_end, batch.latents, states).narrow(dim, start, length))
            levels.append(ends[choice_B].view(each).expand([length if d == dim else -1 for d in range(len(each))]))
            start += length
        return torch.cat(parts, dim), torch.cat(levels, dim)

    def _states(self, batch: Batch, choice_B: Tensor) -> Tensor:
        """Returns each sample's recorded state at its chosen level of the schedule."""
        states_BS, wanted_B = batch.extra[STATES], self.sigmas_K[choice_B] * schedule.NUM_TRAIN_TIMESTEPS
        distance_B, index_B = (batch.on_host(TIMESTEPS).double() - wanted_B[:, None]).abs().min(1)
        assert distance_B.max() <= TIMESTEP_TOLERANCE, "check_trajectory has found every level in every row"
        index_B = to_device(index_B, states_BS.device)
        return states_BS[torch.arange(len(index_B), device=states_BS.device), index_B]

    @classmethod
    def sample_requests(cls, config: KnowledgeDistillationConfig, flow_shift: float) -> ValidationRequest:
        """Returns requests for the teacher (sampled like the recorded pairs), the student before training, and the
        student now."""
        request = super().sample_requests(config, flow_shift)
        return replace(request, samples=tuple(x for x in request.samples if x.label != "teacher_few_steps"))
