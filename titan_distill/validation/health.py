"""Readings of a validation for the doctor: each is a number of one role's samples and the number that it is compared
with.

Samples of the trained role are compared with those of the method's reference (the teacher), prompt by prompt from the
same noise, so a prompt that makes a dark or a quiet video counts alike on both sides. A method without a reference
compares with its first baseline, and without baselines with the run's own first validation.

Before the first step an untrained network judges the teacher: its error on the teacher's noised samples, divided by
that on samples of the student. Samples of moderate guidance are some times as hard for it; those of too much guidance,
or of a teacher that works on latents of another scale, many times, although they may be neither bright nor harsh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.diffusion.requests import LEVELS, ValidationRequest
from titan_distill.models.base import Adapter, Condition
from titan_distill.roles import RoleHandle
from titan_distill.validation.looks import Looks, diversity, mean_looks

START = "untrained network"
"""Name of the network that judges the teacher, in `Traits.errors`. A role's name has no space."""


@dataclass(frozen=True)
class Reading:
    """A number of one role's samples."""

    role: str
    measure: str
    """Name of the measure, one of `report.measures`."""
    value: float
    reference: float | None = None
    """Number to divide by; None for that of the run's first validation."""


@dataclass(frozen=True)
class Traits:
    """The part of one sample that readings need."""

    looks: Looks | None
    """Looks of the video, if it was decoded."""
    projections_P: Tensor | None
    errors: Mapping[str, float] = field(default_factory=dict)
    """Mean squared errors of the roles that learn to denoise such samples, by role, and of START."""


Set = Mapping[int, Traits]
"""Traits of one sample set. Indices from the number of prompts on are further samples of the first prompt."""


@torch.no_grad()
def denoising_errors(
    adapter: Adapter, roles: Mapping[str, RoleHandle], x0: Tensor, condition: Condition, ids: Sequence[int], seed: int
) -> list[dict[str, float]]:
    """Returns for each sample, by the names in `roles`, the mean squared error of a role's velocity at its noised
    latents, averaged over LEVELS. The noise depends on `seed`, level and sample only."""
    noise = KeyedNoise(seed)
    errors: list[dict[str, float]] = [{} for _ in ids]
    mask = adapter.loss_mask(condition)
    counted = torch.ones_like(x0) if mask is None else mask.to(x0).expand_as(x0)
    for name, role in roles.items():
        total_B = torch.zeros(len(ids), dtype=torch.float64, device=x0.device)
        for index, sigma in enumerate(LEVELS):
            sigma_B = torch.full((len(ids),), sigma, dtype=torch.float64)
            drawn = noise.normal("doctor/noise", index, ids, tuple(x0.shape[1:]), device=x0.device)
            velocity = adapter.predict_velocity(role, adapter.add_noise(x0, drawn, sigma_B), sigma_B, condition)
            squared = counted * (velocity - (drawn - x0)) ** 2
            total_B += squared.double().flatten(1).sum(1) / counted.double().flatten(1).sum(1)
        for error, value in zip(errors, (total_B / len(LEVELS)).tolist(), strict=True):
            error[name] = value
    return errors


def readings(request: ValidationRequest, sets: Mapping[str, Set], num_prompts: int) -> list[Reading]:
    """Returns the readings of a validation from its sample sets by label; those of sets that it left out are left out,
    too."""
    found: list[Reading] = []
    trained = [x for x in request.samples if not x.baseline and x.label in sets]
    for sample in request.samples:
        own = sets.get(sample.label, {})
        if own and sample.label == request.reference and not trained:
            others = (x.label for x in request.samples if x.baseline and x.role != sample.role)
            before = _mean_error(sets.get(next(others, ""), {}), START, num_prompts)
            if before is not None and (error := _mean_error(own, START, num_prompts)) is not None:
                found.append(Reading(sample.role, "start_error", error, before))
        if own and not sample.baseline:
            baselines = (x.label for x in request.samples if x.baseline)
            other = sets.get(request.reference or next(baselines, ""), {})
            found += _looks(sample.role, own, other)
            found += _diversity(sample.role, own, other, num_prompts)
    for sample in trained or request.samples:  # before the first step it equals one of the baselines
        found += _errors(sets.get(sample.label, {}), num_prompts)
    return found


def _looks(role: str, own: Set, other: Set) -> list[Reading]:
    """Returns the readings of looks, over the prompts that are decoded in both sets; over all where there is no
    other."""
    shared = [index for index, traits in own.items() if traits.looks and (not other or _has_looks(other, index))]
    if not shared:
        return []
    references = _mean_looks(other, shared) if other else {}
    values = _mean_looks(own, shared)
    return [Reading(role, name, value, references.get(name)) for name, value in values.items()]


def _has_looks(samples: Set, index: int) -> bool:
    return index in samples and samples[index].looks is not None


def _mean_looks(samples: Set, indices: Sequence[int]) -> dict[str, float]:
    return mean_looks([looks for index in indices if (looks := samples[index].looks)])


def _diversity(role: str, own: Set, other: Set, num_prompts: int) -> list[Reading]:
    values = [_diversity_of(samples, num_prompts) for samples in (own, other)]
    return [] if values[0] is None else [Reading(role, "diversity", values[0], values[1])]


def _diversity_of(samples: Set, num_prompts: int) -> float | None:
    of_one_prompt = [0, *(index for index in samples if index >= num_prompts)]
    projected = [samples[index].projections_P for index in of_one_prompt if index in samples]
    kept = [projections_P for projections_P in projected if projections_P is not None]
    return diversity(torch.stack(kept)) if len(kept) > 1 else None


def _errors(own: Set, num_prompts: int) -> list[Reading]:
    roles = {name for traits in own.values() for name in traits.errors if name != START}
    errors = {role: _mean_error(own, role, num_prompts) for role in sorted(roles)}
    return [Reading(role, "denoising_error", error) for role, error in errors.items() if error is not None]


def _mean_error(samples: Set, name: str, num_prompts: int) -> float | None:
    errors = [x.errors[name] for index, x in samples.items() if index < num_prompts and name in x.errors]
    return sum(errors) / len(errors) if errors else None
