"""Samplers on a Gaussian, whose velocity and flow map have closed forms, and UniPC against diffusers itself."""

from itertools import pairwise

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from titan_distill.diffusion import sampler, schedule
from titan_distill.diffusion.noise import KeyedNoise

FP64 = torch.float64
MEAN, STD, SHIFT = 1.5, 0.4, 5.0


def gaussian_x0(x, sigma_B):
    """E[x0 | x_σ] for x0 ~ N(MEAN, STD²): what a perfect network predicts."""
    sigma = schedule.broadcast_sigma(sigma_B, x)
    gain = STD**2 * (1 - sigma) / ((1 - sigma) ** 2 * STD**2 + sigma**2)
    return MEAN + gain * (x - (1 - sigma) * MEAN)


class Spy:
    """A perfect velocity network that records what it is asked."""

    def __init__(self):
        self.sigmas, self.dtypes, self.grad_modes = [], [], []

    def __call__(self, x, sigma_B):
        assert sigma_B.shape == (len(x),) and sigma_B.dtype == FP64
        self.sigmas.append(sigma_B[0].item())
        self.dtypes.append(x.dtype)
        self.grad_modes.append(torch.is_grad_enabled())
        return schedule.velocity_from_x0(x, gaussian_x0(x, sigma_B), sigma_B)


def gaussian_noise(dtype=FP64):
    return torch.randn(3, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=FP64).to(dtype)


def error(num_steps, solver):
    """Largest distance to the exact end point of the ODE, x0 = MEAN + STD · noise."""
    noise = gaussian_noise()
    x0 = sampler.sample_ode(Spy(), noise, num_steps=num_steps, shift=SHIFT, solver=solver)
    return float((x0 - (MEAN + STD * noise)).abs().max())


def test_ode_sigmas_reach_both_ends_exactly():
    grid = sampler.ode_sigmas(4, 5.0)
    assert grid.dtype == FP64 and grid[0] == 1.0 and grid[-1] == 0.0
    assert torch.allclose(grid * 1000, torch.tensor([1000, 937.5, 2500 / 3, 625, 0], dtype=FP64), atol=1e-10)
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        sampler.ode_sigmas(0, 5.0)


def test_euler_converges_at_first_order_to_the_exact_flow_map():
    errors = [error(num_steps, "euler") for num_steps in (50, 100, 200, 400)]
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert errors[-1] < 0.02
    assert all(1.8 < ratio < 2.2 for ratio in ratios), ratios


def test_euler_visits_the_grid_once_without_grad():
    spy = Spy()
    noise = gaussian_noise(torch.bfloat16).requires_grad_()
    x0 = sampler.sample_ode(spy, noise, num_steps=4, shift=SHIFT, solver="euler")
    assert spy.sigmas == sampler.ode_sigmas(4, SHIFT)[:-1].tolist()
    assert set(spy.grad_modes) == {False} and not x0.requires_grad
    assert set(spy.dtypes) == {torch.float32} and x0.dtype == torch.float32


def test_euler_on_an_explicit_list():
    spy, sigmas = Spy(), schedule.few_step_sigmas([1000, 757, 522], SHIFT, warp=False)
    noise = gaussian_noise()
    x0 = sampler.sample_ode(spy, noise, num_steps=3, shift=SHIFT, solver="euler", sigmas=sigmas)
    assert spy.sigmas == [1.0, 0.757, 0.522]
    x = noise
    for sigma, following in ((1.0, 0.757), (0.757, 0.522), (0.522, 0.0)):
        level = torch.full((3,), sigma, dtype=FP64)
        x = x + (following - sigma) * (x - gaussian_x0(x, level)) / sigma
    assert torch.allclose(x0, x, atol=1e-12)


def test_unipc_is_more_accurate_than_euler_at_equal_steps():
    for num_steps, at_most in ((16, 0.9), (24, 0.7), (48, 0.25)):
        assert error(num_steps, "unipc") < at_most * error(num_steps, "euler")


@pytest.mark.parametrize("num_steps", [1, 2, 9, 48])
def test_unipc_is_diffusers_scheduler_driven_by_hand(num_steps):
    noise, spy = gaussian_noise(torch.float32), Spy()
    got = sampler.sample_ode(spy, noise, num_steps=num_steps, shift=SHIFT, solver="unipc")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    scheduler.set_timesteps(num_steps)
    x, seen = noise, []
    for t in scheduler.timesteps:
        seen.append(float(t))
        x = scheduler.step(Spy()(x, torch.full((3,), float(t) / 1000, dtype=FP64)), t, x).prev_sample
    assert torch.equal(got, x)
    assert schedule.timestep(torch.tensor(spy.sigmas, dtype=FP64)).tolist() == seen


def test_every_integer_timestep_survives_the_detour_through_sigma():
    t = torch.arange(1001)
    assert torch.equal(schedule.timestep(t.double() / 1000), t.float())


