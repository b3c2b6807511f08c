"""Self-Forcing: a known optimum for outcomes, spies for what outcomes cannot show, and planted mistakes for both.

The toy teacher's law is a chain of four segments, x_j = 1 + 0.8 (x_{j-1} - 1) + noise, all of variance 0.49. A causal
student of one step can be that chain exactly. It gets there only if its context is its own finished, clean segment.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from mutants import is_caught
from torch import Tensor
from toy_family import CONDITIONAL_MEAN, CORRELATION, VARIANCE, ToyAdapter, ToyStream
from toy_run import toy_trainer

from titan_distill.config.parsing import ConfigError
from titan_distill.data.loader import Batch
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.methods import losses, self_forcing
from titan_distill.methods.self_forcing import SelfForcing
from titan_distill.models.base import Adapter
from titan_distill.trainer import Trainer
from titan_distill.validation.sampling import Sampling

SEGMENTS, LENGTH = 4, 16
TRAINING = (
    "--training.steps", "450",
    "--training.global_batch_size", "32",
    "--training.local_batch_size", "32",
    "--metrics.log_interval", "450",
    "--method_config.denoising_steps", "[1000.0]",
    "--method_config.update_ratio", "3",
    "--optimizer.lr", "4e-2",
    "--optimizer.betas", "[0.5, 0.95]",
    "--lr_scheduler.decay", "cosine",
)  # fmt: skip


def method_of(trainer: Trainer) -> SelfForcing:
    assert isinstance(trainer.method, SelfForcing)
    return trainer.method


def one_batch(trainer: Trainer) -> Batch:
    return trainer.adapter.prepare_batch(next(trainer.loader))


def sampled(trainer: Trainer, num_samples: int = 2048, length: int | None = None) -> Tensor:
    """[samples, segments, values], as validation samples the student."""
    request = next(s for s in trainer.method.validation_request().samples if s.label == "student")
    sampling = Sampling(trainer.adapter, KeyedNoise(7), torch.device("cpu"))
    condition = trainer.adapter.encode_prompts(["a sample"] * num_samples)
    segments = list(sampling.stream(request, trainer.roles["student"], condition, range(num_samples), length))
    return torch.stack(segments, dim=1)


def law_error(samples_NSL: Tensor) -> float:
    """Largest error of mean and of covariance between segments, relative to the deviation and the variance."""
    values = samples_NSL.movedim(1, 0).flatten(1)
    index = torch.arange(SEGMENTS)
    expected = VARIANCE * CORRELATION ** (index[:, None] - index).abs()
    covariance = (values.cov() - expected).abs().max() / VARIANCE
    mean = (values.mean(1) - CONDITIONAL_MEAN).abs().max() / VARIANCE**0.5
    return max(covariance.item(), mean.item())


# --- outcome


WRITE, SEGMENT = SelfForcing._write, SelfForcing._segment


def _context_of_noise(self: SelfForcing, stream: Any, batch: Batch, step: int, purpose: str, x0: Tensor) -> None:
    """Keys and values of the noisy segment that went into the last forward, instead of the finished one."""
    noise = self._segment_noise(batch, step, f"{purpose}/noise/0", x0.shape[1])
    WRITE(self, stream, batch, step, purpose, noise)


def _no_context(self: SelfForcing, *_: Any) -> None:
    return None


def _context_of_data(self: SelfForcing, stream: Any, batch: Batch, step: int, purpose: str, x0: Tensor) -> None:
    assert batch.latents is not None
    WRITE(self, stream, batch, step, purpose, batch.latents[:, :LENGTH])


OUTCOME_MUTANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "context of the noisy segment": lambda: patch.object(SelfForcing, "_write", _context_of_noise),
    "context never written": lambda: patch.object(SelfForcing, "_write", _no_context),
    "context from data": lambda: patch.object(SelfForcing, "_write", _context_of_data),
}


@pytest.mark.parametrize("name", OUTCOME_MUTANTS)
def test_the_student_becomes_the_chain_and_mutants_do_not(name: str, tmp_path: Path) -> None:
    shorter = () if name == "none" else ("--training.steps", "150")  # far from the optimum is soon reached
    with OUTCOME_MUTANTS[name]():
        trainer = toy_trainer(tmp_path, "self_forcing", *TRAINING, *shorter)
        trainer.run()
    error = law_error(sampled(trainer))
    assert error < 0.05 if name == "none" else error > 0.3, error


# --- spies


@dataclass
class Forward:
    segment: int
    sigma: float
    gradient: bool
    context_has_graph: bool


@dataclass
class Write:
    segment: int
    x: Tensor
    sigma: float
    gradient: bool


@dataclass
class Spy:
    """Records what a stream is asked for and told."""

    forwards: list[Forward] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)

    def watch(self, trainer: Trainer) -> Spy:
        spy, adapter = self, trainer.adapter

        class Watched(ToyStream):
            def predict_velocity(self, x: Tensor, sigma_B: Tensor) -> Tensor:
                context: Any = self.context
                graph = context is not None and context.requires_grad
                spy.forwards.append(Forward(len(spy.writes), sigma_B[0].item(), torch.is_grad_enabled(), graph))
                velocity = super().predict_velocity(x, sigma_B)
                spy.predictions.append((x - sigma_B[:, None] * velocity).detach().float())
                return velocity

            def _write(self, x: Tensor, sigma_B: Tensor) -> None:
                spy.writes.append(Write(len(spy.writes), x, sigma_B[0].item(), torch.is_grad_enabled()))
                super()._write(x, sigma_B)

        adapter.open_stream = lambda role, condition: Watched(role)  # type: ignore[method-assign]
        return self

    def of(self, segment: int) -> list[Forward]:
        return [forward for forward in self.forwards if forward.segment == segment]


LEVELS = [1.0, 0.75, 0.5, 0.25]


def check_forwards_and_gradient_modes(folder: Path, *overrides: str, per_segment: bool = False) -> None:
    """Every segment runs as far as its exit says, with gradient in its last forward alone; no context has a graph."""
    trainer = toy_trainer(folder, "self_forcing", *overrides)
    spy, method, batch = Spy().watch(trainer), method_of(trainer), one_batch(trainer)
    seen = set()
    for step in range(12):
        spy.forwards.clear(), spy.writes.clear()
        method.student_loss(batch, step)
        exits = tuple(len(spy.of(segment)) - 1 for segment in range(SEGMENTS))
        names = [f"dmd2/student/exit/{i}" if per_segment else "dmd2/student/exit" for i in range(SEGMENTS)]
        assert exits == tuple(method.noise.index(name, step, 4) for name in names)
        seen.add(exits)
        for segment, exit_index in enumerate(exits):
            forwards = spy.of(segment)
            assert [f.sigma for f in forwards] == pytest.approx(LEVELS[: exit_index + 1])
            assert [f.gradient for f in forwards] == [False] * exit_index + [True]
        assert not any(f.context_has_graph for f in spy.forwards)
    assert (len(seen) > 8) if per_segment else {exits[0] for exits in seen} == {0, 1, 2, 3}


def check_contexts(folder: Path) -> None:
    """The KV cache gets each segment's last prediction, clean and at level 0, once; not that of the last segment."""
    trainer = toy_trainer(folder, "self_forcing")
    spy, method, batch = Spy().watch(trainer), method_of(trainer), one_batch(trainer)
    for step in range(4):
        spy.forwards.clear(), spy.writes.clear(), spy.predictions.clear()
        method.student_loss(batch, step)
        assert len(spy.writes) == SEGMENTS - 1
        for write in spy.writes:
            last = max(i for i, forward in enumerate(spy.forwards) if forward.segment == write.segment)
            torch.testing.assert_close(write.x, spy.predictions[last])
            assert write.sigma == 0 and not write.gradient


