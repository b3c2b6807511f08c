"""Training on samples of several shapes: each global batch has one, and counts as it would alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bucket_data import BUCKETS, SHAPES, SIZES, write_buckets
from runs import REPOSITORY, tiny_argv

from titan_distill.config.loading import load_config
from titan_distill.config.parsing import ConfigError
from titan_distill.parallelisms.mesh import World
from titan_distill.resolve import resolve
from titan_distill.train import assemble
from titan_distill.trainer import Trainer

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


def trainer_of(folder: Path, name: str, *overrides: str) -> Trainer:
    """A run at learning rate 0."""
    options = ("--data.path", str(folder / "data"), "--checkpoint.enabled", "false", *overrides)
    trainer = assemble(resolve(load_config(tiny_argv("finetune", folder / name, *options)), 1), WORLD)
    role = trainer.roles["student"]
    for group in role.optimizers["transformer"].param_groups:
        group["lr"] = 0.0
    role.schedulers["transformer"].base_lrs = [0.0]
    return trainer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(REPOSITORY)
    write_buckets(tmp_path / "data")
    return tmp_path


@pytest.mark.nightly
def test_a_buckets_loss_is_that_of_a_run_with_only_its_shape(folder: Path) -> None:
    """At learning rate 0, on the same samples under the same ids. Every bucket has global_batch_size samples a step."""
    mixed = trainer_of(folder, "mixed", *BUCKETS.split())
    loader, batches, losses, shapes = mixed.loader, [], [], []
    for step in range(8):
        batch = next(loader)
        batches.append(batch)
        mixed.loader = iter([batch])  # type: ignore[assignment]
        mixed.state.step = step
        losses.append(next(values["loss/student"] for part, values in mixed.run_step() if part == "student"))
        shapes.append(mixed.adapter.latent_shape)
        assert batch.latents is not None and batch.latents.shape == (4, *mixed.adapter.latent_shape)
        assert batch.sample_ids == list(range(4 * step, 4 * step + 4))
    assert set(shapes) == set(SHAPES)

    for size, shape in zip(SIZES, SHAPES, strict=True):
        keys = zip(("num_frames", "height", "width"), size, strict=True)
        one_size = [word for key, value in keys for word in (f"--pipeline_config.{key}", str(value))]
        only = folder / "only" / str(size)
        write_buckets(only / "data", tuple(4 * (other == size) for other in SIZES))  # type: ignore[arg-type]
        alone = trainer_of(only, "run", *one_size)
        assert alone.adapter.latent_shape == shape
        for step in [step for step in range(8) if shapes[step] == shape]:
            alone.loader = iter([batches[step]])  # type: ignore[assignment]
            alone.state.step = step
            alone.adapter.latent_shape = shape
            batch_loss = next(values["loss/student"] for part, values in alone.run_step() if part == "student")
            assert batch_loss == losses[step]


def test_buckets_that_dont_fit_are_refused_in_a_sentence(folder: Path) -> None:
    for buckets, message in (
        ("[[5,64,96],[5,64,96]]", "pipeline_config.buckets names one size twice"),
        ("[[5,64,90]]", r"width of pipeline_config\.buckets\[0\] = 90 must be a multiple of 16"),
        ("[[6,64,96]]", r"num_frames of pipeline_config\.buckets\[0\] = 6 must be 4 n \+ 1"),
    ):
        argv = tiny_argv("finetune", folder / "run", "--data.path", str(folder), "--pipeline_config.buckets", buckets)
        with pytest.raises(ConfigError, match=message):
            resolve(load_config(argv), 1)


def test_the_planner_and_layouts_take_the_largest_bucket(folder: Path) -> None:
    argv = tiny_argv("finetune", folder / "run", "--data.path", str(folder / "data"), *BUCKETS.split())
    family = resolve(load_config(argv), 1).family
    assert family.token_grid() == (4, 4, 4) and list(family.buckets().values()) == list(SHAPES)
