"""Sigma, timestep, shift and guidance: every convention of this project, stated once.

Rectified flow joins a clean latent x0 and Gaussian noise ε by a straight line,

    x_σ = (1 − σ) x0 + σ ε,        v = dx/dσ = ε − x0,        x0 = x_σ − σ v,        ε = x_σ + (1 − σ) v,

and Wan predicts the velocity v. σ is 0 for data and 1 for pure noise; the model sees the timestep t = 1000 σ. A video
has so many correlated pixels that it stays recognisable at noise levels that destroy an image, so schedules are pushed
towards noise by a *shift* s: a uniform u becomes σ = s u / (1 + (s − 1) u). There is one shift in a run,
`pipeline_config.flow_shift`. Students, teachers and critics that disagree about it by a wrapper's default lose quality
without an error (5 against 8 is 19 % in σ at t = 20), and so nothing here has a default shift.

σ is continuous: no lookup of the nearest of 1000 grid points. And it is never rounded: bfloat16 has no number between
936 and 940, so a bfloat16 timestep turns 937.5 into 936, and an integer one turns 833.3 into 833; both happen in public
code. σ is float64, t is float32, and conversions run in float64 whatever the latents are: x_σ − σ v cancels at small σ.

Noise levels stay on the host, whatever device latents are on: they are drawn there, and a model of two experts chooses
by them without asking the GPU. `broadcast_sigma` copies them to the latents' device, and the host does not wait.

Shapes: `x`, `x0`, `v`, `noise` are [B, ...], for video [B, C, F, H, W]. `sigma` is a scalar tensor, [B] (one noise
level per sample), or broadcastable to x with as many dims ([B, 1, F, 1, 1]: a level per frame, as image-to-video
needs).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal, TypeVar

import torch
from torch import Tensor

from titan_distill.diffusion.transfer import to_device

NUM_TRAIN_TIMESTEPS = 1000

GuidanceForm = Literal["standard", "offset"]
ClampOrder = Literal["after_shift", "resample"]
TrainingDistribution = Literal["uniform", "logit_normal"]
FloatOrTensor = TypeVar("FloatOrTensor", float, Tensor)


def shift_sigma(u: FloatOrTensor, shift: float) -> FloatOrTensor:
    """Map unshifted positions u in [0, 1] to noise levels σ = s u / (1 + (s − 1) u).

    Tensors are computed and returned in float64. Raises ValueError unless shift > 0. Source: SD3 (2403.03206), eq. 23.
    """
    _check_shift(shift)
    exact = u.double() if isinstance(u, Tensor) else u
    return shift * exact / (1 + (shift - 1) * exact)


def unshift_sigma(sigma: FloatOrTensor, shift: float) -> FloatOrTensor:
    """Invert `shift_sigma`: the u in [0, 1] at which a schedule of this shift reaches σ."""
    _check_shift(shift)
    exact = sigma.double() if isinstance(sigma, Tensor) else sigma
    return exact / (shift - (shift - 1) * exact)


def timestep(sigma: Tensor) -> Tensor:
    """Return the model's timestep t = 1000 σ in float32, with sigma's shape."""
    assert sigma.dtype in (torch.float32, torch.float64), f"sigma arrived already rounded to {sigma.dtype}"
    return (sigma.double() * NUM_TRAIN_TIMESTEPS).float()


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return x_σ = (1 − σ) x0 + σ ε in x0's dtype."""
    level = broadcast_sigma(sigma, x0)
    return ((1 - level) * x0.double() + level * noise.double()).to(x0.dtype)


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """Return v = ε − x0, the target of flow matching."""
    return noise - x0


