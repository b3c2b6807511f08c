"""Requests of a method for sampling: sets of samples for validation, and trajectories to train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from titan_distill.diffusion.schedule import guidance_is_identity

MAX_STEPS = 1000
"""Largest number of steps of a solver: the networks know 1000 timesteps."""
MAX_GUIDANCE = 100.0
"""Largest size of a guidance scale. Published ones are below 20."""

NUM_NOISES = 4
"""Number of samples of the first prompt, each from another noise, whose diversity the doctor measures."""
LEVELS = (0.25, 0.5, 0.75)
"""Noise levels at which the doctor measures a role's error on samples."""

REQUEST_NAME = "request.json"
"""File in which a validation's folder holds its `ValidationRequest`."""


@dataclass(frozen=True)
class SampleRequest:
    """One set of samples for validation: the role, its sampling, and when it runs."""

    label: str
    """Column title and metric prefix, e.g. `teacher` or `student`."""
    role: str
    solver: Literal["euler", "unipc", "sde"]
    num_steps: int
    """Ignored when `sigmas` is given."""
    sigmas: tuple[float, ...] | None = None
    """Few-step schedule, descending, without the final 0."""
    guidance_scale: float = 1.0
    """Classifier-free guidance in the standard form `u + w (c - u)`; 1 means one forward pass per step."""
    baseline: bool = False
    """True: sampled once, before the first step, and stored for comparison (a teacher, the student before training)."""
    context_sigma: float = 0.0
    """Noise level at which a causal role reads its finished segments."""

    @property
    def num_conditions(self) -> int:
        """Number of copies of each sample in a forward pass: 2 if guidance needs both conditions."""
        return 1 if guidance_is_identity(self.guidance_scale, "standard") else 2

    def num_passes(self, num_segments: int | None) -> int:
        """Returns the number of forward passes per batch. A causal role makes `num_segments` segments, each in all
        steps, and one pass between two of them writes the context; None for other roles."""
        steps = self.num_steps if self.sigmas is None else len(self.sigmas)
        return steps if num_segments is None else (steps + 1) * num_segments - 1


@dataclass(frozen=True)
class ValidationRequest:
    """The sample sets of a validation. `reference` names the set that the others are compared with."""

    samples: tuple[SampleRequest, ...]
    reference: str | None = None
    denoisers: tuple[tuple[str, str], ...] = ()
    """Pairs of roles: one that learns to denoise samples, and the one whose samples it learns from."""

    def of_role(self, role: str) -> SampleRequest | None:
        """Returns the request for samples of a trained role as it is now; None for a role that is not sampled."""
        return next((sample for sample in self.samples if sample.role == role and not sample.baseline), None)


@dataclass(frozen=True)
class TrajectoryRequest:
    """The sampling of a frozen teacher whose states a method trains on; `titan-distill data ode-pairs` runs it."""

    sigmas: tuple[float, ...]
    """Noise levels of the states to record, descending; the solver must visit them."""
    num_steps: int
    solver: Literal["euler", "unipc"]
    guidance_scale: float
    """Classifier-free guidance in the standard form."""


def num_samples(num_prompts: int, *, is_watched: bool) -> int:
    """Returns the number of samples of a set: one per prompt and, where the doctor watches, further ones of the first
    prompt."""
    return num_prompts + (NUM_NOISES - 1 if is_watched else 0)


def check_options(num_steps: int | None, guidance_scale: float | None, seed: int) -> None:
    """Raises ValueError for values of --num-steps, --guidance-scale and --seed that cannot be sampled with."""
    if seed < 0:
        raise ValueError(f"--seed {seed} is negative; choose 0 or more")
    if num_steps is not None and not 1 <= num_steps <= MAX_STEPS:
        raise ValueError(f"--num-steps {num_steps} is out of range; choose 1 to {MAX_STEPS}")
    if guidance_scale is not None and not abs(guidance_scale) <= MAX_GUIDANCE:  # nan is neither
        raise ValueError(
            f"--guidance-scale {guidance_scale:g} is out of range; choose {-MAX_GUIDANCE:g} to {MAX_GUIDANCE:g}"
        )
