"""The `scheduler/` of an exported role: diffusers' own call then visits the noise levels that the role was trained on.

A few-step student knows K noise levels. `FlowMatchEulerDiscreteScheduler` takes no list of levels from a pipeline's
call, but makes its own from two numbers of its configuration. It starts with K values from 1 down to its smallest one,
evenly spaced, maps them by `shift`, and stretches the result so that 1 stays and the last becomes `shift_terminal`. As
the recipes' lists are evenly spaced before their own shift, two numbers are enough: such a list is a fraction (a + b i)
/ (c + d i) of the step's index i, and so is the result. `shift` is found by bisection. Most lists of up to three levels
that start at 1 have a solution, too; for others there is none, and only the snippet of the card samples the student.

With `stochastic_sampling` the scheduler does what `sampler.sample_few_step` does: it predicts the clean video and adds
fresh noise down to the next level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from titan_distill.diffusion.requests import SampleRequest
from titan_distill.diffusion.sampler import ode_sigmas
from titan_distill.diffusion.schedule import NUM_TRAIN_TIMESTEPS, shift_sigma

EULER = "FlowMatchEulerDiscreteScheduler"
UNIPC = "UniPCMultistepScheduler"
SMALLEST, LARGEST = 1e-3, NUM_TRAIN_TIMESTEPS**0.5
"""Range of the search for `shift`. Above it, a larger one lowers the levels again, because it also raises the smallest
value."""
TOLERANCE = 1e-6
"""Largest difference between a student's noise level and the scheduler's, which is rounded to float32."""


def levels_of(request: SampleRequest, flow_shift: float) -> list[float]:
    """Returns the noise levels of a request with a solver other than UniPC, descending, without the final 0."""
    if request.sigmas is not None:
        return list(request.sigmas)
    return list(ode_sigmas(request.num_steps, flow_shift).tolist()[:-1])


def exported_scheduler(request: SampleRequest, flow_shift: float) -> dict[str, Any]:
    """Returns the `scheduler_config.json` for a role that is sampled as `request` says; empty if no scheduler of
    diffusers has its noise levels."""
    if request.solver == "unipc":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": flow_shift}
        return {"_class_name": UNIPC, "num_train_timesteps": NUM_TRAIN_TIMESTEPS, **flow}
    found = _shift_and_terminal(levels_of(request, flow_shift))
    if found is None:
        return {}
    shift, terminal = found
    return {
        "_class_name": EULER,
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "shift": shift,
        "shift_terminal": terminal,
        "stochastic_sampling": request.solver == "sde",
    }


def _shift_and_terminal(levels: Sequence[float]) -> tuple[float, float | None] | None:
    """Returns the values of `shift` and `shift_terminal` with which the scheduler has these levels; None if there are
    none."""
    if abs(levels[0] - 1) > TOLERANCE:
        return None
    if len(levels) == 1:
        return 1.0, None
    low, high = SMALLEST, LARGEST
    for _ in range(200):
        shift = (low * high) ** 0.5
        if _levels(shift, len(levels), levels[-1])[1] < levels[1]:
            low = shift
        else:
            high = shift
    shift = 1.0 if len(levels) == 2 else (low * high) ** 0.5
    made = _levels(shift, len(levels), levels[-1])
    fits = all(abs(ours - level) <= TOLERANCE for ours, level in zip(made, levels, strict=True))
    return (shift, levels[-1]) if fits else None


def _levels(shift: float, num_steps: int, terminal: float) -> list[float]:
    """Returns the levels of diffusers' scheduler."""
    least = shift_sigma(1 / NUM_TRAIN_TIMESTEPS, shift)
    even = [1 - (1 - least) * index / (num_steps - 1) for index in range(num_steps)]
    shifted = [shift_sigma(value, shift) for value in even]
    stretch = (1 - terminal) / (1 - shifted[-1])
    return [1 - (1 - level) * stretch for level in shifted]
