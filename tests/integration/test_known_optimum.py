"""T1: training towards an optimum that is known in closed form, and mistakes that miss it.

The teacher's laws are N(1, 0.49) for the caption and N(-0.5, 0.49) for the negative prompt, so at guidance w = 3 DMD2
must end at N(4, 0.49), and finetuning on the data at N(1, 0.49). The critic is a small network.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import toy_family
from toy_run import toy_trainer

from titan_distill.diffusion import sampler
from titan_distill.methods import dmd2, losses
from titan_distill.methods.dmd2 import Dmd2, Dmd2Config
from titan_distill.trainer import Trainer

MEAN, STD = 4.0, 0.7
COMMON = (
    "--training.steps", "1600",
    "--training.global_batch_size", "32",
    "--training.local_batch_size", "32",
    "--metrics.log_interval", "400",
    "--lr_scheduler.decay", "cosine",
)  # fmt: skip
DMD2 = (*COMMON, "--optimizer.lr", "4e-2", "--roles.critic.optimizer.lr", "5e-3", "--method_config.update_ratio", "4")
ONE_STEP = (*DMD2, "--method_config.denoising_steps", "[1000.0]")


def trained(folder: Path, *overrides: str) -> Trainer:
    trainer = toy_trainer(folder, "dmd2", *overrides)
    trainer.run()
    return trainer


@torch.no_grad()
def samples_by_exit(trainer: Trainer, num_samples: int = 1024) -> torch.Tensor:
    """The student's samples at each of its exits, [exits, samples, values]."""
    generator = torch.Generator().manual_seed(1)
    method, condition = trainer.method, trainer.adapter.encode_prompts(["a sample"] * num_samples)
    assert isinstance(method, Dmd2)
    made = []

    def predict_x0(x: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
        made.append(trainer.adapter.predict_x0(trainer.roles["student"], x, sigma_B, condition))
        return made[-1]

    def normal(_: int) -> torch.Tensor:
        return torch.randn(num_samples, *trainer.adapter.latent_shape, generator=generator)

    sampler.sample_few_step(predict_x0, normal(0), method.sigmas, normal)
    return torch.stack(made)


def law(samples: torch.Tensor) -> tuple[float, float]:
    return samples.mean().item(), samples.std().item()


def test_one_step_student_reaches_the_guided_law(tmp_path: Path) -> None:
    assert law(samples_by_exit(trained(tmp_path, *ONE_STEP))) == pytest.approx((MEAN, STD), abs=0.02)


def test_last_exit_reaches_the_guided_law_when_it_alone_is_trained(tmp_path: Path) -> None:
    trainer = trained(tmp_path, *DMD2, "--method_config.last_step_only", "true")
    assert law(samples_by_exit(trainer)[-1]) == pytest.approx((MEAN, STD), abs=0.05)


def test_random_exits_reach_the_guided_law_together(tmp_path: Path) -> None:
    """The critic does not see the exit, so the optimum binds the mixture over exits and not the law of each."""
    trainer = trained(tmp_path, *DMD2, "--training.steps", "3200")
    assert law(samples_by_exit(trainer)) == pytest.approx((MEAN, STD), abs=0.1)


# The negative prompt replaces the caption of real samples, so its law is the data's as well: unless a teacher knows it.
@pytest.mark.parametrize(
    ("target", "unconditional_mean", "overrides"),
    [
        ("data", toy_family.CONDITIONAL_MEAN, ()),
        ("teacher", toy_family.UNCONDITIONAL_MEAN, ("--roles.teacher.flavor", "analytic")),
    ],
)
def test_finetuning_reaches_its_target(
    target: str, unconditional_mean: float, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    if overrides:
        overrides += ("--roles.teacher.trainable", "false", "--method_config.target", target)
    options = (*COMMON, "--optimizer.lr", "5e-3", "--method_config.cfg_dropout", "0.2", *overrides)
    trainer = toy_trainer(tmp_path, "finetune", *options)
    trainer.run()
    noise = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    for label, mean in ((1.0, toy_family.CONDITIONAL_MEAN), (0.0, unconditional_mean)):
        condition = {"label": torch.full((512, 1), label)}
        x0 = sampler.sample_ode(
            lambda x, sigma_B, condition=condition: trainer.adapter.predict_velocity(
                trainer.roles["student"], x, sigma_B, condition
            ),
            noise, num_steps=32, shift=1.0, solver="euler",
        )  # fmt: skip
        assert x0.mean().item() == pytest.approx(mean, abs=0.05)
        assert x0.std().item() == pytest.approx(toy_family.VARIANCE**0.5, abs=0.05)


# --- mutants that outcomes do separate ---

ORIGINAL_DIRECTION, ORIGINAL_ROLLOUT = losses.dmd_direction, Dmd2.rollout


def _wrong_sign(*arguments: Any, **options: Any) -> torch.Tensor:
    return -ORIGINAL_DIRECTION(*arguments, **options)


def _critic_on_real_data(self: Dmd2, batch: Any, condition: Any, step: int, purpose: str) -> dmd2.Rollout:
    if "critic" in purpose:
        return dmd2.Rollout(batch.latents, 0)
    return ORIGINAL_ROLLOUT(self, batch, condition, step, purpose)


def _frozen_critic(self: Dmd2, step: int) -> list[dmd2.Update]:
    return [dmd2.Update("student", self.student_loss)]


MUTANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "guidance off by one": lambda: patch.object(
        Dmd2Config, "teacher_guidance", property(lambda self: dmd2.Guidance(self.guidance_scale, "offset"))
    ),
    "wrong sign": lambda: patch.object(losses, "dmd_direction", _wrong_sign),
    "critic trained on real data": lambda: patch.object(Dmd2, "rollout", _critic_on_real_data),
    "critic never trained": lambda: patch.object(Dmd2, "updates", _frozen_critic),
}


@pytest.mark.parametrize(
    "name",
    [name if name in ("none", "wrong sign") else pytest.param(name, marks=pytest.mark.nightly) for name in MUTANTS],
)
def test_mistakes_miss_the_optimum(name: str, tmp_path: Path) -> None:
    """The unmutated method passes the very check that mutants fail."""
    with MUTANTS[name]():
        mean, _ = law(samples_by_exit(trained(tmp_path, *ONE_STEP)))
    assert (abs(mean - MEAN) < 0.2) == (name == "none"), mean