def test_unipc_gives_what_wan_pipeline_gives_from_the_same_noise():
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=16, num_layers=2,
    ).eval()  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    text, negative = torch.randn(2, 1, 6, 8)
    noise = torch.randn(1, 4, 2, 4, 4)
    theirs = pipeline(
        prompt_embeds=text, negative_prompt_embeds=negative, latents=noise, guidance_scale=3.0, num_inference_steps=6,
        height=32, width=32, num_frames=5, output_type="latent",
    ).frames  # fmt: skip

    def predict(x, sigma_B):
        t_B = schedule.timestep(sigma_B)
        cond, uncond = (transformer(x, t_B, condition, return_dict=False)[0] for condition in (text, negative))
        return schedule.guide(cond, uncond, 3.0, "standard")

    ours = sampler.sample_ode(predict, noise, num_steps=6, shift=SHIFT, solver="unipc")
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "heun"}, "unknown solver 'heun'"),
        ({"solver": "unipc", "sigmas": [1.0, 0.5]}, "makes its own grid"),
        ({"solver": "euler", "sigmas": [1.0, 0.5]}, "num_steps is 3 but sigmas lists 2"),
        ({"solver": "unipc", "num_steps": 0}, "at least 1 step"),
    ],
)
def test_arguments_that_contradict_each_other(arguments, message):
    with pytest.raises(ValueError, match=message):
        sampler.sample_ode(Spy(), gaussian_noise(), **{"num_steps": 3, "shift": SHIFT} | arguments)


def test_few_step_is_its_recursion():
    sigmas = schedule.few_step_sigmas([1000, 750, 500, 250], SHIFT, warp=True)
    noises = [torch.randn(3, 2, 2, 4, 4, generator=torch.Generator().manual_seed(i), dtype=FP64) for i in range(3)]
    calls, asked = [], []

    def predict(x, sigma_B):
        calls.append(sigma_B[0].item())
        return gaussian_x0(x, sigma_B)

    def renoise(i):
        asked.append(i)
        return noises[i]

    got = sampler.sample_few_step(predict, gaussian_noise(), sigmas, renoise)
    assert calls == sigmas.tolist() and asked == [0, 1, 2]
    x0 = gaussian_x0(gaussian_noise(), torch.ones(3, dtype=FP64))
    for sigma, noise in zip(sigmas.tolist()[1:], noises, strict=True):
        x0 = gaussian_x0((1 - sigma) * x0 + sigma * noise, torch.full((3,), sigma, dtype=FP64))
    assert torch.allclose(got, x0, atol=1e-14)


def test_few_step_has_the_moments_of_its_gaussian_recursion():
    """Means map to means, and the spread follows s² ← k² ((1 − σ)² s² + σ²): renoising must be fresh and unit."""
    sigmas = schedule.few_step_sigmas([1000, 750, 500, 250], SHIFT, warp=True)
    keyed, ids = KeyedNoise(0), range(2000)
    shape = (50,)

    def renoise(i):
        return keyed.normal(f"renoise/{i}", 0, ids, shape, device="cpu", dtype=FP64)

    start = keyed.normal("start", 0, ids, shape, device="cpu", dtype=FP64)
    got = sampler.sample_few_step(gaussian_x0, start, sigmas, renoise)
    variance = 0.0
    for sigma in sigmas.tolist():
        gain = STD**2 * (1 - sigma) / ((1 - sigma) ** 2 * STD**2 + sigma**2)
        variance = gain**2 * ((1 - sigma) ** 2 * variance + sigma**2)
    assert float(got.mean()) == pytest.approx(MEAN, abs=1e-3)
    assert float(got.std()) == pytest.approx(variance**0.5, rel=0.01)


def test_few_step_with_an_exact_flow_map_samples_the_exact_law():
    """A perfect student maps x_σ to the end of its ODE: every step then has the data law, whatever the levels."""

    def flow_map(x, sigma_B):
        sigma = schedule.broadcast_sigma(sigma_B, x)
        return MEAN + STD * (x - (1 - sigma) * MEAN) / ((1 - sigma) ** 2 * STD**2 + sigma**2).sqrt()

    keyed, ids = KeyedNoise(0), range(2000)

    def renoise(i):
        return keyed.normal(f"renoise/{i}", 0, ids, (50,), device="cpu", dtype=FP64)

    got = sampler.sample_few_step(flow_map, renoise(-1), [1.0, 0.9, 0.5], renoise)
    assert float(got.mean()) == pytest.approx(MEAN, abs=0.005) and float(got.std()) == pytest.approx(STD, rel=0.01)


def test_one_step_needs_no_noise_and_no_graph():
    def never(i):
        raise AssertionError(f"asked for noise {i}")

    weight = torch.ones((), requires_grad=True)
    x0 = sampler.sample_few_step(lambda x, _: weight * x, gaussian_noise(torch.bfloat16), [1.0], never)
    assert x0.dtype == torch.float32 and not x0.requires_grad
