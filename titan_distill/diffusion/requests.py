"""Requests of a method for sampling: sets of samples for validation, and trajectories to train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
    scored: bool = True
    """False: this set is not scored. Its distance to the reference is still measured, and the videos that are shown are
    decoded."""
    context_sigma: float = 0.0
    """Noise level at which a causal role reads its finished segments."""


@dataclass(frozen=True)
class ValidationRequest:
    """The sample sets of a validation. `reference` names the set that the others are compared with."""

    samples: tuple[SampleRequest, ...]
    reference: str | None = None


@dataclass(frozen=True)
class TrajectoryRequest:
    """The sampling of a frozen teacher whose states a method trains on; `titan-distill data ode-pairs` runs it."""

    sigmas: tuple[float, ...]
    """Noise levels of the states to record, descending; the solver must visit them."""
    num_steps: int
    solver: Literal["euler", "unipc"]
    guidance_scale: float
    """Classifier-free guidance in the standard form."""
