"""The schedule against known values, literal transcriptions and, for guidance, Gaussians with a closed form."""

import math

import pytest
import torch

from titan_distill.diffusion import schedule

FP64 = torch.float64


def video(*, seed: int, frames: int = 3, dtype: torch.dtype = FP64) -> torch.Tensor:
    return torch.randn(2, 4, frames, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(dtype)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 8.0])
def test_unshift_inverts_shift_and_both_keep_the_ends(shift):
    u = torch.linspace(0, 1, 101, dtype=FP64)
    sigma = schedule.shift_sigma(u, shift)
    assert sigma[0] == 0 and sigma[-1] == 1 and (sigma.diff() > 0).all()
    assert torch.allclose(schedule.unshift_sigma(sigma, shift), u, atol=1e-14)
    assert schedule.shift_sigma(0.25, shift) == pytest.approx(float(sigma[25]), abs=1e-15)


def test_shift_computes_in_fp64_whatever_comes_in():
    assert schedule.shift_sigma(torch.tensor(0.75), 5.0).dtype == FP64
    assert schedule.unshift_sigma(torch.tensor(0.75), 5.0).dtype == FP64


@pytest.mark.parametrize("shift", [0.0, -3.0, math.nan])
def test_shift_must_be_positive(shift):
    with pytest.raises(ValueError, match="flow_shift must be positive"):
        schedule.shift_sigma(0.5, shift)


def test_timestep_is_never_rounded_down():
    sigma = torch.tensor([0.9375, 2.5 / 3, 0.625], dtype=FP64)
    t = schedule.timestep(sigma)
    assert t.dtype == torch.float32
    assert t[0] == 937.5 and abs(t[1].item() - 833.3333) < 1e-4
    with pytest.raises(AssertionError, match="already rounded"):
        schedule.timestep(sigma.bfloat16())


@pytest.mark.parametrize("per_frame", [False, True])
def test_conversions_agree_with_the_definitions(per_frame):
    x0, noise = video(seed=1), video(seed=2)
    sigma = torch.tensor([0.02, 0.9], dtype=FP64)
    if per_frame:
        sigma = torch.rand(2, 1, 3, 1, 1, dtype=FP64, generator=torch.Generator().manual_seed(3)) * 0.9 + 0.05
    level = sigma if per_frame else sigma[:, None, None, None, None]
    x, v = schedule.add_noise(x0, noise, sigma), schedule.velocity(x0, noise)
    assert torch.equal(x, (1 - level) * x0 + level * noise)
    assert torch.equal(v, noise - x0)
    assert torch.allclose(schedule.x0_from_velocity(x, v, sigma), x0, atol=1e-14)
    assert torch.allclose(schedule.noise_from_velocity(x, v, sigma), noise, atol=1e-14)
    assert torch.allclose(schedule.velocity_from_x0(x, x0, sigma), v, atol=1e-12)


def test_per_frame_sigma_leaves_a_clean_first_frame_clean():
    x0, noise = video(seed=1), video(seed=2)
    sigma = torch.full((2, 1, 3, 1, 1), 0.7, dtype=FP64)
    sigma[:, :, 0] = 0
    x = schedule.add_noise(x0, noise, sigma)
    assert torch.equal(x[:, :, 0], x0[:, :, 0]) and not torch.allclose(x[:, :, 1], x0[:, :, 1])
    assert torch.equal(schedule.x0_from_velocity(x, video(seed=3), sigma)[:, :, 0], x0[:, :, 0])


def test_conversion_rounds_once():
    """fp32 in, fp32 out, but the result is the fp64 result rounded: at σ = 0.999, x − σ v cancels almost everything."""
    x, v = video(seed=1, dtype=torch.float32), video(seed=2, dtype=torch.float32)
    sigma = torch.tensor([0.999, 1 / 3], dtype=FP64)
    exact = x.double() - sigma[:, None, None, None, None] * v.double()
    got = schedule.x0_from_velocity(x, v, sigma)
    assert got.dtype == torch.float32 and torch.equal(got, exact.float())
    assert not torch.equal(got, x - sigma.float()[:, None, None, None, None] * v)


