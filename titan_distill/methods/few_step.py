"""The few-step student of a teacher that samples in many steps: its schedule, and the samples that validation compares.

All methods but finetuning make such a student. Their configurations and classes derive from the ones here, so that the
schedule, its checks and the validation samples are defined once: the teacher with many steps (the reference) and with
as few as the student, the student before training and now.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from titan_distill.config.parsing import check_range
from titan_distill.config.resume import logged
from titan_distill.diffusion import schedule
from titan_distill.diffusion.requests import MAX_GUIDANCE, MAX_STEPS, SampleRequest, ValidationRequest
from titan_distill.methods.base import Passes, TrainingMethod
from titan_distill.models.base import Condition, Guidance


@dataclass(frozen=True)
class FewStepConfig:
    """Settings of a few-step student and of its teacher's sampling."""

    denoising_steps: tuple[float, ...] = logged((1000.0, 750.0, 500.0, 250.0))
    """The student's few-step schedule, as timesteps. The methods consistency and scm use it in validation only."""
    warp: bool = logged(True)
    """True: the shift of the noise schedule is applied to denoising_steps (1000, 750, … at shift 5 become 1000, 937.5,
    …). False: they are final timesteps."""
    guidance_scale: float = logged(4.0)
    """Scale of the teacher's classifier-free guidance. The student learns the guided teacher and samples without
    guidance."""
    teacher_steps: int = logged(48)
    """Sampling steps of the teacher's validation samples."""
    teacher_solver: Literal["euler", "unipc"] = logged("unipc")
    """ODE solver of the teacher's validation samples."""

    def __post_init__(self) -> None:
        check_range(self, "teacher_steps", least=1, most=MAX_STEPS)
        check_range(self, "guidance_scale", least=-MAX_GUIDANCE, most=MAX_GUIDANCE)
        self.sigmas(flow_shift=1.0)

    def sigmas(self, flow_shift: float) -> tuple[float, ...]:
        """Returns the noise levels of the schedule, descending. Raises ValueError if the timesteps do not descend."""
        return tuple(schedule.few_step_sigmas(self.denoising_steps, flow_shift, self.warp).tolist())

    @property
    def teacher_guidance(self) -> Guidance:
        return Guidance(self.guidance_scale)


@dataclass(frozen=True)
class GuidedFewStepConfig(FewStepConfig):
    """Settings of a few-step student whose teacher is asked for guided predictions during training."""

    guidance_form: Literal["standard", "offset"] = logged("standard")
    """Formula of classifier-free guidance: w is guidance_scale, u and c are the predictions without and with the
    prompt. `standard`: u + w (c - u). `offset`: c + w (c - u), as in Self-Forcing, CausVid and FastVideo. An offset
    scale of 3.0 equals a standard scale of 4.0."""

    @property
    def teacher_guidance(self) -> Guidance:
        return Guidance(self.guidance_scale, self.guidance_form)


class FewStepTraining(TrainingMethod):
    """Base of the methods that train the role `student` towards a frozen `teacher`."""

    roles_required: ClassVar[dict[str, bool]] = {"student": True, "teacher": False}

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sigmas = self.config.sigmas(self.adapter.flow_shift)

    @torch.no_grad()
    def teacher_velocity(self, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        """Returns the teacher's guided velocity."""
        with self.timer("teacher"):
            guidance = self.config.teacher_guidance
            return self.adapter.guided_velocity(self.roles["teacher"], x, sigma_B, condition, guidance)

    @classmethod
    def student_sample(cls, config: Any, flow_shift: float) -> SampleRequest:
        """Returns the request for samples of the student: without guidance, with fresh noise between its steps."""
        sigmas = config.sigmas(flow_shift)
        return SampleRequest("student", "student", "sde", len(sigmas), sigmas)

    @classmethod
    def validation_samples(cls, config: Any, flow_shift: float) -> ValidationRequest:
        student = cls.student_sample(config, flow_shift)
        before = replace(student, label="student_before", baseline=True)
        if "teacher" not in cls.required_roles(config):
            return ValidationRequest((before, student))
        scale = float(schedule.standard_scale(config.teacher_guidance.scale, config.teacher_guidance.form))
        teacher = SampleRequest(
            "teacher", "teacher", config.teacher_solver, config.teacher_steps, guidance_scale=scale, baseline=True
        )
        few_steps = replace(teacher, label="teacher_few_steps", num_steps=student.num_steps)
        return ValidationRequest((teacher, few_steps, before, student), reference="teacher")


def guided_passes(update: str, role: str, guidance: Guidance, updates_per_step: float) -> Passes:
    """Returns one forward pass of a frozen role, which guidance doubles."""
    return Passes(update, role, role, 1, updates_per_step, num_conditions=1 if guidance.is_identity else 2)
