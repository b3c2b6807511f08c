"""Faults that no comparison of layouts sees, for they are the same on all of them: counters that are off by one, draws
that should differ and do not. The golden curves must catch them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from mutants import Mutant
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import titan_distill.optimizer
import titan_distill.train
from titan_distill.attention.sparse import SparsitySchedule
from titan_distill.data import loader
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.methods.dmd2 import Dmd2
from titan_distill.methods.scm import TangentTraining
from titan_distill.roles import Ema


@dataclass(frozen=True)
class Planted:
    """A fault, the golden job that shows it and the number of its steps in which it does."""

    mutant: Mutant
    job: str
    steps: int


def samples_counted_from_one(patch: pytest.MonkeyPatch) -> None:
    ids = loader._RankSampleIds.__iter__

    def shifted(sampler: Any) -> Iterator[list[int]]:
        return ([sample_id + 1 for sample_id in samples] for samples in ids(sampler))

    patch.setattr(loader._RankSampleIds, "__iter__", shifted)


def noise_of_the_next_step(patch: pytest.MonkeyPatch) -> None:
    class Early(KeyedNoise):
        def normal(self, purpose: str, step: int, *rest: Any, **options: Any) -> Tensor:
            return super().normal(purpose, step + 1, *rest, **options)

    patch.setattr(titan_distill.train, "KeyedNoise", Early)


def _renamed(patch: pytest.MonkeyPatch, rename: Callable[[str], str]) -> None:
    class Renamed(KeyedNoise):
        def normal(self, purpose: str, *rest: Any, **options: Any) -> Tensor:
            return super().normal(rename(purpose), *rest, **options)

        def uniform(self, purpose: str, step: int, sample_ids: Sequence[int]) -> Tensor:
            return super().uniform(rename(purpose), step, sample_ids)

    patch.setattr(titan_distill.train, "KeyedNoise", Renamed)


def critic_and_student_share_noise(patch: pytest.MonkeyPatch) -> None:
    _renamed(patch, lambda purpose: purpose.replace("dmd2/critic/noise", "dmd2/student/noise"))


def segments_share_noise(patch: pytest.MonkeyPatch) -> None:
    _renamed(patch, lambda purpose: re.sub(r"/\d+/noise", "/0/noise", purpose))


def dropout_follows_the_timestep(patch: pytest.MonkeyPatch) -> None:
    _renamed(patch, lambda purpose: purpose.replace("cfg_dropout", "timestep"))


def learning_rate_one_update_ahead(patch: pytest.MonkeyPatch) -> None:
    def ahead(optimizer: torch.optim.Optimizer, scale: Callable[[int], float]) -> LambdaLR:
        return LambdaLR(optimizer, lambda update: scale(update + 1))

    patch.setattr(titan_distill.optimizer, "LambdaLR", ahead)


def optimizer_counts_twice(patch: pytest.MonkeyPatch) -> None:
    """Its corrections of young moments, which start at zero, end too early."""
    build = titan_distill.train.build_optimizer

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for state in optimizer.state.values():
            state["step"] += 1

    def counting(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build(*arguments)
        optimizer.register_step_post_hook(count)
        return optimizer

    patch.setattr(titan_distill.train, "build_optimizer", counting)


def average_starts_an_update_early(patch: pytest.MonkeyPatch) -> None:
    update = Ema.update
    patch.setattr(Ema, "update", lambda ema, module, num_updates: update(ema, module, num_updates + 1))


def sparsity_one_step_ahead(patch: pytest.MonkeyPatch) -> None:
    at = SparsitySchedule.at
    patch.setattr(SparsitySchedule, "at", lambda schedule, step: at(schedule, step + 1))


def student_one_step_late(patch: pytest.MonkeyPatch) -> None:
    updates = Dmd2.updates
    patch.setattr(Dmd2, "updates", lambda method, step: updates(method, step + 1))


def tangent_one_step_ahead(patch: pytest.MonkeyPatch) -> None:
    tangent = TangentTraining.tangent
    patch.setattr(
        TangentTraining, "tangent", lambda method, batch, x, sigma_B, step: tangent(method, batch, x, sigma_B, step + 1)
    )


PLANTED = (
    Planted(samples_counted_from_one, "finetune", 1),
    Planted(noise_of_the_next_step, "finetune", 1),
    Planted(dropout_follows_the_timestep, "finetune", 2),
    Planted(learning_rate_one_update_ahead, "finetune", 1),
    Planted(optimizer_counts_twice, "finetune", 2),
    Planted(average_starts_an_update_early, "finetune", 2),
    Planted(sparsity_one_step_ahead, "sparse", 1),
    Planted(student_one_step_late, "dmd2", 1),
    Planted(critic_and_student_share_noise, "dmd2", 1),
    Planted(segments_share_noise, "self_forcing", 1),
    Planted(tangent_one_step_ahead, "rcm", 1),
)
