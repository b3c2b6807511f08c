"""Sampling for validation: runs a sample request of a method, which names the role, the solver, its steps and the
guidance.

Noise is keyed by the prompt's index and the validation seed. A prompt therefore starts from the same noise in every
run, on any number of ranks, and in every sample set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from titan_distill.diffusion import sampler
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.diffusion.requests import SampleRequest
from titan_distill.diffusion.sampler import Predictor
from titan_distill.models.base import Adapter, Condition, Guidance
from titan_distill.models.streaming import write_context
from titan_distill.roles import RoleHandle

CONTEXT = -1
"""Step number in the key of the noise that is added to a finished segment before its context is written."""


def go_on() -> None:
    return None


@dataclass(frozen=True)
class Sampling:
    """Draws sets of latents with keyed noise."""

    adapter: Adapter
    noise: KeyedNoise
    device: torch.device
    poll: Callable[[], None] = go_on
    """Function called before every forward pass, see `Validator.poll`."""

    @torch.no_grad()
    def run(
        self,
        request: SampleRequest,
        role: RoleHandle,
        condition: Condition,
        prompt_ids: Sequence[int],
        length: int | None = None,
    ) -> Tensor:
        """Samples the latents [B, *sample_shape] of the prompts with the global indices `prompt_ids`. A causal role may
        sample another `length`."""
        adapter, guidance = self.adapter, Guidance(request.guidance_scale)
        if adapter.segment_lengths(role, length) is not None:
            segments = list(self.stream(request, role, condition, prompt_ids, length))
            return torch.cat(segments, dim=adapter.sequence_dim)
        assert length is None, "only a causal role has sequences of other lengths than a sample's"
        x0 = partial(adapter.predict_x0, role, condition=condition, guidance=guidance)
        velocity = partial(adapter.guided_velocity, role, condition=condition, guidance=guidance)
        normal = partial(self._normal, "validation/noise", prompt_ids, adapter.sample_shape)
        latents = self._solve(request, x0, velocity, normal)
        return adapter.held(latents, torch.zeros(len(latents), device=self.device), condition)[0]

    def _normal(self, purpose: str, prompt_ids: Sequence[int], shape: Sequence[int], index: int) -> Tensor:
        return self.noise.normal(purpose, index, prompt_ids, shape, device=self.device)

    def stream(
        self,
        request: SampleRequest,
        role: RoleHandle,
        condition: Condition,
        prompt_ids: Sequence[int],
        length: int | None = None,
    ) -> Iterator[Tensor]:
        """Yields the segments [B, ...] of a causal role as they are finished: those of a sample, or of a sequence of
        `length`.

        The first segments do not depend on `length`. Raises ValueError for a role that is not causal, for a length that
        is not a whole number of segments, and for guidance.
        """
        adapter = self.adapter
        if request.guidance_scale != 1:
            raise ValueError(
                f"a guidance scale of {request.guidance_scale:g} needs a second context of the negative prompt, which "
                f"causal sampling does not keep; sample the role {role.name!r} with 1"
            )
        stream, lengths = adapter.open_stream(role, condition), adapter.segment_lengths(role, length)
        assert lengths is not None, "a role with a stream has segments"
        for segment, positions in enumerate(lengths):
            purpose, shape = f"validation/noise/{segment}", adapter.segment_shape(positions)
            normal = partial(self._normal, purpose, prompt_ids, shape)
            with torch.no_grad():  # not around the loop: a generator would leave the mode to whoever consumes it
                x0 = self._solve(request, stream.predict_x0, stream.predict_velocity, normal)
            yield x0
            if segment + 1 < len(lengths):
                self.poll()
                write_context(stream, x0, request.context_sigma, partial(normal, CONTEXT))

    def _solve(
        self, request: SampleRequest, x0: Predictor, velocity: Predictor, normal: Callable[[int], Tensor]
    ) -> Tensor:
        """Runs the request's solver from the noise `normal(0)`."""

        def predict(x: Tensor, sigma_B: Tensor) -> Tensor:
            self.poll()
            return x0(x, sigma_B) if request.solver == "sde" else velocity(x, sigma_B)

        if request.solver == "sde":
            assert request.sigmas is not None
            return sampler.sample_few_step(predict, normal(0), request.sigmas, lambda index: normal(index + 1))
        return sampler.sample_ode(
            predict,
            normal(0),
            num_steps=request.num_steps,
            shift=self.adapter.flow_shift,
            solver=request.solver,
            sigmas=request.sigmas,
        )
