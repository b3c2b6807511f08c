"""T3: a video transformer learns moving blobs from nothing, and DMD2 makes a two-step student of it.

No closed form here, but a teacher that is a network with its faults: what counts is how far few-step samples are from
the teacher's own many-step samples, against where the student started: 0.115 before, 0.062 after 250 student updates,
0.058 after 500, 0.044 after 750 (2026-11-21, six and a half minutes of one core).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from titan_distill.config.loading import load_config
from titan_distill.data.parquet import LatentRow, write_rows
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.diffusion.requests import SampleRequest
from titan_distill.parallelisms.mesh import World
from titan_distill.resolve import resolve
from titan_distill.roles import RoleHandle
from titan_distill.train import assemble
from titan_distill.trainer import Trainer
from titan_distill.validation.distances import project, sliced_wasserstein_excess
from titan_distill.validation.sampling import Sampling

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]

CPU = torch.device("cpu")
DIRECTIONS = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
SIGMAS = (1.0, 0.75)  # of [1000, 500] at shift 3; in four steps the teacher itself would be close
NUM_SAMPLES = 192

JOB = """
[job]
name = "{name}"

[recipe]
family = "wan"
method = "{method}"

{roles}

[pipeline_config]
flow_shift = 3.0
height = 64
width = 64
num_frames = 9

[data]
path = "{data}"
max_text_tokens = 2

[training]
steps = {steps}
global_batch_size = {batch}
local_batch_size = {batch}
max_grad_norm = 10.0

[optimizer]
betas = [0.9, 0.99]
weight_decay = 0.0

[lr_scheduler]
warmup_steps = 20
decay = "cosine"
min_lr_ratio = 0.1

[ema]
decay = 0.95
start_step = 20

[checkpoint]
interval = {steps}

[validation]
enabled = false
"""


def embedding(direction: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor([direction]), 64).float()


def clip(direction: int, generator: torch.Generator) -> Tensor:
    """A blob [16, 3, 8, 8] that moves two latents a frame, in colours and on a ground that 16 channels tell apart."""
    channels = torch.randn(2, 16, generator=torch.Generator().manual_seed(7))
    centre = 4 + 1.5 * torch.randn(2, generator=generator)
    frames = []
    for frame in range(3):
        y, x = (torch.arange(8) - at for at in centre + 2 * (frame - 1) * DIRECTIONS[direction])
        blob = torch.exp(-(y[:, None] ** 2 + x[None] ** 2) / 4)
        frames.append(1.5 * channels[0, :, None, None] * blob + 0.5 * channels[1, :, None, None] * (1 - blob))
    return torch.stack(frames, 1) + 0.1 * torch.randn(16, 3, 8, 8, generator=generator)


def train(folder: Path, name: str, method: str, roles: str, steps: int, batch: int) -> Trainer:
    data, job = folder / "clips.parquet", folder / f"{name}.toml"
    if not data.exists():
        generator = torch.Generator().manual_seed(0)
        rows = [LatentRow(str(i), "a blob", embedding(i % 4), clip(i % 4, generator)) for i in range(1024)]
        write_rows(data, rows)
    job.write_text(JOB.format(name=name, method=method, roles=roles, data=data, steps=steps, batch=batch))
    arguments = ["--job.config_file", str(job), "--job.output_dir", str(folder / name)]
    return assemble(resolve(load_config(arguments), 1), World(0, 1, CPU))


def sample(trainer: Trainer, role: RoleHandle, request: SampleRequest) -> Tensor:
    made = []
    for start in range(0, NUM_SAMPLES, 48):
        ids = range(start, start + 48)
        text = torch.stack([torch.cat([embedding(i % 4), torch.zeros(1, 64)]) for i in ids])
        made.append(Sampling(trainer.adapter, KeyedNoise(1), CPU).run(request, role, {"text": text}, ids))
    return torch.cat(made)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return sliced_wasserstein_excess(project([*a]), project([*b]))


def distances(folder: Path, teacher_steps: int, student_steps: int) -> tuple[float, float]:
    """Excess sliced Wasserstein distance of few-step samples to the teacher's, before and after."""
    scratch = "\n".join(
        ("[roles.student]", 'flavor = "tiny"', "trainable = true", "optimizer = { lr = 1e-3 }",
         "[method_config]", "cfg_dropout = 0.0")
    )  # fmt: skip
    train(folder, "teacher", "finetune", scratch, teacher_steps, 16).run()
    weights = f'init_from = "{folder}/teacher/checkpoints/latest#student:ema"\nflavor = "tiny"\ntrainable = '
    roles = "\n".join(
        (
            f"[roles.teacher]\n{weights}false",
            f"[roles.student]\n{weights}true\noptimizer = {{ lr = 2e-4 }}",
            f"[roles.critic]\n{weights}true\noptimizer = {{ lr = 6e-4 }}",
            "[method_config]\ndenoising_steps = [1000.0, 500.0]\nupdate_ratio = 2\nguidance_scale = 1.0",
        )
    )
    trainer = train(folder, "student", "dmd2", roles, student_steps, 8)
    few = SampleRequest("student", "student", "sde", len(SIGMAS), SIGMAS)
    reference = sample(trainer, trainer.roles["teacher"], SampleRequest("teacher", "teacher", "euler", 48))
    found = [distance(sample(trainer, trainer.roles["student"], few), reference)]
    trainer.run()
    with trainer.roles["student"].evaluation():
        found.append(distance(sample(trainer, trainer.roles["student"], few), reference))
    return found[0], found[1]


def test_few_steps_come_close_to_many(tmp_path: Path) -> None:
    before, after = distances(tmp_path, teacher_steps=700, student_steps=1500)
    print(f"T3: excess sliced Wasserstein distance {before:.4f} before, {after:.4f} after")
    assert after <= 0.07 and after <= 0.5 * before, (before, after)
