"""Losses against literal transcriptions of the formulas, analytic Gaussians, and mutants that must stand out."""

import pytest
import torch

from titan_distill.diffusion import schedule
from titan_distill.methods import losses

FP64 = torch.float64
SHAPE = (3, 4, 2, 5, 6)
KINDS = ("flow", "x0", "noise", "v", "trigflow")


def draw(seed, dtype=FP64):
    """Random tensors whose samples have unequal scales, so that statistics across the batch show."""
    scale_B = torch.tensor([0.5, 1.0, 4.0], dtype=FP64)[:, None, None, None, None]
    return (scale_B * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=FP64)).to(dtype)


def literal_direction(fake, real, generated):
    rows = []
    for b in range(len(generated)):
        distance = sum((generated[b] - real[b]).abs().flatten().tolist()) / generated[b].numel()
        rows.append((fake[b] - real[b]) / distance)
    return torch.stack(rows)


def literal_mean(squares):
    return torch.stack([row.sum() / row.numel() for row in squares])


def flow_matching_loss(v, x0, noise, weight_B=None, mask=None):
    return losses.regression_loss(v, schedule.velocity(x0.double(), noise.double()), weight_B, mask)


# ---- DMD ----


def test_dmd_equals_its_transcription_forward_and_gradient():
    fake, real, generated = draw(1), draw(2), draw(3).requires_grad_()
    g = losses.dmd_direction(fake, real, generated)
    expected = literal_direction(fake, real, generated.detach())
    assert not g.requires_grad and (g - expected).abs().max() < 1e-10

    loss_B = losses.dmd_loss(generated, g)
    literal_B = 0.5 * literal_mean((generated - (generated - expected).detach()) ** 2)
    assert loss_B.shape == (3,) and (loss_B - literal_B).abs().max() < 1e-10
    (gradient,) = torch.autograd.grad(loss_B.sum(), generated)
    (literal_gradient,) = torch.autograd.grad(literal_B.sum(), generated)
    assert (gradient - literal_gradient).abs().max() < 1e-10
    assert (gradient - expected / generated[0].numel()).abs().max() < 1e-12


DIRECTION_MUTANTS = {
    "one normaliser a batch": lambda f, r, x: (f - r) / (x - r).abs().mean(),
    "wrong sign": lambda f, r, x: (r - f) / (x - r).abs().flatten(1).mean(1).view(-1, 1, 1, 1, 1),
    "missing normaliser": lambda f, r, x: f - r,
    "normalised by the critic": lambda f, r, x: (f - r) / (x - f).abs().flatten(1).mean(1).view(-1, 1, 1, 1, 1),
    "root mean square": lambda f, r, x: (f - r) / (x - r).flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1, 1),
    "one normaliser a frame": lambda f, r, x: (f - r) / (x - r).abs().mean((1, 3, 4), keepdim=True),
}