def check_noise_belongs_to_samples(folder: Path) -> None:
    """A rollout of eight samples is that of the first four and that of the last four: no matter who has them."""
    trainer = toy_trainer(folder, "self_forcing")
    method, batch = method_of(trainer), one_batch(trainer)
    whole = method.rollout(batch, trainer.adapter.text_condition(batch), 0, "test").x0
    parts = [method.rollout(b, trainer.adapter.text_condition(b), 0, "test").x0 for b in batch.split(4)]
    assert torch.equal(torch.cat(parts), whole)
    assert (parts[0] - parts[1]).abs().mean() > 0.1
    segments = whole.unflatten(1, (SEGMENTS, -1))
    assert all((segments[:, i] - segments[:, i - 1]).abs().mean() > 0.1 for i in range(1, SEGMENTS))


LONG = ("--method_config.num_rollout_segments", "7")


def check_long_rollouts(folder: Path) -> None:
    """Seven segments for a sample of four: the last three have gradients, the one before them was encoded anew and is
    left out of the loss, but not of the normaliser."""
    trainer = toy_trainer(folder, "self_forcing", *LONG)
    spy, method, batch = Spy().watch(trainer), method_of(trainer), one_batch(trainer)
    encoded: list[Tensor] = []

    def last_sample(self: ToyAdapter, sequence: Tensor) -> Tensor:
        encoded.append(sequence.detach())
        sample = Adapter.last_sample(self, sequence)
        return torch.cat((torch.full_like(sample[:, :1], 50.0), sample[:, 1:]), dim=1)

    scores: list[Tensor] = []
    real_direction = losses.dmd_direction

    def direction(fake: Tensor, real: Tensor, x0: Tensor, **options: Any) -> Tensor:
        scores.extend((fake.double(), real.double()))
        return real_direction(fake, real, x0, **options)

    with patch.object(ToyAdapter, "last_sample", last_sample), patch.object(losses, "dmd_direction", direction):
        rollout = method.rollout(batch, trainer.adapter.text_condition(batch), 0, "dmd2/student")
        rollout.x0.retain_grad()
        with patch.object(method, "rollout", lambda *_, **__: rollout):
            method.student_loss(batch, 0).losses_B.sum().backward()
    assert encoded[0].shape == (8, 7 * LENGTH) and rollout.x0.shape == (8, SEGMENTS * LENGTH)
    assert torch.equal(rollout.x0[:, 0], torch.full((8,), 50.0))
    for segment in range(7):
        assert [f.gradient for f in spy.of(segment)][-1] == (segment >= 4)
    assert rollout.x0.grad is not None
    by_segment = rollout.x0.grad.unflatten(1, (SEGMENTS, -1)).abs().amin((0, 2))
    assert by_segment[0] == 0 and (by_segment[1:] > 0).all()
    fake, real = scores
    normaliser_B = (rollout.x0.detach() - real).abs().mean(1, keepdim=True)
    expected = (fake - real) / normaliser_B / ((SEGMENTS - 1) * LENGTH)
    torch.testing.assert_close(rollout.x0.grad[:, LENGTH:].double(), expected[:, LENGTH:], rtol=1e-5, atol=1e-8)
    counted = torch.ones(8, SEGMENTS * LENGTH)
    counted[:, :LENGTH] = 0
    assert rollout.mask is not None and torch.equal(rollout.mask.expand(8, -1), counted)