def test_sigma_of_the_wrong_length_is_refused():
    with pytest.raises(AssertionError, match="3 noise levels for a batch of 2"):
        schedule.add_noise(video(seed=1), video(seed=2), torch.rand(3, dtype=FP64))


@pytest.mark.parametrize(
    ("shift", "expected"), [(5.0, [1000, 937.5, 2500 / 3, 625]), (8.0, [1000, 960, 8000 / 9, 8000 / 11])]
)
def test_warp_examples(shift, expected):
    warped = schedule.few_step_sigmas([1000, 750, 500, 250], shift, warp=True)
    assert warped.dtype == FP64
    assert torch.allclose(warped * 1000, torch.tensor(expected, dtype=FP64), atol=1e-10)
    plain = schedule.few_step_sigmas([1000, 757, 522], shift, warp=False)
    assert plain.tolist() == [1.0, 0.757, 0.522]


def test_warp_indexes_the_shifted_schedule():
    shifted = schedule.shift_sigma(torch.linspace(1, 0, 1001, dtype=FP64), 5.0)
    steps = [1000, 640, 37, 1]
    expected = torch.stack([shifted[1000 - d] for d in steps])
    assert torch.allclose(schedule.few_step_sigmas(steps, 5.0, warp=True), expected, atol=1e-13)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "empty"),
        ([1000, 750, 750], "750 follows 750"),
        ([500, 1000], "1000 follows 500"),
        ([1000, 0], "entry 0 lies outside"),
        ([1001, 500], "entry 1001 lies outside"),
        ([1000, math.nan], "entry nan lies outside"),
    ],
)
def test_bad_few_step_lists_are_named(steps, message):
    with pytest.raises(ValueError, match=message):
        schedule.few_step_sigmas(steps, 5.0, warp=True)


SCORE = {"low": 0.0, "high": 1.0, "shift": 5.0, "min_step": 20, "max_step": 980}


def test_clamping_after_the_shift_piles_mass_on_980_and_resampling_does_not():
    u = (torch.arange(100_000, dtype=FP64) + 0.5) / 100_000
    theirs = schedule.score_sigma(u, **SCORE, clamp="after_shift")
    assert float((theirs == 0.98).double().mean()) == pytest.approx(1 - 0.98 / 1.08, abs=1e-4)
    grid = torch.arange(1000, dtype=FP64) / 1000
    on_their_grid = schedule.score_sigma(grid, **SCORE, clamp="after_shift") == 0.98
    assert float(on_their_grid.double().mean()) == pytest.approx(0.092, abs=1e-12)
    ours = schedule.score_sigma(u, **SCORE, clamp="resample")
    assert ((ours == 0.98) | (ours == 0.02)).sum() == 0
    assert 0.02 < ours.min() < 0.0201 and 0.9799 < ours.max() < 0.98


def test_resampling_has_the_law_of_rejection():
    u = (torch.arange(200_000, dtype=FP64) + 0.5) / 200_000
    bounds = {"low": 0.1, "high": 0.95, "shift": 3.0, "min_step": 300, "max_step": 970}
    shifted = schedule.shift_sigma(0.1 + 0.85 * u, 3.0)
    kept = shifted[(shifted > 0.3) & (shifted < 0.97)]
    quantiles = torch.linspace(0.05, 0.95, 19, dtype=FP64)
    ours = schedule.score_sigma(u[:100_000], **bounds, clamp="resample")
    assert not torch.allclose(ours.quantile(quantiles), kept[:100_000].quantile(quantiles), atol=1e-3)  # half of u
    ours = schedule.score_sigma(u, **bounds, clamp="resample")
    assert torch.allclose(ours[::4].quantile(quantiles), kept[::4].quantile(quantiles), atol=1e-4)


def test_score_bounds_hold_at_the_ends_and_an_empty_interval_is_refused():
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=FP64)
    for clamp in ("after_shift", "resample"):
        sigma = schedule.score_sigma(ends, **SCORE, clamp=clamp)
        assert sigma.min() >= 0.02 and sigma.max() <= 0.98
        inside = schedule.score_sigma(ends, **SCORE | {"low": 0.25, "high": 0.5}, clamp=clamp)
        assert torch.allclose(inside * 1000, torch.tensor([625.0, 2500 / 3], dtype=FP64), atol=1e-9)
    with pytest.raises(ValueError, match="falls inside steps"):
        schedule.score_sigma(ends, **SCORE | {"low": 0.99}, clamp="resample")
    with pytest.raises(ValueError, match="unknown clamp 'none'"):
        schedule.score_sigma(ends, **SCORE, clamp="none")


