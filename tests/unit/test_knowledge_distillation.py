"""Knowledge distillation: the guided ODE of the toy family is an affine map that the affine student must find exactly.

From x_σ of N(m, v) the ODE leads to x0 = m + √v (x_σ − (1 − σ) m) / s, with s² = (1 − σ)² v + σ². Guidance at 3 makes
m = 4. Each mutant misses the map of some level; the checks that it fails are those that the method passes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from mutants import is_caught
from torch import Tensor
from toy_family import VARIANCE, AffineStudent, write_data
from toy_run import toy_pairs, toy_trainer

from titan_distill.commands import ode_pairs
from titan_distill.data.loader import Batch
from titan_distill.diffusion import schedule
from titan_distill.methods import losses
from titan_distill.methods.knowledge_distillation import KnowledgeDistillation
from titan_distill.models.base import Guidance
from titan_distill.trainer import Trainer

MEAN = 4.0
LEVELS = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)
TRAINING = (
    "--training.steps", "200",
    "--training.global_batch_size", "32",
    "--training.local_batch_size", "32",
    "--metrics.log_interval", "200",
    "--optimizer.lr", "2e-1",
    "--optimizer.betas", "[0.8, 0.95]",
    "--lr_scheduler.decay", "cosine",
)  # fmt: skip


def map_error(trainer: Trainer) -> float:
    """Largest distance of the student's answer to the end of the ODE, within two deviations of each level's law."""
    student = trainer.roles["student"].transformer
    assert isinstance(student, AffineStudent)
    scale_K, shift_K = student.affine.detach().double().unbind(1)
    deviation_K = ((1 - LEVELS) ** 2 * VARIANCE + LEVELS**2).sqrt()
    errors = []
    for z in (-2.0, 0.0, 2.0):
        x_K = (1 - LEVELS) * MEAN + z * deviation_K
        errors.append((scale_K * x_K + shift_K - (MEAN + z * VARIANCE**0.5)).abs().max())
    return torch.stack(errors).max().item()


def trained(folder: Path) -> Trainer:
    trainer = toy_trainer(folder, "knowledge_distillation", *TRAINING)
    trainer.run()
    return trainer


# --- mutants

STATES, LOSS = KnowledgeDistillation._states, losses.regression_loss


def _next_state(self: KnowledgeDistillation, batch: Batch, choice_B: Tensor) -> Tensor:
    return STATES(self, batch, (choice_B + 1).clamp(max=3))


def _fresh_noise(self: KnowledgeDistillation, batch: Batch, choice_B: Tensor) -> Tensor:
    assert batch.latents is not None
    noise = self.noise.normal("mutant", 0, batch.sample_ids, batch.latents.shape[1:], device="cpu")
    return schedule.add_noise(batch.latents, noise, self.sigmas_K[choice_B])


def _another_end(x0_pred: Tensor, x0: Tensor) -> Tensor:
    return LOSS(x0_pred, x0.roll(1, 0))


def _first_level_only(self: KnowledgeDistillation, batch: Batch, step: int) -> Any:
    with patch.object(self.noise, "uniform", lambda *_: torch.zeros(len(batch.sample_ids), dtype=torch.float64)):
        return STUDENT_LOSS(self, batch, step)


STUDENT_LOSS = KnowledgeDistillation.student_loss

MUTANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "state of another time": lambda: patch.object(KnowledgeDistillation, "_states", _next_state),
    "noise that is not the trajectory's": lambda: patch.object(KnowledgeDistillation, "_states", _fresh_noise),
    "another trajectory's end": lambda: patch.object(losses, "regression_loss", _another_end),
    "one level for all": lambda: patch.object(KnowledgeDistillation, "student_loss", _first_level_only),
    "guidance dropped": lambda: patch.object(ode_pairs, "Guidance", lambda scale: Guidance(1.0)),
    "guidance off by one": lambda: patch.object(ode_pairs, "Guidance", lambda scale: Guidance(scale, "offset")),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_student_finds_the_guided_flow_map_and_mutants_miss_it(name: str, tmp_path: Path) -> None:
    with MUTANTS[name]():
        error = map_error(trained(tmp_path))
    if name == "none":
        assert error < 0.006  # the teacher's 400 Euler steps are 0.0047 off themselves
    else:
        assert error > 0.15


# --- one update, against the formula


def test_loss_is_the_formula_and_only_the_student_runs(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, "knowledge_distillation")
    method, batch = trainer.method, trainer.adapter.prepare_batch(next(trainer.loader))
    calls = []
    real = trainer.adapter.predict_velocity

    def predict(role: Any, x: Tensor, *rest: Any) -> Tensor:
        calls.append((role.name, torch.is_grad_enabled()))
        return real(role, x, *rest)

    trainer.adapter.predict_velocity = predict  # type: ignore[method-assign]
    assert isinstance(method, KnowledgeDistillation) and batch.latents is not None
    seen = set()
    for step in range(6):
        result = method.student_loss(batch, step)
        u_B = method.noise.uniform("knowledge_distillation/time", step, batch.sample_ids)
        for row, u in enumerate(u_B.tolist()):
            seen.add(int(4 * u))
            x = batch.extra["trajectory"][row, int(4 * u)].double()  # the student starts as x0 = x
            assert result.losses_B[row].item() == pytest.approx(
                (x - batch.latents[row].double()).square().mean().item(), rel=1e-5
            )
    assert seen == {0, 1, 2, 3}
    assert calls == [("student", True)] * 6


def test_split_batches_draw_the_same_times(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, "knowledge_distillation")
    batch = trainer.adapter.prepare_batch(next(trainer.loader))
    (update,) = trainer.method.updates(0)
    parts = torch.cat([update.loss(part, 0).losses_B for part in batch.split(3)])
    assert torch.equal(parts, update.loss(batch, 0).losses_B)


# --- data that does not fit


def test_pairs_of_another_shift_are_refused(tmp_path: Path) -> None:
    """When the run is assembled: before the student's weights are loaded and the teacher is sampled."""
    message = r"pairs-000000-000063\.parquet, row 0: .* timesteps \[1000.0, 750.0, 500.0, 250.0\].*shift 3 need 900\.00"
    with pytest.raises(ValueError, match=message):
        toy_trainer(tmp_path, "knowledge_distillation", "--pipeline_config.flow_shift", "3")