def check_context_noise(folder: Path) -> None:
    """Training and sampling read a finished segment at the asked level, with noise at that level."""
    trainer = toy_trainer(folder, "self_forcing", "--method_config.context_noise", "100")
    spy, method, batch = Spy().watch(trainer), method_of(trainer), one_batch(trainer)
    method.student_loss(batch, 0)
    training = list(spy.writes)
    spy.forwards.clear(), spy.writes.clear()
    sampled(trainer, 8)
    assert len(training) == len(spy.writes) == SEGMENTS - 1
    for write in (*training, *spy.writes):
        assert write.sigma == pytest.approx(0.1)
    for write in spy.writes:
        last = max(i for i, forward in enumerate(spy.forwards) if forward.segment == write.segment)
        noise = (write.x - 0.9 * spy.predictions[-len(spy.forwards) :][last]) / 0.1
        assert abs(noise.mean()) < 0.3 and 0.8 < noise.std() < 1.2


CHECKS: dict[str, Callable[[Path], None]] = {
    "forwards": check_forwards_and_gradient_modes,
    "forwards, exits by segment": lambda folder: check_forwards_and_gradient_modes(
        folder, "--method_config.same_step_across_blocks", "false", per_segment=True
    ),
    "contexts": check_contexts,
    "noise": check_noise_belongs_to_samples,
    "long rollouts": check_long_rollouts,
    "context noise": check_context_noise,
}


@pytest.mark.parametrize("name", CHECKS)
def test_spy(name: str, tmp_path: Path) -> None:
    CHECKS[name](tmp_path)


# --- mistakes that training may survive


def _write_with_graph(self: SelfForcing, stream: Any, batch: Batch, step: int, purpose: str, x0: Tensor) -> None:
    stream._write(x0, torch.zeros(len(x0), dtype=torch.float64))


def _equal_on_data_ranks(self: SelfForcing, batch: Batch, step: int, purpose: str, length: int) -> Tensor:
    ids = range(len(batch.sample_ids))
    return self.noise.normal(purpose, step, ids, self.adapter.segment_shape(length), device="cpu")


def _equal_in_all_segments(self: SelfForcing, stream: Any, batch: Batch, step: int, purpose: str, *rest: Any) -> Tensor:
    return SEGMENT(self, stream, batch, step, "all", *rest)


def _always_with_gradient(self: SelfForcing, *arguments: Any) -> Tensor:
    with torch.enable_grad():
        return SEGMENT(self, *arguments)


def _exit_of_the_first(self: SelfForcing, step: int, purpose: str, segment: int) -> int:
    return EXIT(self, step, purpose, 0)


def _normaliser_of_the_trained(fake: Tensor, real: Tensor, x0: Tensor, **options: Any) -> Tensor:
    mask = torch.ones_like(x0)
    mask[:, :LENGTH] = 0
    return DIRECTION(fake, real, x0, **{**options, "mask": mask})


