"""Loss functions of the distillation methods: pure, tensors in, one number per sample out.

Every loss returns [B] and never averages over the batch. The trainer adds up samples of all micro-batches and ranks and
divides once by the global count, which is what makes a loss independent of how the batch was split. For the same reason
no statistic in here, DMD's normaliser above all, may look across samples.

All arithmetic is float64 and so is the result: latents are small beside activations, the differences below cancel, and
one rule is easier to trust than five. Gradients leave in the dtype of the tensor they belong to.

Shapes: tensors are [B, ...] with at least one dim after the batch. `mask`, if given, has as many dims and broadcasts to
them ([B, 1, F, 1, 1] leaves out parts of a sequence of F, say): 1 where an element counts, 0 where it does not.
Means run over counted elements only, and every sample needs one.
"""

from typing import Literal

import torch
from torch import Tensor

from titan_distill.diffusion.schedule import (
    broadcast_sigma,
    noise_from_velocity,
    trigonometric,
    trigonometric_velocity,
    velocity,
    x0_from_velocity,
)
from titan_distill.diffusion.transfer import to_device

CriticLoss = Literal["flow", "x0", "noise", "v", "trigflow"]
ConsistencyLoss = Literal["l2", "pseudo_huber"]
TangentForm = Literal["scm", "rcm"]

# Latents have unit scale: a mean distance below this is float32 rounding, and dividing by it would amplify only that.
NORMALISER_FLOOR = 1e-6

# Below this root mean square, a difference of x0 predictions counts by its square; iCT scales it with √(num_elements).
HUBER_WIDTH = 0.00054