def test_training_sigma_laws():
    u = (torch.arange(100_000, dtype=FP64) + 0.5) / 100_000
    law = {"shift": 5.0, "logit_mean": 0.4, "logit_std": 1.3}
    uniform = schedule.training_sigma(u, distribution="uniform", **law)
    assert torch.equal(uniform, schedule.shift_sigma(u, 5.0))
    logit_normal = schedule.training_sigma(u, distribution="logit_normal", **law)
    logit = torch.logit(schedule.unshift_sigma(logit_normal, 5.0))
    assert float(logit.mean()) == pytest.approx(0.4, abs=1e-3) and float(logit.std()) == pytest.approx(1.3, abs=1e-3)
    zero = torch.zeros(1, dtype=FP64)
    assert schedule.training_sigma(zero, distribution="logit_normal", **law).isfinite().all()
    with pytest.raises(ValueError, match="unknown training distribution 'beta'"):
        schedule.training_sigma(u, distribution="beta", **law)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_bell_weight_is_its_transcription_with_mean_one(shift):
    t = 1000 * schedule.shift_sigma(torch.arange(1, 1001, dtype=FP64) / 1000, shift)
    y = torch.exp(-2 * ((t - 500) / 1000) ** 2)
    expected = (y - y.min()) * 1000 / (y - y.min()).sum()
    weight = schedule.bell_weight(t / 1000, shift)
    assert torch.allclose(weight, expected, atol=1e-12)
    assert float(weight.mean()) == pytest.approx(1.0, abs=1e-12)
    ends = schedule.bell_weight(torch.tensor([0.0, 1.0], dtype=FP64), shift)
    assert ends.abs().max() < 1e-12 and weight.min() > -1e-12


def gaussian_x0(x, sigma, mean, variance):
    """E[x0 | x_σ] for x0 ~ N(mean, variance): the prediction of a perfect network."""
    gain = variance * (1 - sigma) / ((1 - sigma) ** 2 * variance + sigma**2)
    return mean + gain * (x - (1 - sigma) * mean)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.0])
def test_guiding_gaussians_of_equal_variance_gives_the_extrapolated_gaussian(scale):
    """Reading a "standard" scale in the offset form moves the mean by exactly μc − μu."""
    x, sigma, variance, mean_c, mean_u = video(seed=4), 0.6, 0.49, 1.0, -0.5
    cond, uncond = gaussian_x0(x, sigma, mean_c, variance), gaussian_x0(x, sigma, mean_u, variance)

    def mean_error(guided):
        """A prediction is affine in the mean with slope 1 − k (1 − σ): return the implied mean, less the true one."""
        gain = variance * (1 - sigma) / ((1 - sigma) ** 2 * variance + sigma**2)
        truth = gaussian_x0(x, sigma, mean_u + scale * (mean_c - mean_u), variance)
        return (guided - truth) / (1 - gain * (1 - sigma))

    assert mean_error(schedule.guide(cond, uncond, scale, "standard")).abs().max() < 1e-14
    assert mean_error(schedule.guide(cond, uncond, scale - 1, "offset")).abs().max() < 1e-14
    off_by_one = mean_error(schedule.guide(cond, uncond, scale, "offset"))
    assert torch.allclose(off_by_one, torch.full_like(x, mean_c - mean_u), atol=1e-13)


def test_guidance_identity_is_when_the_unconditional_forward_can_be_spared():
    cond, uncond = video(seed=1), video(seed=2)
    for form, identity in (("standard", 1.0), ("offset", 0.0)):
        assert schedule.guidance_is_identity(identity, form)
        assert not schedule.guidance_is_identity(1.0 - identity, form)
        assert torch.allclose(schedule.guide(cond, uncond, identity, form), cond, atol=1e-15)
    with pytest.raises(ValueError, match="unknown guidance form 'cfg'"):
        schedule.guidance_is_identity(1.0, "cfg")