DIRECTION = losses.dmd_direction
EXIT = SelfForcing._exit_index
SPIED_MUTANTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]] = {
    "gradient through the context": (lambda: patch.object(SelfForcing, "_write", _write_with_graph), "forwards"),
    "context of the noisy segment": (lambda: patch.object(SelfForcing, "_write", _context_of_noise), "contexts"),
    "equal noise on data ranks": (lambda: patch.object(SelfForcing, "_segment_noise", _equal_on_data_ranks), "noise"),
    "equal noise in all segments": (lambda: patch.object(SelfForcing, "_segment", _equal_in_all_segments), "noise"),
    "all segments trained": (lambda: patch.object(SelfForcing, "_segment", _always_with_gradient), "long rollouts"),
    "first segment not masked": (
        lambda: patch.object(SelfForcing, "_all_but_the_first", lambda self, sample: None),
        "long rollouts",
    ),
    "normaliser of the trained segments": (
        lambda: patch.object(losses, "dmd_direction", _normaliser_of_the_trained),
        "long rollouts",
    ),
    "one exit where each has its own": (
        lambda: patch.object(SelfForcing, "_exit_index", _exit_of_the_first),
        "forwards, exits by segment",
    ),
    "context noise in training only": (
        lambda: patch.object(SelfForcing, "student_sample", self_forcing.Dmd2.student_sample),
        "context noise",
    ),
}


@pytest.mark.parametrize("name", SPIED_MUTANTS)
def test_spies_catch(name: str, tmp_path: Path) -> None:
    plant, check = SPIED_MUTANTS[name]
    assert is_caught(lambda: CHECKS[check](tmp_path), plant())


# --- sampling


def test_a_longer_sequence_begins_as_a_shorter_one(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, "self_forcing")
    short, long = sampled(trainer, 8), sampled(trainer, 8, length=9 * LENGTH)
    assert long.shape == (8, 9, LENGTH)
    assert torch.equal(long[:, :SEGMENTS], short)


def test_segments_come_one_by_one(tmp_path: Path) -> None:
    """The first is there before the second was begun, and the gradient mode is the caller's in between."""
    trainer = toy_trainer(tmp_path, "self_forcing")
    spy = Spy().watch(trainer)
    request = next(s for s in trainer.method.validation_request().samples if s.label == "student")
    sampling = Sampling(trainer.adapter, KeyedNoise(7), torch.device("cpu"))
    condition = trainer.adapter.encode_prompts(["a sample"])
    for number, segment in enumerate(sampling.stream(request, trainer.roles["student"], condition, [0]), start=1):
        assert len(spy.forwards) == number * len(LEVELS)
        assert torch.is_grad_enabled() and not segment.requires_grad
    assert number == SEGMENTS


# --- configuration


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("--roles.student.attention", "dense"), r"roles\.student\.attention = 'dense', but .* set it to 'causal'"),
        (("--roles.critic.attention", "causal"), r"roles\.critic\.attention = 'causal', but 'self_forcing' runs its"),
        (("--method_config.rollout", "data"), r"rollout = 'data' trains on noised data.* leave it at 'simulate'"),
        (
            ("--method_config.context_noise", "1000"),
            r"context_noise = 1000\.0 is out of range; .* below 1000",
        ),
        (
            ("--method_config.num_rollout_segments", "-1"),
            r"num_rollout_segments = -1 is out of range; choose at least 0",
        ),
        (("--method_config.num_rollout_segments", "3"), r"num_rollout_segments = 3, but a sample has 4 segments"),
        (
            ("--method_config.ts_schedule", "true", "--method_config.same_step_across_blocks", "false"),
            r"ts_schedule = true follows the exit of a rollout.* change one of the two",
        ),
        (
            ("--method_config.ts_schedule_max", "true", "--method_config.same_step_across_blocks", "false"),
            r"ts_schedule_max = true follows the exit of a rollout.* change one of the two",
        ),
        (
            ("--compile.enabled", "true", "--method_config.num_rollout_segments", "9"),
            r"compile\.enabled = true does not go with 9 segments .* set it to false",
        ),
        (("--method_config.same_step_across_block", "true"), r"did you mean .*same_step_across_blocks"),
    ],
)
def test_wrong_configuration(overrides: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ValueError), match=sentence):
        toy_trainer(tmp_path, "self_forcing", *overrides)


def test_other_methods_refuse_a_causal_student(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'dmd2' runs its student on whole samples .* set it to 'dense' or 'sparse'"):
        toy_trainer(tmp_path, "dmd2", "--roles.student.attention", "causal")
