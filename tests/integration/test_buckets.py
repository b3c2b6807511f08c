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


@pytest.mark.nightly
def test_the_held_out_loss_has_rows_of_all_buckets(folder: Path) -> None:
    """Its sums are those of runs with only one shape, on the same rows under the same ids."""
    held_out = ("--validation.data", str(write_buckets(folder / "held_out", (1, 3, 2))))
    mixed = trainer_of(folder, "mixed", *BUCKETS.split(), *held_out)
    assert mixed.held_out is not None
    measured = mixed.held_out.measure(0, mixed.roles)
    assert {size: len(rows) for size, rows in zip(SHAPES, by_bucket(mixed), strict=True)} == {
        SHAPES[0]: 1,
        SHAPES[1]: 3,
        SHAPES[2]: 2,
    }
    total = 0.0
    for size, rows in zip(SIZES, by_bucket(mixed), strict=True):
        keys = zip(("num_frames", "height", "width"), size, strict=True)
        one_size = [word for key, value in keys for word in (f"--pipeline_config.{key}", str(value))]
        write_buckets(folder / str(size) / "data", tuple(4 * (other == size) for other in SIZES))  # type: ignore[arg-type]
        alone = trainer_of(folder / str(size), "run", *one_size, *held_out_of(folder, size))
        assert alone.held_out is not None
        alone.held_out.rows, alone.held_out.num_rows = mixed.held_out.rows, len(rows)
        alone.held_out._by_shape = lambda rows=rows: [rows]  # type: ignore[method-assign]
        total += len(rows) * alone.held_out.measure(0, alone.roles)["loss/student"]
    assert measured["loss/student"] == pytest.approx(total / 6, rel=1e-6)


def by_bucket(trainer: Trainer) -> list[list[int]]:
    """Held-out rows in the order of the buckets."""
    assert trainer.held_out is not None
    rows = trainer.held_out.rows
    return [[index for index in range(len(rows)) if rows.shape(index) == shape] for shape in SHAPES]


def held_out_of(folder: Path, size: tuple[int, int, int]) -> tuple[str, str]:
    counts = tuple(2 * (other == size) for other in SIZES)
    return "--validation.data", str(write_buckets(folder / "alone" / str(size), counts))  # type: ignore[arg-type]


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
