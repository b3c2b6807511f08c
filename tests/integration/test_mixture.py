"""T2: three methods on a mixture of Gaussians in two dimensions, whose flow is known but is no affine map.

Three modes of unequal weight: a student that averages, that forgets one, or that is told the wrong time, shows it. A
toy sample holds 64 independent points, so that one keyed draw serves many. Mutants train alike and must miss the bound
that the method keeps, by a multiple.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import toy_family
from torch import Tensor, nn
from toy_run import ASSETS

from titan_distill.commands.ode_pairs import OdePairsOptions, ode_pairs
from titan_distill.config.loading import load_config
from titan_distill.data.loader import Batch
from titan_distill.data.parquet import LatentRow, write_rows
from titan_distill.diffusion import sampler
from titan_distill.methods import losses
from titan_distill.methods.dmd2 import Dmd2
from titan_distill.methods.knowledge_distillation import KnowledgeDistillation
from titan_distill.models.base import Adapter
from titan_distill.parallelisms.mesh import World
from titan_distill.resolve import resolve
from titan_distill.train import assemble
from titan_distill.trainer import Trainer

pytestmark = pytest.mark.nightly

POINTS, STD = 64, 0.25
MODES = torch.tensor([[1.5, 0.0], [-0.75, 1.3], [-0.75, -1.3]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])


class MixtureTeacher(nn.Module):
    """The exact velocity: (x − E[x0 | x]) / σ."""

    def __init__(self) -> None:
        super().__init__()
        self.modes = nn.Parameter(MODES.clone())

    def forward(self, x: Tensor, sigma_B1: Tensor, label_B1: Tensor) -> Tensor:
        points, sigma = x.unflatten(1, (-1, 1, 2)), sigma_B1[:, :, None, None]
        alpha, modes = 1 - sigma, self.modes.to(x.dtype)
        variance = alpha**2 * STD**2 + sigma**2
        distance = (points - alpha * modes).square().sum(-1)
        share = (WEIGHTS.to(x.dtype).log() - distance / (2 * variance[..., 0])).softmax(-1)
        x0 = (share[..., None] * (modes + alpha * STD**2 / variance * (points - alpha * modes))).sum(-2)
        return ((points[:, :, 0] - x0) / sigma_B1[:, :, None]).flatten(1)


class PointMlp(nn.Module):
    """A velocity for each point, smooth in time: σ enters by two slow waves."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, width), *(nn.Linear(width, width) for _ in range(2))])
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, sigma_B1: Tensor, label_B1: Tensor) -> Tensor:
        points = x.unflatten(1, (-1, 2))
        phase = math.pi * sigma_B1
        time = torch.cat([phase.cos(), phase.sin(), (2 * phase).cos(), (2 * phase).sin()], 1)
        hidden = torch.cat([points, time[:, None].expand(-1, points.shape[1], -1)], -1)
        for block in self.blocks:
            hidden = torch.nn.functional.silu(block(hidden))
        return self.out(hidden).flatten(1)


@pytest.fixture(autouse=True)
def mixture_flavors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(toy_family.FLAVORS, "mixture", MixtureTeacher)
    monkeypatch.setitem(toy_family.FLAVORS, "points", PointMlp)