def regression_loss(
    predicted: Tensor, target: Tensor, weight_B: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Return mean (predicted − target)² of each sample, [B], times `weight_B` [B] if given.

    With velocities and the target ε − x0 this is flow matching (2210.02747, eq. 23); with another model's velocity as
    the target it distils that model's whole flow. With x0 it regresses a trajectory's end (CausVid 2412.07772).
    """
    loss_B = _mean_per_sample((predicted.double() - target.double()) ** 2, mask)
    return loss_B if weight_B is None else loss_B * to_device(weight_B.double(), loss_B.device)


@torch.no_grad()
def dmd_direction(
    x_fake_score: Tensor,
    x_real_score: Tensor,
    x_generated: Tensor,
    normalise: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Return g, against which DMD moves a generated sample; float64, x_generated's shape, no graph.

    g = (x_fake − x_real) / mean |x_g − x_real|, with x_fake and x_real the x0 predictions of critic and teacher for one
    noised copy of x_g (DMD 2311.18828, eq. 7 and 8). The normaliser evens out noise levels, between which predictions
    differ by orders of magnitude; it belongs to each *sample*, since one scalar per batch would let the noisiest sample
    set the scale of all others. It is floored at NORMALISER_FLOOR. Non-finite scores give non-finite g, for the trainer
    to report. Masked elements are 0.
    """
    x_real = x_real_score.double()
    difference = x_fake_score.double() - x_real
    if mask is not None:
        difference = difference * mask
    if not normalise:
        return difference
    distance_B = _mean_per_sample((x_generated.double() - x_real).abs(), mask)
    return difference / broadcast_sigma(distance_B.clamp(min=NORMALISER_FLOOR), difference)


def dmd_loss(x_generated: Tensor, g: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return ½ mean (x_g − sg(x_g − g))² of each sample, [B]: a surrogate whose gradient in x_g is g / num_elements.

    Its value, ½ mean g², says nothing about convergence: watch mean |g|, the critic's loss and validation instead.
    """
    x = x_generated.double()
    target = (x - g).detach()
    return 0.5 * _mean_per_sample((x - target) ** 2, mask)


def critic_loss(
    kind: CriticLoss,
    v_pred: Tensor,
    x_noisy: Tensor,
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the critic's denoising loss of each sample, [B]; sigma [B] or broadcastable, x_noisy = (1 − σ) x0 + σ ε.

    The network predicts the velocity v in every case. The kinds compare different quantities derived from it, have the
    same minimum, and weigh noise levels differently:

        flow    v                           against ε − x0              factor 1
        x0      x_σ − σ v                   against x0                  factor σ²
        noise   x_σ + (1 − σ) v             against ε                   factor (1 − σ)²
        v       (1 − σ) ε̂ − σ x̂0            against (1 − σ) ε − σ x0    factor ((1 − σ)² + σ²)²
        trigflow  F = dx_t/dt               against cos t ε − sin t x0  factor (1 − σ)² + σ²

    where ε̂ and x̂0 are those of the lines above: "v" is the v-prediction of diffusion (2202.00512) with α = 1 − σ.
    "trigflow" is the same in trigonometric time (sCM 2410.11081), as rCM's critic regresses it.
    Raises ValueError for another kind.
    """
    v, x, x0, noise = v_pred.double(), x_noisy.double(), x0.double(), noise.double()
    if kind == "flow":
        error = v - velocity(x0, noise)
    elif kind == "x0":
        error = x0_from_velocity(x, v, sigma) - x0
    elif kind == "noise":
        error = noise_from_velocity(x, v, sigma) - noise
    elif kind == "v":
        level = broadcast_sigma(sigma, x)
        error = (1 - level) * (noise_from_velocity(x, v, sigma) - noise) - level * (x0_from_velocity(x, v, sigma) - x0)
    elif kind == "trigflow":
        cos, sin, _ = trigonometric(sigma, x)
        error = trigonometric_velocity(x, v, sigma) - (cos * noise - sin * x0)
    else:
        raise ValueError(f"unknown critic loss {kind!r}; choose 'flow', 'x0', 'noise', 'v' or 'trigflow'")
    return _mean_per_sample(error**2, mask)


def consistency_loss(kind: ConsistencyLoss, x0_pred: Tensor, x0_target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return how far two x0 predictions of one trajectory are apart, [B]; no gradient reaches the target.

    "l2" is m = mean (x0_θ − x0_target)²; "pseudo_huber" √(m + c²) − c with c = 0.00054, which is iCT's metric
    (2310.14189, §3.3) divided by √(num_elements): its gradient stays bounded where one teacher step led astray.
    """
    squared_B = _mean_per_sample((x0_pred.double() - x0_target.detach().double()) ** 2, mask)
    if kind == "l2":
        return squared_B
    if kind != "pseudo_huber":
        raise ValueError(f"unknown consistency loss {kind!r}; choose 'l2' or 'pseudo_huber'")
    return (squared_B + HUBER_WIDTH**2).sqrt() - HUBER_WIDTH


@torch.no_grad()
def consistency_tangent(
    form: TangentForm,
    x: Tensor,
    v: Tensor,
    v_teacher: Tensor,
    dv: Tensor,
    sigma: Tensor,
    ramp: float,
) -> Tensor:
    """Return g, towards which continuous-time consistency moves a student's F; float64, x's shape, no graph.

    F = dx_t/dt is the trigonometric velocity of `schedule.trigonometric_velocity`, and J = cos t sin t · dF/dt along
    the teacher's trajectory. With F_T the teacher's and r = `ramp`, which grows from 0 to 1 during the warm-up,

        scm   g = −cos² t (F − F_T) − r (cos t sin t · x_t + J)             sCM (2410.11081), algorithm 1
        rcm   g = −cos t √(1 − r² sin² t) (F − F_T) − (r cos t sin t · x_t + J)          rCM (2510.08431)

    Both are cos t · df/dt at r = 1, f being the predicted x0: g is zero where f is constant on trajectories.

    The arguments are those of rectified flow: `x` at noise level `sigma`, velocities `v` and `v_teacher` there, and
    `dv` the student's derivative along (dx, dσ) = (v_teacher, 1). There F − F_T = n (v − v_T) and, by the chain rule,
    x_t + dF/dt = n³ dv − (cos t − sin t) n² (v − v_T).
    """
    cos, sin, n = trigonometric(sigma, x)
    difference = n * (v.double() - v_teacher.double())
    curvature = n**3 * dv.double() - (cos - sin) * n * difference  # x_t + dF/dt
    if form == "scm":
        return -(cos**2) * difference - ramp * cos * sin * curvature
    if form != "rcm":
        raise ValueError(f"unknown tangent {form!r}; choose 'scm' or 'rcm'")
    scale = cos * (1 - (ramp * sin) ** 2).sqrt()
    return -scale * difference - cos * sin * (curvature - (1 - ramp) * x.double() / n)


def normalise_tangent(g: Tensor, floor: float = 0.1) -> Tensor:
    """Return g / (‖g‖ + floor), each sample by its own norm over all elements (sCM 2410.11081, §4.2)."""
    norm_B = torch.linalg.vector_norm(g.double().flatten(1), dim=1)
    return g.double() / broadcast_sigma(norm_B + floor, g)


def tangent_loss(output: Tensor, g: Tensor) -> Tensor:
    """Return ‖F − sg(F + g)‖² of each sample, [B]: a surrogate whose gradient in F is −2 g.

    A sum over elements and not their mean: normalised, g has norm one in any sample, large or small, and so has its
    gradient. The value, ‖g‖², says nothing about convergence: watch g before it is normalised.
    """
    output = output.double()
    return ((output - (output + g).detach()) ** 2).flatten(1).sum(1)


def _mean_per_sample(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over all dims but the batch, and over counted elements where there is a mask."""
    if mask is None:
        return values.flatten(1).mean(1)
    counted = mask.to(values).expand_as(values)
    return (values * counted).flatten(1).sum(1) / counted.flatten(1).sum(1)