def test_more_states_than_levels_are_fine_and_fewer_are_refused(tmp_path: Path) -> None:
    few = ("--method_config.denoising_steps", "[1000.0, 500.0]")
    toy_trainer(tmp_path, "knowledge_distillation", *few).run()
    many = ("--method_config.denoising_steps", "[1000.0, 900.0, 500.0]")
    with pytest.raises(ValueError, match=r"need 900\.00; change denoising_steps or .* record the trajectories again"):
        toy_trainer(tmp_path, "knowledge_distillation", *many, "--job.seed", "1")


def test_data_without_trajectories_is_named_before_the_first_step(tmp_path: Path) -> None:
    data = write_data(tmp_path / "latents.parquet")
    with pytest.raises(ValueError, match=r"latents\.parquet lacks the columns trajectory_bytes, trajectory_shape"):
        toy_trainer(tmp_path, "knowledge_distillation", "--data.path", str(data))


def test_toy_pairs_hold_the_law_and_its_ends(tmp_path: Path) -> None:
    """Without any training: states have their level's law, and the ends are the closed form of the states."""
    from titan_distill.data.parquet import ParquetDataset

    folder = toy_pairs(tmp_path, write_data(tmp_path / "toy.parquet", with_latents=False))
    dataset = ParquetDataset(folder, tensors=("trajectory", "trajectory_timesteps"))
    for row in map(dataset.read, range(8)):
        assert row.extra["trajectory_timesteps"].tolist() == [1000.0, 750.0, 500.0, 250.0]
        x_KN, end_N = row.extra["trajectory"].double(), row.vae_latent
        assert end_N is not None
        assert torch.equal(row.extra["trajectory"][0], ode_pairs.initial_noise(row.id, (64,)))
        deviation_K1 = ((1 - LEVELS) ** 2 * VARIANCE + LEVELS**2).sqrt()[:, None]
        ends_KN = MEAN + VARIANCE**0.5 * (x_KN - (1 - LEVELS[:, None]) * MEAN) / deviation_K1
        assert (ends_KN - end_N.flatten()).abs().max() < 0.03


# --- a causal student


CAUSAL = ("--roles.student.flavor", "chain_student", "--roles.student.attention", "causal")


def check_states_of_segments(folder: Path) -> None:
    """Each segment of each sample is a state of its own trajectory, or its end, at a level of its own."""
    trainer = toy_trainer(folder, "knowledge_distillation", *CAUSAL)
    method, seen, targets = trainer.method, [], []
    assert isinstance(method, KnowledgeDistillation)
    real = trainer.adapter.predict_velocity

    def predict(role: Any, x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        seen.append((x, sigma.expand_as(x)))
        return real(role, x, sigma, condition)

    trainer.adapter.predict_velocity = predict  # type: ignore[method-assign]
    for step in range(3):
        batch = trainer.adapter.prepare_batch(next(trainer.loader))
        targets.append(batch)
        assert method.student_loss(batch, step).losses_B.shape == (8,)
    levels = set()
    for (x, sigma), batch in zip(seen, targets, strict=True):
        assert batch.latents is not None
        states = torch.cat((batch.extra["trajectory"], batch.latents[:, None]), 1).unflatten(2, (4, 16))
        grid = torch.cat((batch.extra["trajectory_timesteps"] / 1000, torch.zeros(8, 1)), 1)
        x_segments, sigma_segments = x.unflatten(1, (4, 16)), sigma.unflatten(1, (4, 16))
        for row in range(8):
            for segment in range(4):
                level = sigma_segments[row, segment]
                assert (level == level[0]).all()
                (index,) = torch.nonzero((grid[row] - level[0]).abs() < 1e-4).flatten().tolist()
                assert torch.equal(x_segments[row, segment], states[row, index, segment])
                levels.add((segment, round(level[0].item(), 2)))
    assert len(levels) == 4 * 5
    assert len({tuple(sigma.unflatten(1, (4, 16))[row, :, 0].tolist()) for _, sigma in seen for row in range(8)}) > 16


def test_states_of_segments(tmp_path: Path) -> None:
    check_states_of_segments(tmp_path)


def _one_level_for_all_segments(self: KnowledgeDistillation, batch: Batch, step: int, lengths: Any) -> Any:
    x, sigma_B = self._whole(batch, step)
    return x, sigma_B[:, None].expand_as(x)


def test_one_level_for_all_segments_is_caught(tmp_path: Path) -> None:
    mutant = patch.object(KnowledgeDistillation, "_by_segment", _one_level_for_all_segments)
    assert is_caught(lambda: check_states_of_segments(tmp_path), mutant)