def law(num_points: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mode = torch.multinomial(WEIGHTS, num_points, replacement=True, generator=generator)
    return MODES[mode] + STD * torch.randn(num_points, 2, generator=generator)


def train(folder: Path, method: str, *overrides: str) -> Trainer:
    """The toy job of `method`, with the mixture in the place of its Gaussians."""
    text = (ASSETS / f"toy_{method}.toml").read_text()
    for old, new in (("analytic", "mixture"), ("affine", "points"), ("mlp", "points"), ("scale = 3.0", "scale = 1.0")):
        text = text.replace(old, new)
    job, data = folder / "job.toml", folder / "data.parquet"
    job.write_text(text + f"\n[pipeline_config]\nnum_values = {2 * POINTS}\n")
    points = law(256 * POINTS, seed=0).reshape(256, 2 * POINTS, 1, 1, 1)
    write_rows(data, (LatentRow(str(i), "a sample", torch.ones(1, 1), latent) for i, latent in enumerate(points)))
    if method == "knowledge_distillation":
        options = OdePairsOptions(job, data, folder / "pairs", num_pairs=256, batch_size=256, dtype="float32")
        ode_pairs(options)
        data = folder / "pairs"
    arguments = ["--job.config_file", str(job), "--data.path", str(data), "--job.output_dir", str(folder / "run")]
    common = [
        "--training.global_batch_size", "8", "--training.local_batch_size", "8", "--optimizer.betas", "[0.9, 0.99]",
        "--lr_scheduler.decay", "cosine", "--metrics.log_interval", "1000",
    ]  # fmt: skip
    trainer = assemble(resolve(load_config([*arguments, *common, *overrides]), 1), World(0, 1, torch.device("cpu")))
    trainer.run()
    return trainer


@torch.no_grad()
def map_error(trainer: Trainer, sigma: float) -> float:
    """Median distance of the student's x0 to the end of the teacher's trajectory, where the trajectories are at σ."""
    generator = torch.Generator().manual_seed(3)
    clean, noise = law(32 * POINTS, seed=2).reshape(32, -1), torch.randn(32, 2 * POINTS, generator=generator)
    x, condition = (1 - sigma) * clean + sigma * noise, {"label": torch.ones(32, 1)}
    velocity = MixtureTeacher().double()
    end, steps = x.double(), 1000
    for step in range(steps):  # Heun's method; the last step is Euler's, as σ = 0 has no velocity
        here, there = (torch.full((32, 1), sigma * (1 - i / steps), dtype=torch.float64) for i in (step, step + 1))
        slope = velocity(end, here, None)
        ahead = end - sigma / steps * slope
        if step + 1 < steps:
            ahead = end - sigma / steps * (slope + velocity(ahead, there, None)) / 2
        end = ahead
    x0 = trainer.adapter.predict_x0(
        trainer.roles["student"], x, torch.full((32,), sigma, dtype=torch.float64), condition
    )
    return (x0.double() - end).unflatten(1, (-1, 2)).norm(dim=-1).median().item()


@torch.no_grad()
def sliced_distance(trainer: Trainer, sigmas: tuple[float, ...]) -> float:
    """Sliced 2-Wasserstein distance between what the student samples and the law: root mean square over directions."""
    generator = torch.Generator().manual_seed(4)
    condition = {"label": torch.ones(64, 1)}

    def normal(_: int) -> Tensor:
        return torch.randn(64, 2 * POINTS, generator=generator)

    def predict_x0(x: Tensor, sigma_B: Tensor) -> Tensor:
        return trainer.adapter.predict_x0(trainer.roles["student"], x, sigma_B, condition)

    made = sampler.sample_few_step(predict_x0, normal(0), sigmas, normal).reshape(-1, 2)
    angle = torch.linspace(0, math.pi, 33)[:-1]
    directions = torch.stack([angle.cos(), angle.sin()])
    projected, expected = ((points @ directions).sort(0).values for points in (made, law(len(made), seed=5)))
    return (projected - expected).square().mean().sqrt().item()


ORIGINAL_JVP, STATES, ORIGINAL_DIRECTION = (
    Adapter.predict_velocity_jvp, KnowledgeDistillation._states, losses.dmd_direction
)  # fmt: skip


def _state_of_another_time(self: KnowledgeDistillation, batch: Batch, choice_B: Tensor) -> Tensor:
    return STATES(self, batch, (choice_B + 1).clamp(max=3))


def _without_jvp(self: Adapter, *arguments: Any) -> tuple[Tensor, Tensor]:
    v, dv = ORIGINAL_JVP(self, *arguments)
    return v, torch.zeros_like(dv)


def _without_x(self: Adapter, role: Any, x: Tensor, sigma: Tensor, dx: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return ORIGINAL_JVP(self, role, x, sigma, torch.zeros_like(dx), *rest)


def _frozen_critic(self: Dmd2, step: int) -> list[Any]:
    return [update for update in ORIGINAL_UPDATES(self, step) if update.role != "critic"]


ORIGINAL_UPDATES = Dmd2.updates
Plant = Callable[[], AbstractContextManager[Any]]
KD = {
    "none": nullcontext,
    "state of another time": lambda: patch.object(KnowledgeDistillation, "_states", _state_of_another_time),
}
SCM: dict[str, Plant] = {
    "none": nullcontext,
    "without the JVP": lambda: patch.object(Adapter, "predict_velocity_jvp", _without_jvp),
    "without dx in the JVP": lambda: patch.object(Adapter, "predict_velocity_jvp", _without_x),
}
DMD2: dict[str, Plant] = {
    "none": nullcontext,
    "critic never trained": lambda: patch.object(Dmd2, "updates", _frozen_critic),
}


@pytest.mark.parametrize("name", KD)
def test_knowledge_distillation_finds_the_flow_map(name: str, tmp_path: Path) -> None:
    with KD[name]():
        trainer = train(tmp_path, "knowledge_distillation", "--training.steps", "4000", "--optimizer.lr", "4e-3")
    error, distance = map_error(trainer, 1.0), sliced_distance(trainer, (1.0, 0.75, 0.5, 0.25))
    print(f"KD, {name}: map error {error:.4f}, sliced distance {distance:.4f}")
    assert (error < 0.02 and distance < 0.15) == (name == "none"), (error, distance)


@pytest.mark.parametrize("name", SCM)
def test_continuous_consistency_finds_the_flow_map(name: str, tmp_path: Path) -> None:
    options = ("--training.steps", "5000", "--optimizer.lr", "4e-3", "--method_config.tangent_warmup", "400")
    with SCM[name]():
        trainer = train(tmp_path, "scm", *options)
    error = map_error(trainer, 1.0)
    print(f"sCM, {name}: map error {error:.4f}")
    assert (error < 0.04) if name == "none" else (error > 0.3), error


@pytest.mark.parametrize("name", DMD2)
def test_one_step_matching_finds_the_law(name: str, tmp_path: Path) -> None:
    options = (
        "--training.steps", "6000", "--optimizer.lr", "1e-3", "--roles.critic.optimizer.lr", "2e-3",
        "--method_config.denoising_steps", "[1000.0]", "--method_config.update_ratio", "4",
    )  # fmt: skip
    with DMD2[name]():
        trainer = train(tmp_path, "dmd2", *options)
    distance = sliced_distance(trainer, (1.0,))
    print(f"DMD2, {name}: sliced distance {distance:.4f}")
    assert (distance < 0.2) if name == "none" else (distance > 0.4), distance
