"""A causal Wan role through the adapter: what its stream computes and costs, and videos longer than a sample."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from causal_oracle import DetachedPast
from mutants import is_caught
from runs import REPOSITORY, tiny_argv
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titan_distill.attention.causal import Segmentation
from titan_distill.commands.plan import planner
from titan_distill.config.degrees import resolve_layout
from titan_distill.config.loading import load_config
from titan_distill.config.parsing import ConfigError
from titan_distill.methods.base import Passes
from titan_distill.methods.dmd2 import Rollout
from titan_distill.methods.self_forcing import SelfForcing
from titan_distill.models.base import model_family
from titan_distill.models.streaming import SegmentStream
from titan_distill.models.wan import transformer as transformer_module
from titan_distill.models.wan.adapter import WanAdapter, WanStream
from titan_distill.models.wan.config import FLAVORS
from titan_distill.models.wan.encoders import Encoders
from titan_distill.models.wan.vae import decode_latents, restart
from titan_distill.observability.flops import forward_flops
from titan_distill.parallelisms.mesh import World
from titan_distill.planner.hardware import GPUS
from titan_distill.planner.memory import LocalForward
from titan_distill.planner.unrolling import Unrolling
from titan_distill.resolve import resolve
from titan_distill.train import assemble
from titan_distill.trainer import Trainer

WEIGHTS = ("--roles.student.init_from", "tests/assets/tiny_wan/transformer", "--checkpoint.enabled", "false")
TWO_STEPS = ("--method_config.denoising_steps", "[1000.0, 500.0]", "--method_config.last_step_only", "true")


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def causal_trainer(folder: Path, *overrides: str) -> Trainer:
    config = load_config(tiny_argv("self_forcing", folder / "run", *WEIGHTS, *TWO_STEPS, *overrides))
    return assemble(resolve(config, 1), World(rank=0, size=1, device=torch.device("cpu")))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    with pytest.MonkeyPatch.context() as patch_:
        patch_.chdir(REPOSITORY)
        return causal_trainer(tmp_path_factory.mktemp("causal"), "--training.local_batch_size", "2")


def gradients(trainer: Trainer, loss: Tensor) -> list[Tensor]:
    student = trainer.roles["student"].transformer
    student.zero_grad(set_to_none=True)
    loss.backward()
    return [p.grad.clone() for p in student.parameters() if p.grad is not None]


def check_gradients_of_a_rollout(trainer: Trainer) -> None:
    """A rollout's gradients are those of forwards over all segments so far, whose past is clean and detached."""
    method, adapter, student = trainer.method, trainer.adapter, trainer.roles["student"]
    assert isinstance(method, SelfForcing)
    batch = adapter.prepare_batch(next(trainer.loader)).split(2)[0]
    condition, inputs = adapter.text_condition(batch), []
    real = WanStream.predict_velocity

    def watched(self: WanStream, x: Tensor, sigma_B: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            inputs.append(x)
        return real(self, x, sigma_B)

    with patch.object(WanStream, "predict_velocity", watched):
        x0 = method.rollout(batch, condition, 0, "dmd2/student").x0
    weights = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    found = gradients(trainer, (x0 * weights).mean())

    total, start, past = torch.zeros(()), 0, x0.detach()
    for x, length in zip(inputs, method.lengths, strict=True):
        video = torch.cat((past[:, :, :start], x), dim=2)
        sigma = torch.zeros(2, 1, start + length, 1, 1, dtype=torch.float64)
        sigma[:, :, start:] = method.sigmas[-1]
        with patch.object(transformer_module, "CausalAttention", DetachedPast):
            estimate = adapter.predict_x0(student, video, sigma, condition)[:, :, start:]
        torch.testing.assert_close(estimate.detach(), past[:, :, start : start + length], rtol=1e-4, atol=1e-4)
        total = total + (estimate * weights[:, :, start : start + length]).sum() / weights.numel()
        start += length
    for gradient, expected in zip(found, gradients(trainer, total), strict=True):
        assert (gradient - expected).norm() <= 1e-4 * expected.norm().clamp(min=1e-6)


def test_gradients_of_a_rollout(trainer: Trainer) -> None:
    check_gradients_of_a_rollout(trainer)


def _write_with_graph(self: SegmentStream, x: Tensor, sigma_B: Tensor) -> None:
    with torch.enable_grad():
        self._write(x, sigma_B)


def _write_the_noisy_segment(self: SegmentStream, x: Tensor, sigma_B: Tensor) -> None:
    WRITE(self, x + 0.5 * torch.randn_like(x), sigma_B + 0.5)


WRITE = SegmentStream.write
MUTANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradient through the cache": lambda: patch.object(SegmentStream, "write", _write_with_graph),
    "cache of the noisy segment": lambda: patch.object(SegmentStream, "write", _write_the_noisy_segment),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_have_other_gradients(name: str, trainer: Trainer) -> None:
    assert is_caught(lambda: check_gradients_of_a_rollout(trainer), MUTANTS[name]())


# --- work and memory


def test_work_is_what_torch_counts(trainer: Trainer) -> None:
    """A segment behind a prefix, and a forward over all segments. Text keys count each time, kept or not."""
    adapter, student = trainer.adapter, trainer.roles["student"]
    assert isinstance(adapter, WanAdapter)
    condition = {"text": torch.zeros(1, 64, 64)}
    stream, x = adapter.open_stream(student, condition), torch.zeros(1, *adapter.latent_shape)
    level, at_once = torch.ones(1, dtype=torch.float64), torch.ones(1, 1, 5, 1, 1, dtype=torch.float64)
    stream.write(x[:, :, :1], level)
    stream.write(x[:, :, 1:3], level)
    kept = FLAVORS["tiny"].num_layers * 4 * 64 * FLAVORS["tiny"].inner_dim ** 2
    times = 2 * FLAVORS["tiny"].freq_dim * FLAVORS["tiny"].inner_dim + 14 * FLAVORS["tiny"].inner_dim ** 2
    for forward, missing in (
        (lambda: stream.predict_velocity(x[:, :, 3:], level), kept),
        (lambda: adapter.predict_velocity(student, x, at_once, condition), -4 * times),  # five times instead of one
    ):
        adapter.work.drain()
        with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            forward()
        assert adapter.work.drain().model_flops == counted.get_total_flops() + missing


def test_memory_of_the_real_size() -> None:
    """6.04 GB of keys and values a sample at 1.3B, 480p, 81 frames; a window bounds it; heads are shared by ranks."""
    passes, grid = Passes("student", "student", "rollout", 1, 1.0, segments=0), (21, 30, 52)
    forward = LocalForward(FLAVORS["1.3B"], 1, 32_760, 512)
    whole = Unrolling.of(Segmentation(3), grid, passes)
    assert whole.cache_bytes(forward) == pytest.approx(6.04e9, rel=1e-3)
    assert (len(whole.lengths), whole.num_keys) == (7, 12 * 1560)
    windowed = Unrolling.of(Segmentation(3, window=9, sink=3), grid, passes)
    assert windowed.cache_bytes(forward) == pytest.approx(6.04e9 * 9 / 21, rel=1e-3)
    shared = LocalForward(FLAVORS["1.3B"], 1, 16_380, 512, sequence=2)
    assert whole.cache_bytes(shared) == pytest.approx(3.02e9, rel=1e-3)
    # Attention of all segments reads 12 of 21 frames on average.
    assert forward_flops(FLAVORS["1.3B"], 32_760, num_keys=whole.num_keys).self_attention == pytest.approx(
        197.8e12 * 12 / 21, rel=1e-3
    )


def test_plan_of_the_real_size() -> None:
    """Segment-wise passes: the work of whole causal forwards, a call and a gathering of weights a segment, and keys and
    values that stay until the backward."""
    job = ["--job.config_file", "train_configs/self_forcing_wan1.3b.toml"]
    with planner(64, GPUS["H100"]) as plans:
        plan = plans.plan(load_config(job))
    with planner(64, GPUS["H100"]) as plans:
        in_one = plans.plan(load_config([*job, "--pipeline_config.frames_per_block", "21"]))
    rollout, exit_pass, *_ = plan.phases
    forward = forward_flops(FLAVORS["1.3B"], 32_760, num_keys=12 * 1560).total
    assert rollout.executed_flops == pytest.approx(2.5 * 0.2 * 64 * forward)
    assert exit_pass.dense_flops == pytest.approx(3 * 0.2 * 64 * forward, rel=1e-3)
    gathered, once = (
        sum(t.bytes_sent for t in p.phases[0].transfers if "gather" in t.collective) for p in (plan, in_one)
    )
    assert gathered == pytest.approx(7 * once)
    kept = plan.roles["student"].graph - plan.roles["critic"].graph
    assert kept == pytest.approx(6.04e9, rel=1e-3) and plan.fits


# --- longer than a sample


def moving_square(num_frames: int) -> Tensor:
    """uint8 [1, frames, 32, 32, 3]"""
    video = torch.full((1, num_frames, 32, 32, 3), 90, dtype=torch.uint8)
    for frame in range(num_frames):
        left = round(18 * frame / (num_frames - 1))
        video[:, frame, 10:22, left : left + 12] = torch.tensor([230, 40, 40], dtype=torch.uint8)
    return video


def test_a_longer_video_starts_anew_in_its_middle(trainer: Trainer) -> None:
    """The first latent frame becomes that of the picture that was there; the others stay, with their gradients."""
    adapter = trainer.adapter
    assert isinstance(adapter, WanAdapter)
    vae = adapter.encoders.vae
    latents = adapter.encode_video(moving_square(33)).requires_grad_()
    assert latents.shape[2] == 9
    sample = adapter.last_sample(latents)
    assert sample.shape[2] == 5 and torch.equal(sample[:, :, 1:], latents[:, :, 5:])
    sample.sum().backward()
    assert latents.grad is not None
    assert not latents.grad[:, :, :5].any() and (latents.grad[:, :, 5:] == 1).all()
    # The picture that the fifth latent frame ends with, as the first of a video.
    pictures, picture = decode_latents(vae, latents).float(), decode_latents(vae, sample)[:, 0].float()
    error, moved = ((picture - pictures[:, index]).abs().mean() for index in (16, 0))
    assert error < 0.5 * moved
    assert torch.equal(restart(vae, latents, 9), latents)
    with (
        patch.object(adapter, "encoders", Encoders()),
        pytest.raises(ValueError, match=r"no VAE .* set pipeline_config\.path"),
    ):
        SelfForcing(replace(trainer.config.method_config, num_rollout_segments=5), *method_parts(trainer))


def method_parts(trainer: Trainer) -> tuple[Any, ...]:
    return trainer.roles, trainer.adapter, trainer.method.noise, trainer.method.timer


def test_training_on_longer_rollouts(trainer: Trainer) -> None:
    """A rollout of five segments, of which the last two are trained on."""
    config = replace(trainer.config.method_config, num_rollout_segments=5)
    method = SelfForcing(config, *method_parts(trainer))
    batch = trainer.adapter.prepare_batch(next(trainer.loader)).split(1)[0]
    rollouts, real = [], method.rollout

    def rollout(*args: Any, **options: Any) -> Rollout:
        rollouts.append(real(*args, **options))
        return rollouts[0]

    with patch.object(method, "rollout", rollout):
        found = gradients(trainer, method.student_loss(batch, 0).losses_B.sum())
    assert method.lengths == (1, 2, 2, 2, 2) and rollouts[0].x0.shape == (1, *trainer.adapter.latent_shape)
    assert rollouts[0].mask is not None and rollouts[0].mask.flatten().tolist() == [0, 1, 1, 1, 1]
    assert len(found) == len(list(trainer.roles["student"].transformer.parameters()))


def test_only_a_causal_role_makes_other_lengths(trainer: Trainer) -> None:
    adapter, roles = trainer.adapter, trainer.roles
    assert adapter.num_latents(roles["student"], 33) == 9
    for role, num_frames, sentence in (
        ("teacher", 33, r"only a causal role makes videos of any length, and 'teacher' is none"),
        ("student", 29, r"num_frames = 29 makes 8 latent frames, which .* set it to 25 or 33"),
    ):
        with pytest.raises(ValueError, match=sentence):
            adapter.num_latents(roles[role], num_frames)
    with pytest.raises(ValueError, match=r"'teacher' makes samples as a whole"):
        adapter.open_stream(roles["teacher"], {})
    with pytest.raises(ValueError, match=r"'student' is causal and makes videos from text only; leave the image out"):
        adapter.open_stream(roles["student"], {"first_frame": torch.zeros(1)})


# --- configuration


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("--pipeline_config.frames_per_block", "3"),
            r"makes 5 latent frames, which a first block of 1 .* set it to 13 or",
        ),
        (("--pipeline_config.frames_per_block", "0"), r"frames_per_block = 0 is out of range; choose at least 1"),
        (("--pipeline_config.sink_frames", "2"), r"sink_frames = 2 must be less than cache_window_frames = 0"),
        (
            ("--pipeline_config.cache_window_frames", "-1"),
            r"cache_window_frames = -1 is out of range; choose at",
        ),
        (("--pipeline_config.frame_per_block", "2"), r"did you mean .*frames_per_block"),
        (("--pipeline_config.image_probability", "0.2"), r"image_probability = 0\.2 .* causal roles don't take"),
    ],
)
def test_wrong_configuration(overrides: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config(tiny_argv("self_forcing", tmp_path, *overrides))


def test_segments_without_a_causal_role(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"frames_per_block = 1 has no effect, because no role has attention = 'causal'"
    ):
        load_config(tiny_argv("dmd2", tmp_path, "--pipeline_config.frames_per_block", "1"))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("--parallelism.sequence", "2", "--parallelism.sequence_method", "all_gather"),
            r"roles\.student: attention = 'causal' with gathered keys .* set sequence to 2",
        ),
        (("--parallelism.sequence", "3"), r"gathered keys would hold a whole KV cache on each of 3 sequence ranks"),
    ],
)
def test_layouts_that_are_refused(
    overrides: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_argv("self_forcing", tmp_path, *overrides))
    layout = resolve_layout(config, config.parallelism.sequence)
    with pytest.raises(ValueError, match=sentence):
        model_family("wan")(config).check_layouts(layout.roles)
