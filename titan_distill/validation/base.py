"""Validation, the part that knows no model family: running a method's sample requests.

A family's Validator turns the latents into something to look at and to score. Noise is keyed by the prompt's index and
the validation seed, so the same prompt starts from the same noise in every run, on any number of ranks, for every
sample set.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from titan_distill.diffusion import sampler
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.methods.base import SampleRequest, ValidationRequest
from titan_distill.models.base import Adapter, Condition, Guidance
from titan_distill.roles import RoleHandle, RoleManager


def _go_on() -> None:
    return None


class Validator(ABC):
    """Samples what a method asks for, and reports. Called on all ranks alike."""

    poll: Callable[[], None] = staticmethod(_go_on)
    """Called before every forward pass of a sampling, on all ranks; raises StopRequested on all when one was asked to
    stop. The trainer sets it."""

    @abstractmethod
    def validate(self, step: int, request: ValidationRequest, roles: RoleManager) -> dict[str, float]:
        """Writes videos below the validation folder. Returns metrics as ``<sample label>/<metric>``; empty off rank
        0."""

    def media(self, step: int) -> list[Path]:
        """Pictures and videos that the last ``validate(step, …)`` wrote, for the trackers."""
        return []


@dataclass(frozen=True)
class Sampling:
    """How one set of latents is drawn: the request, and the keyed noise that makes it reproducible."""

    adapter: Adapter
    noise: KeyedNoise
    device: torch.device
    poll: Callable[[], None] = _go_on
    """As ``Validator.poll``."""

    @torch.no_grad()
    def run(self, request: SampleRequest, role: RoleHandle, condition: Condition, prompt_ids: Sequence[int]) -> Tensor:
        """Latents [B, *latent_shape] of the prompts whose global indices are ``prompt_ids``."""
        adapter, guidance = self.adapter, Guidance(request.guidance_scale)

        def normal(index: int) -> Tensor:
            return self.noise.normal("validation/noise", index, prompt_ids, adapter.latent_shape, device=self.device)

        def x0(x: Tensor, sigma_B: Tensor) -> Tensor:
            self.poll()
            return adapter.predict_x0(role, x, sigma_B, condition, guidance)

        def velocity(x: Tensor, sigma_B: Tensor) -> Tensor:
            self.poll()
            return adapter.guided_velocity(role, x, sigma_B, condition, guidance)

        if request.solver == "sde":
            assert request.sigmas is not None
            latents = sampler.sample_few_step(
                x0,
                normal(0),
                request.sigmas,
                lambda index: normal(index + 1),
            )
        else:
            latents = sampler.sample_ode(
                velocity,
                normal(0),
                num_steps=request.num_steps,
                shift=adapter.flow_shift,
                solver=request.solver,
                sigmas=request.sigmas,
            )
        return adapter.held(latents, torch.zeros(len(latents), device=self.device), condition)[0]
