"""Samplers: from noise to a clean latent, by the ODE in many steps or by re-noising in a few.

`sample_ode` integrates dx/dσ = v(x, σ) from σ = 1 to 0. "unipc" (2302.04867) is the teacher's solver: second order, so
that some 50 steps are enough. "euler" is first order and has no memory, so it runs on any list of noise levels. On a
Gaussian with sd 0.4 at shift 5 and 48 steps, UniPC is 0.024 off at worst and Euler 0.135.

`sample_few_step` is what a distilled student runs: predict x0, add fresh noise down to the next level, predict again.
The student is trained to give good x0 from noised samples of its own, not to follow an ODE, hence the re-noising
(CausVid 2412.07772, Self-Forcing 2506.08009): fresh noise buries the errors that a deterministic step would carry on.

All samplers call a predictor with (x [B, ...], sigma_B: float64 [B], on the host), keep x in float32 (float64 if the
noise is), and build no autograd graph.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from titan_distill.diffusion.schedule import NUM_TRAIN_TIMESTEPS, add_noise, shift_sigma

Predictor = Callable[[Tensor, Tensor], Tensor]
Solver = Literal["euler", "unipc"]


def ode_sigmas(num_steps: int, shift: float) -> Tensor:
    """Return the noise levels of a many-step schedule, float64 [num_steps + 1], from 1.0 to 0.0, both exact."""
    _check_num_steps(num_steps)
    return shift_sigma(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)


def grid_sigmas(num_steps: int, shift: float, solver: Solver) -> Tensor:
    """Return the noise levels of the states of `sample_ode`, float64 [num_steps + 1]: the first is that of noise (UniPC
    puts it a millionth below 1), the last is 0. Raises ValueError for an unknown solver."""
    if solver == "unipc":
        return _unipc_scheduler(num_steps, shift).sigmas.double()
    if solver != "euler":
        raise ValueError(f"unknown solver {solver!r}; choose 'euler' or 'unipc'")
    return ode_sigmas(num_steps, shift)


@torch.no_grad()
def sample_ode(
    predict_velocity: Predictor,
    noise: Tensor,
    *,
    num_steps: int,
    shift: float,
    solver: Solver,
    sigmas: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Integrate the probability-flow ODE from `noise` [B, ...] and return x0 of the same shape.

    "euler" walks `ode_sigmas(num_steps, shift)`, or `sigmas`: num_steps levels, descending and already shifted, to
    which 0 is appended. "unipc" does what diffusers' WanPipeline does, see `_sample_unipc`; it needs [B, C, ...].
    Either calls the predictor num_steps times.
    Raises ValueError for an unknown solver, for `sigmas` with another than "euler", or when `sigmas` is not `num_steps`
    long.
    """
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    if sigmas is not None and solver != "euler":
        raise ValueError(f"solver {solver!r} makes its own grid; use solver 'euler' with an explicit list of sigmas")
    if solver == "unipc":
        return _sample_unipc(predict_velocity, x, num_steps, shift)
    grid = grid_sigmas(num_steps, shift, solver).tolist() if sigmas is None else [*map(float, sigmas), 0.0]
    if len(grid) != num_steps + 1:
        raise ValueError(f"num_steps is {num_steps} but sigmas lists {len(grid) - 1} levels; make them agree")
    for sigma, next_sigma in pairwise(grid):
        v = predict_velocity(x, _per_sample(sigma, x))
        x = x + (next_sigma - sigma) * v.to(x.dtype)
    return x


@torch.no_grad()
def sample_few_step(
    predict_x0: Predictor, noise: Tensor, sigmas: Sequence[float] | Tensor, renoise: Callable[[int], Tensor]
) -> Tensor:
    """Run a few-step student on K descending noise levels and return its last x0 prediction, [B, ...] like `noise`.

    `renoise(i)` gives the fresh noise that takes the prediction of step i to level i + 1, for i = 0 … K − 2 in turn.
    """
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    levels = [_per_sample(float(sigma), x) for sigma in sigmas]
    x0 = predict_x0(x, levels[0])
    for i, sigma_B in enumerate(levels[1:]):
        x = add_noise(x0.to(x.dtype), renoise(i), sigma_B)
        x0 = predict_x0(x, sigma_B)
    return x0.to(x.dtype)


def _sample_unipc(predict_velocity: Predictor, x: Tensor, num_steps: int, shift: float) -> Tensor:
    """Drive diffusers' scheduler as WanPipeline does: an exported folder gives the same video from the same noise.

    That includes two traits of diffusers: its grid is spaced towards u = 1/1000 rather than 0, and it hands the model a
    timestep truncated to an integer (937 where its own σ is 0.9376). The predictor therefore receives timestep / 1000
    as sigma, which `schedule.timestep` turns back into the very same number. It is up to 0.001 below the σ of x, so a
    predictor must return the model's velocity as it is, never one that went through x0.
    """
    scheduler = _unipc_scheduler(num_steps, shift)
    scheduler.set_begin_index(0)
    for t in scheduler.timesteps:
        v = predict_velocity(x, (t.double() / NUM_TRAIN_TIMESTEPS).expand(len(x)))
        x = scheduler.step(v, t, x, return_dict=False)[0]
    return x


def _unipc_scheduler(num_steps: int, shift: float) -> Any:
    from diffusers import UniPCMultistepScheduler  # seconds to import, and only the teacher's sampler needs it

    _check_num_steps(num_steps)
    scheduler = UniPCMultistepScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )
    scheduler.set_timesteps(num_steps, device="cpu")  # where noise levels are
    return scheduler


def _per_sample(sigma: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), sigma, dtype=torch.float64)


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, got {num_steps}")