@pytest.mark.parametrize("mutant", DIRECTION_MUTANTS)
def test_the_transcription_tells_mutants_apart(mutant):
    fake, real, generated = draw(1), draw(2), draw(3)
    wrong = DIRECTION_MUTANTS[mutant](fake, real, generated)
    assert (wrong - literal_direction(fake, real, generated)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dmd_is_fp64_even_for_low_precision_samples(dtype):
    """With |g| far below the spacing of x's numbers around x, x − (x − g) would be 0 in x's own precision."""
    generated = torch.full((1, 8), 100.0, dtype=dtype, requires_grad=True)
    g = torch.full((1, 8), 1e-6, dtype=dtype)
    loss_B = losses.dmd_loss(generated, g)
    assert loss_B.dtype == FP64 and loss_B.item() == pytest.approx(0.5e-12, rel=0.01)
    (gradient,) = torch.autograd.grad(loss_B.sum(), generated)
    assert gradient.dtype == dtype and gradient[0, 0].item() == pytest.approx(1e-6 / 8, rel=0.01)


def test_direction_of_one_sample_ignores_the_others():
    fake, real, generated = draw(1), draw(2), draw(3)
    whole = losses.dmd_direction(fake, real, generated)
    for b in range(3):
        alone = losses.dmd_direction(fake[b : b + 1], real[b : b + 1], generated[b : b + 1])
        assert torch.equal(alone, whole[b : b + 1])


def test_normaliser_has_a_floor_and_non_finite_scores_are_not_hidden():
    x = draw(1)
    assert torch.equal(losses.dmd_direction(x, x, x), torch.zeros_like(x))
    g = losses.dmd_direction(x + 1e-9, x, x)
    assert g.isfinite().all() and torch.allclose(g, torch.full_like(g, 1e-9 / losses.NORMALISER_FLOOR), rtol=1e-5)
    for bad in (float("nan"), float("inf")):
        broken = x.clone()
        broken[1, 0, 0, 0, 0] = bad
        finite_B = losses.dmd_direction(draw(2), broken, draw(3)).flatten(1).isfinite().all(1)
        assert finite_B.tolist() == [True, False, True]


# ---- DMD on Gaussians ----


def gaussian_velocity(x, sigma_B, mean, variance):
    """The velocity a perfect network predicts for data of law N(mean, variance)."""
    sigma = schedule.broadcast_sigma(sigma_B, x)
    gain = variance * (1 - sigma) / ((1 - sigma) ** 2 * variance + sigma**2)
    return (x - mean - gain * (x - (1 - sigma) * mean)) / sigma


def two_unequal_samples():
    """Generated samples of a law N(mean_b, variance), their noised copies and their noise levels."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([1.0, -3.0], dtype=FP64)[:, None, None]
    sigma_B = torch.tensor([0.3, 0.85], dtype=FP64)
    spread = torch.randn(2, 4, 5, generator=generator, dtype=FP64)
    noise = torch.randn(2, 4, 5, generator=generator, dtype=FP64)
    generated = mean + 0.7 * spread * torch.tensor([1.0, 0.2], dtype=FP64)[:, None, None]
    return generated, schedule.add_noise(generated, noise, sigma_B), sigma_B, mean, 0.49


def test_generator_with_the_teachers_law_gets_no_gradient():
    generated, x, sigma_B, mean, variance = two_unequal_samples()
    fake, real = (
        schedule.x0_from_velocity(x, gaussian_velocity(x, sigma_B, mean, variance), sigma_B) for _ in range(2)
    )
    for normalise in (True, False):
        assert losses.dmd_direction(fake, real, generated, normalise=normalise).abs().max() < 1e-12


def test_shifted_generator_gets_the_closed_form_direction():
    generated, x, sigma_B, mean, variance = two_unequal_samples()
    delta = torch.tensor([0.25, -1.5], dtype=FP64)[:, None, None]
    real = schedule.x0_from_velocity(x, gaussian_velocity(x, sigma_B, mean - delta, variance), sigma_B)
    fake = schedule.x0_from_velocity(x, gaussian_velocity(x, sigma_B, mean, variance), sigma_B)

    t = sigma_B[:, None, None]
    k = variance * (1 - t) / ((1 - t) ** 2 * variance + t**2)
    expected = ((1 - k * (1 - t)) * delta).expand_as(generated)
    assert (losses.dmd_direction(fake, real, generated, normalise=False) - expected).abs().max() < 1e-10

    teacher_x0 = (mean - delta) + k * (x - (1 - t) * (mean - delta))
    distance_B = torch.stack([(generated[b] - teacher_x0[b]).abs().sum() / 20 for b in range(2)])
    normalised = losses.dmd_direction(fake, real, generated)
    assert (normalised - expected / distance_B[:, None, None]).abs().max() < 1e-10
    assert (normalised - expected / distance_B.mean()).abs().max() > 1e-2  # what one normaliser a batch would give


# ---- flow matching and the critic ----


def literal_critic(kind, v, x, x0, noise, sigma):
    s = sigma[:, None, None, None, None]
    x0_pred, noise_pred = x - s * v, x + (1 - s) * v
    t = torch.atan(s / (1 - s))
    output = (t.cos() * (t.cos() + t.sin()) * x - x0_pred) / t.sin()  # of x_t = (cos t + sin t) x
    squares = {
        "flow": (v - (noise - x0)) ** 2,
        "x0": (x0_pred - x0) ** 2,
        "noise": (noise_pred - noise) ** 2,
        "v": (((1 - s) * noise_pred - s * x0_pred) - ((1 - s) * noise - s * x0)) ** 2,
        "trigflow": (output - (t.cos() * noise - t.sin() * x0)) ** 2,
    }
    return literal_mean(squares[kind])


FACTORS = {
    "flow": lambda s: torch.ones_like(s),
    "x0": lambda s: s**2,
    "noise": lambda s: (1 - s) ** 2,
    "v": lambda s: ((1 - s) ** 2 + s**2) ** 2,
    "trigflow": lambda s: (1 - s) ** 2 + s**2,
}


def critic_case():
    x0, noise, v = draw(1), draw(2), draw(3).requires_grad_()
    sigma = torch.tensor([0.1, 0.5, 0.95], dtype=FP64)
    return v, schedule.add_noise(x0, noise, sigma), x0, noise, sigma


@pytest.mark.parametrize("kind", KINDS)
def test_critic_equals_its_transcription_and_its_factor(kind):
    v, x, x0, noise, sigma = critic_case()
    loss_B, literal_B = losses.critic_loss(kind, v, x, x0, noise, sigma), literal_critic(kind, v, x, x0, noise, sigma)
    assert loss_B.shape == (3,) and (loss_B - literal_B).abs().max() < 1e-10
    (gradient,) = torch.autograd.grad(loss_B.sum(), v, retain_graph=True)
    (literal_gradient,) = torch.autograd.grad(literal_B.sum(), v)
    assert (gradient - literal_gradient).abs().max() < 1e-10
    flow_B = flow_matching_loss(v, x0, noise)
    assert torch.allclose(loss_B, FACTORS[kind](sigma) * flow_B, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_critic_is_zero_at_the_truth_and_only_there(kind):
    _, x, x0, noise, sigma = critic_case()
    assert losses.critic_loss(kind, noise - x0, x, x0, noise, sigma).max() < 1e-28
    assert losses.critic_loss(kind, x0 - noise, x, x0, noise, sigma).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_critic_takes_sigma_per_frame(kind):
    v, _, x0, noise, _ = critic_case()
    sigma = torch.rand(3, 1, 2, 1, 1, generator=torch.Generator().manual_seed(5), dtype=FP64)
    loss_B = losses.critic_loss(kind, v, schedule.add_noise(x0, noise, sigma), x0, noise, sigma)
    expected = literal_mean(FACTORS[kind](sigma) * (v - (noise - x0)) ** 2)
    assert torch.allclose(loss_B, expected, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_critic_loss_has_the_same_minimiser(kind):
    """One noisy sample may come from two pairs of x0 and ε: the best velocity is the mean of both targets."""
    _, x, x0, noise, sigma = critic_case()
    other_x0 = x0 + draw(4)
    other_noise = (x - (1 - sigma[:, None, None, None, None]) * other_x0) / sigma[:, None, None, None, None]
    targets = noise - x0, other_noise - other_x0
    best = ((targets[0] + targets[1]) / 2).requires_grad_()
    pairs = ((x0, noise), (other_x0, other_noise))
    total = sum(losses.critic_loss(kind, best, x, *pair, sigma).sum() for pair in pairs)
    (gradient,) = torch.autograd.grad(total, best)
    assert gradient.abs().max() < 1e-12
    moved = sum(losses.critic_loss(kind, best + 0.1, x, *pair, sigma).sum() for pair in pairs)
    assert moved > total


def test_an_unknown_critic_loss_is_named():
    with pytest.raises(ValueError, match="unknown critic loss 'eps'"):
        losses.critic_loss("eps", *critic_case())


def test_flow_matching_known_value_and_weight():
    v, x0, noise = torch.full((2, 3), 2.0), torch.zeros(2, 3), torch.ones(2, 3)
    noise[1] = 5.0
    assert flow_matching_loss(v, x0, noise).tolist() == [1.0, 9.0]
    weight_B = torch.tensor([0.5, 2.0], dtype=FP64)
    assert flow_matching_loss(v, x0, noise, weight_B).tolist() == [0.5, 18.0]


def test_low_precision_predictions_are_compared_in_fp64():
    v, x0, noise = draw(1, torch.bfloat16).requires_grad_(), draw(2, torch.float32), draw(3, torch.float32)
    loss_B = flow_matching_loss(v, x0, noise)
    exact = literal_mean((v.double() - (noise.double() - x0.double())) ** 2)
    assert loss_B.dtype == FP64 and (loss_B - exact).abs().max() < 1e-12
    loss_B.sum().backward()
    assert v.grad.dtype == torch.bfloat16


# ---- properties all losses share ----


def all_losses(v, x, x0, noise, sigma, mask=None):
    g = losses.dmd_direction(v, x, x0, mask=mask)
    yield flow_matching_loss(v, x0, noise, mask=mask)
    yield losses.dmd_loss(x0, g, mask=mask)
    yield from (losses.critic_loss(kind, v, x, x0, noise, sigma, mask=mask) for kind in KINDS)


def test_every_loss_of_a_sample_ignores_how_the_batch_was_split():
    case = [tensor.detach() for tensor in critic_case()]
    wholes = list(all_losses(*case))
    for b in range(3):
        for alone, whole in zip(all_losses(*(t[b : b + 1] for t in case)), wholes, strict=True):
            assert torch.equal(alone[0], whole[b])


def test_masking_frames_equals_cutting_them_out():
    case = [tensor.detach() for tensor in critic_case()]
    mask = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1).expand(3, 1, 2, 1, 1)
    cut = [tensor[:, :, 1:] if tensor.ndim == 5 else tensor for tensor in case]
    pairs = list(zip(all_losses(*case, mask=mask), all_losses(*cut), all_losses(*case), strict=True))
    for masked, expected, unmasked in pairs:
        assert torch.allclose(masked, expected, rtol=1e-12) and not torch.allclose(masked, unmasked, rtol=1e-3)
    g = losses.dmd_direction(*case[:3], mask=mask)
    assert (g[:, :, 0] == 0).all() and (g[:, :, 1] != 0).any()


def test_a_mask_may_differ_between_samples():
    v, x0, noise = draw(1), draw(2), draw(3)
    mask = torch.ones(3, 1, 2, 1, 1)
    mask[1, :, 0] = 0
    masked, whole = flow_matching_loss(v, x0, noise, mask=mask), flow_matching_loss(v, x0, noise)
    assert torch.allclose(masked[[0, 2]], whole[[0, 2]], rtol=1e-12)
    assert torch.allclose(masked[1], flow_matching_loss(v[1:2, :, 1:], x0[1:2, :, 1:], noise[1:2, :, 1:])[0])