def x0_from_velocity(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Return x0 = x_σ − σ v in x's dtype."""
    return (x.double() - broadcast_sigma(sigma, x) * v.double()).to(x.dtype)


def noise_from_velocity(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Return ε = x_σ + (1 − σ) v in x's dtype."""
    return (x.double() + (1 - broadcast_sigma(sigma, x)) * v.double()).to(x.dtype)


def velocity_from_x0(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Return v = (x_σ − x0) / σ in x's dtype. Needs σ > 0: at σ = 0, x is x0 and says nothing about v."""
    return ((x.double() - x0.double()) / broadcast_sigma(sigma, x)).to(x.dtype)


def broadcast_sigma(sigma: Tensor, x: Tensor) -> Tensor:
    """Return sigma in float64 on x's device, shaped to multiply x: a [B] becomes [B, 1, ..., 1]."""
    sigma = to_device(sigma.double(), x.device)
    if sigma.ndim == 1:
        assert len(sigma) == len(x), f"{len(sigma)} noise levels for a batch of {len(x)}"
        return sigma.reshape(-1, *[1] * (x.ndim - 1))
    assert sigma.ndim in (0, x.ndim), f"sigma {tuple(sigma.shape)} does not broadcast to x {tuple(x.shape)}"
    return sigma


def neighbouring_sigmas(u: Tensor, num_steps: int, shift: float) -> tuple[Tensor, Tensor]:
    """Turn uniform draws u in [0, 1) into neighbours of the shifted grid of `num_steps` steps: (σ_n, σ_{n−1}), σ_n >
    σ_{n−1} ≥ 0, each pair equally likely; float64, shape of u. The grid is `sampler.ode_sigmas`, whose ends are 1 and
    0."""
    index = (u.double() * num_steps).floor().clamp(max=num_steps - 1)
    return shift_sigma((index + 1) / num_steps, shift), shift_sigma(index / num_steps, shift)


def euler_step(x: Tensor, v: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """Return x at `next_sigma`, one step of dx/dσ = v from `sigma`, in x's dtype. On straight lines it is DDIM's."""
    step = broadcast_sigma(next_sigma, x) - broadcast_sigma(sigma, x)
    return (x.double() + step * v.double()).to(x.dtype)


def trigonometric(sigma: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return cos t, sin t and n of the trigonometric time t = atan(σ / (1 − σ)), float64, shaped to multiply x.

    There x_t = cos t · x0 + sin t · ε has constant variance (for data of unit variance); it is the same point as x_σ on
    another scale, x_σ = n x_t with n = 1 / (cos t + sin t). Source: sCM (2410.11081), §3; rCM (2510.08431).
    """
    level = broadcast_sigma(sigma, x)
    n = ((1 - level) ** 2 + level**2).sqrt()
    return (1 - level) / n, level / n, n


def trigonometric_velocity(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Return F = dx_t/dt, float64, of a model that predicts v at x_σ: x0 = cos t · x_t − sin t · F.

    F = (1 − 2σ) / n · x_σ + n v, which does not divide by a vanishing sin t.
    """
    cos, sin, n = trigonometric(sigma, x)
    return (cos - sin) * x.double() + n * v.double()


def few_step_sigmas(steps: Sequence[float], shift: float, warp: bool) -> Tensor:
    """Turn a recipe's few-step list, such as [1000, 750, 500, 250], into descending noise levels, float64 [K].

    With `warp`, entry d names the (1000 − d)-th entry of the shifted 1000-step schedule: σ = shift_sigma(d / 1000), so
    that shift 5 gives t = 1000, 937.5, 833.3, 625. Without, entries are timesteps as they stand: the popular
    [1000, 757, 522] is already warped (by shift 8), and warping it again would skip the low-noise half.
    Raises ValueError unless steps are strictly descending in (0, 1000].
    """
    listed = [float(step) for step in steps]
    if not listed:
        raise ValueError("the few-step list is empty; give at least one step, for example [1000]")
    outside = [step for step in listed if not 0 < step <= NUM_TRAIN_TIMESTEPS]
    if outside:
        raise ValueError(f"few-step entry {outside[0]:g} lies outside (0, {NUM_TRAIN_TIMESTEPS}]; got {listed}")
    for earlier, later in pairwise(listed):
        if later >= earlier:
            raise ValueError(f"few-step list must descend strictly, but {later:g} follows {earlier:g} in {listed}")
    u_K = torch.tensor(listed, dtype=torch.float64) / NUM_TRAIN_TIMESTEPS
    return shift_sigma(u_K, shift) if warp else u_K


def score_sigma(
    u: Tensor, *, low: float, high: float, shift: float, min_step: float, max_step: float, clamp: ClampOrder
) -> Tensor:
    """Turn uniform draws u in [0, 1) into the noise levels at which DMD compares two scores; float64, shape of u.

    `low` and `high` bound the *unshifted* position; `min_step` and `max_step` (timesteps, 20 and 980 by habit) bound
    the result. "after_shift" shifts and then clamps, as Self-Forcing does: at shift 5 this piles 9.3 % of the mass on
    t = 980 (9.2 % on their 1000-point grid). "resample" shrinks [low, high] to the part whose shifted value is inside
    the bounds: the law a rejection sampler would give, still from one draw.
    Raises ValueError when that part is empty.
    """
    sigma_min, sigma_max = min_step / NUM_TRAIN_TIMESTEPS, max_step / NUM_TRAIN_TIMESTEPS
    if clamp == "after_shift":
        return shift_sigma(low + (high - low) * u.double(), shift).clamp(sigma_min, sigma_max)
    if clamp != "resample":
        raise ValueError(f"unknown clamp {clamp!r}; choose 'after_shift' or 'resample'")
    inner_low = max(low, unshift_sigma(sigma_min, shift))
    inner_high = min(high, unshift_sigma(sigma_max, shift))
    if inner_low > inner_high:
        raise ValueError(
            f"no score time in [{low:g}, {high:g}] at shift {shift:g} falls inside steps [{min_step:g}, {max_step:g}]; "
            "widen min_step / max_step, or use clamp = 'after_shift'"
        )
    # Shifting rounds in the last digit, so the promise "inside the bounds" still needs the clamp; it moves no mass.
    return shift_sigma(inner_low + (inner_high - inner_low) * u.double(), shift).clamp(sigma_min, sigma_max)


def training_sigma(
    u: Tensor, *, distribution: TrainingDistribution, shift: float, logit_mean: float, logit_std: float
) -> Tensor:
    """Turn uniform draws u in [0, 1) into flow-matching noise levels; float64, shape of u.

    "logit_normal" sends u through the normal quantile and a sigmoid, so that one keyed uniform is all that a sample
    needs under either law; `logit_mean` and `logit_std` belong to it alone. Source: SD3 (2403.03206), §3.1.
    """
    u = u.double()
    if distribution == "logit_normal":
        u = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(u))
    elif distribution != "uniform":
        raise ValueError(f"unknown training distribution {distribution!r}; choose 'uniform' or 'logit_normal'")
    return shift_sigma(u, shift)


def bell_weight(sigma: Tensor, shift: float = 1.0) -> Tensor:
    """Return Self-Forcing's loss weight, a bell over t: w ∝ exp(−2 ((t − 500) / 1000)²) − min; float64, shape of sigma.

    It is zero at t = 0 and t = 1000 and has mean 1 over the 1000 grid points of a schedule of this `shift`: pass the
    training shift, so that the weighting leaves the average loss, and with it the learning rate, where it was.
    """
    return (_bell(sigma.double() * NUM_TRAIN_TIMESTEPS) - math.exp(-0.5)) / _bell_grid_mean(shift)


def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor, form: GuidanceForm) -> Tensor:
    """Apply classifier-free guidance, x = u + w (c − u), to velocities or x0 predictions (2207.12598).

    "offset" reads `scale` as CausVid and Self-Forcing write it, c + w' (c − u), which is w = w' + 1. Copying their 3.0
    into the standard form would guide with 3 where they guide with 4.
    """
    return uncond + standard_scale(scale, form) * (cond - uncond)


def guidance_is_identity(scale: float, form: GuidanceForm) -> bool:
    """Say whether guidance returns `cond` unchanged, so that the unconditional forward can be spared."""
    return bool(standard_scale(scale, form) == 1.0)


def standard_scale(scale: float | Tensor, form: GuidanceForm) -> float | Tensor:
    """Return a guidance scale as the standard form states it."""
    if form == "standard":
        return scale
    if form == "offset":
        return scale + 1.0
    raise ValueError(f"unknown guidance form {form!r}; choose 'standard' or 'offset'")


def _check_shift(shift: float) -> None:
    if not shift > 0:
        raise ValueError(f"flow_shift must be positive, got {shift}; 1 leaves the schedule unshifted, 3 to 8 are usual")


def _bell(t: Tensor) -> Tensor:
    return torch.exp(-2 * ((t - NUM_TRAIN_TIMESTEPS / 2) / NUM_TRAIN_TIMESTEPS) ** 2)


@lru_cache
def _bell_grid_mean(shift: float) -> float:
    """Mean of the bell above its minimum exp(−1/2), which every shifted grid reaches at its first point, t = 1000."""
    grid = shift_sigma(torch.arange(1, NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float64) / NUM_TRAIN_TIMESTEPS, shift)
    return float((_bell(grid * NUM_TRAIN_TIMESTEPS) - math.exp(-0.5)).mean())
