"""Datasets that FastVideo's preprocessing wrote: the same samples and losses as from ours."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import fastvideo_data
import pytest
import tiny_ti2v
import torch

from titan_distill.config.loading import load_config
from titan_distill.data.latents import LatentStatistics, distance, find_form, measure
from titan_distill.data.loader import Batch
from titan_distill.data.parquet import LatentRow, ParquetDataset, write_rows
from titan_distill.parallelisms.mesh import World
from titan_distill.resolve import resolve
from titan_distill.train import assemble
from titan_distill.trainer import Trainer

MEAN, STD = (torch.linspace(*ends, tiny_ti2v.CHANNELS) for ends in ((-0.1, 0.1), (0.2, 0.5)))
STATISTICS = LatentStatistics(tuple(MEAN.tolist()), tuple(STD.tolist()))
UNIT = LatentStatistics((0.0,) * tiny_ti2v.CHANNELS, (1.0,) * tiny_ti2v.CHANNELS)


def by_channel(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ti2v.write_pipeline(tmp_path_factory.mktemp("ti2v"))


@pytest.fixture(scope="module")
def rows() -> list[LatentRow]:
    """Twelve rows whose latents are raw."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(tiny_ti2v.LATENT_SHAPE, generator=generator) for _ in range(12)]
    texts = [torch.randn(3 + index, tiny_ti2v.TEXT_WIDTH, generator=generator) for index in range(12)]
    raw = [by_channel(MEAN) + by_channel(STD) * latent for latent in noise]
    return [LatentRow(str(i), f"clip {i}", text, latent) for i, (text, latent) in enumerate(zip(texts, raw))]


def records(rows: list[LatentRow]) -> list[dict[str, object]]:
    return [
        fastvideo_data.record(row.id, row.caption, {"vae_latent": row.vae_latent, "text_embedding": row.text_embedding})
        for row in rows
    ]


def trainer(pipeline: Path, data: Path, output: Path, *overrides: str) -> Trainer:
    argv = tiny_ti2v.arguments("finetune", pipeline, data, output, *overrides)
    return assemble(resolve(load_config(argv), 1), World(rank=0, size=1, device=torch.device("cpu")))


def losses(pipeline: Path, data: Path, output: Path, *overrides: str) -> tuple[list[float], Batch]:
    run = trainer(pipeline, data, output, *overrides)
    first = run.adapter.prepare_batch(next(run.loader))
    run.loader.load_state_dict({"samples_seen": 0})
    found = []
    for _ in range(2):
        found.append(dict(run.run_step())["student"]["loss/student"])
        run.state.step += 1
    return found, first


@pytest.mark.parametrize("workers", [0, 3])
def test_same_losses_as_from_our_own_rows(
    workers: int, rows: list[LatentRow], pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    normalised = [
        LatentRow(row.id, row.caption, row.text_embedding, (row.vae_latent - by_channel(MEAN)) / by_channel(STD))
        for row in rows
        if row.vae_latent is not None
    ]
    write_rows(tmp_path / "ours" / "clips.parquet", normalised)
    theirs = fastvideo_data.write(
        tmp_path / "theirs", records(rows), fastvideo_data.T2V, rows_per_file=2, workers=workers
    )
    own, own_batch = losses(pipeline, tmp_path / "ours", tmp_path / "a")
    with caplog.at_level(logging.INFO, "titan_distill.data.latents"):
        found, batch = losses(pipeline, theirs, tmp_path / "b")
    assert "The latents are raw" in caplog.text
    assert batch.captions == own_batch.captions
    assert batch.latents is not None and own_batch.latents is not None
    assert torch.equal(batch.latents, own_batch.latents)
    assert found == own


def test_a_wrong_stated_form_is_a_warning_with_figures(
    rows: list[LatentRow], pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = fastvideo_data.write(tmp_path / "x", records(rows), fastvideo_data.T2V, rows_per_file=12, workers=1)
    run = trainer(pipeline, theirs, tmp_path / "run", "--data.latents", "normalised")
    assert 'data.latents = "normalised" looks wrong, the latents seem raw' in caplog.text
    latents = run.adapter.prepare_batch(next(run.loader)).latents
    assert latents is not None and latents.std() < 0.6  # as they are stored


def test_form_of_latents(rows: list[LatentRow]) -> None:
    raw = [row.vae_latent for row in rows if row.vae_latent is not None]
    normalised = [(latent - by_channel(MEAN)) / by_channel(STD) for latent in raw]
    find = partial(find_form, stated=None, is_foreign=True)
    assert (find(raw, STATISTICS), find(normalised, STATISTICS)) == ("raw", "normalised")
    measured = measure(raw)
    assert measured is not None
    expected = (MEAN.abs() + STD.log().abs()).mean()
    assert distance(measured, UNIT) == pytest.approx(expected.item(), rel=0.05)
    assert distance(measured, STATISTICS) < 0.1
    faint = [0.01 * latent for latent in normalised]
    with pytest.raises(ValueError, match=r"may be raw or normalised: .* a distance of \d.*; set data\.latents to"):
        find(faint, STATISTICS)
    assert find_form(faint, STATISTICS, None, is_foreign=False) == "normalised", "as before the comparison"
    assert find_form(faint, STATISTICS, "raw", is_foreign=True) == "raw"


def test_without_a_vae_the_form_of_foreign_latents_is_asked_for(rows: list[LatentRow]) -> None:
    raw = [row.vae_latent for row in rows if row.vae_latent is not None]
    unknown = LatentStatistics()
    with pytest.raises(ValueError, match=r'set data\.latents to "raw" or "normalised", and for raw ones'):
        find_form(raw, unknown, None, is_foreign=True)
    with pytest.raises(ValueError, match=r'data\.latents = "raw" needs the VAE'):
        find_form(raw, unknown, "raw", is_foreign=True)
    assert find_form(raw, unknown, "normalised", is_foreign=True) == "normalised"
    assert find_form(raw, unknown, None, is_foreign=False) == "normalised"


def test_text_only_rows(tmp_path: Path) -> None:
    text = torch.randn(5, 16)
    row = fastvideo_data.record("text_0", "a cat", {"text_embedding": text})
    fastvideo_data.write(tmp_path, [row], fastvideo_data.TEXT_ONLY, rows_per_file=1, workers=1)
    found = ParquetDataset(tmp_path)[0]
    assert found.caption == "a cat" and found.vae_latent is None and torch.equal(found.text_embedding, text)


def test_pictures_have_their_names(tmp_path: Path) -> None:
    """Raw latents are normalised, the picture's latent is already."""
    tensors = {
        "vae_latent": by_channel(MEAN) + by_channel(STD) * torch.randn(tiny_ti2v.LATENT_SHAPE),
        "text_embedding": torch.randn(5, 16),
        "first_frame_latent": torch.randn(tiny_ti2v.LATENT_SHAPE),
        "clip_feature": torch.randn(7, 8),
        "pil_image": None,
    }
    row = fastvideo_data.record("0", "a cat", tensors)
    fastvideo_data.write(tmp_path, [row], fastvideo_data.I2V, rows_per_file=1, workers=1)
    dataset = ParquetDataset(tmp_path, tensors=("image_latent", "image_embedding"), for_batches=True)
    dataset.normalise_latents(STATISTICS, "raw")
    found = dataset[0]
    assert torch.equal(found.extra["image_latent"], tensors["first_frame_latent"])
    assert torch.equal(found.extra["image_embedding"], tensors["clip_feature"])
    assert found.vae_latent is not None and tensors["vae_latent"] is not None
    expected = (tensors["vae_latent"] - by_channel(MEAN)) / by_channel(STD)
    assert torch.equal(found.vae_latent, expected)


def test_a_state_of_a_trajectory_is_at_the_next_timestep(tmp_path: Path) -> None:
    """On the straight path from noise to x0 each state must be `(1 - t) x0 + t noise` of the timestep beside it."""
    timesteps = torch.tensor([1000.0, 750.0, 500.0, 250.0])
    x0, noise = torch.randn(2, *tiny_ti2v.LATENT_SHAPE)
    after_each_step = [(1 - t) * x0 + t * noise for t in (0.75, 0.5, 0.25, 0.0)]
    tensors = {
        "text_embedding": torch.randn(5, 16),
        "trajectory_latents": torch.stack(after_each_step)[None],
        "trajectory_timesteps": timesteps,
    }
    row = fastvideo_data.record("0", "a cat", tensors)
    fastvideo_data.write(tmp_path, [row], fastvideo_data.TRAJECTORIES, rows_per_file=1, workers=1)
    dataset = ParquetDataset(tmp_path, tensors=("trajectory", "trajectory_timesteps"))
    dataset.normalise_latents(STATISTICS, None)  # sampled latents are normalised
    found = dataset[0]
    assert found.vae_latent is not None and torch.equal(found.vae_latent, x0)
    assert found.extra["trajectory_timesteps"].tolist() == [750.0, 500.0, 250.0]
    for state, t in zip(found.extra["trajectory"], (0.75, 0.5, 0.25), strict=True):
        assert torch.equal(state, (1 - t) * x0 + t * noise)


def test_linked_folders_are_read_once(rows: list[LatentRow], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = fastvideo_data.write(
        tmp_path / "elsewhere", records(rows[:6]), fastvideo_data.T2V, rows_per_file=6, workers=1
    )
    data = fastvideo_data.write(tmp_path / "data", records(rows[6:]), fastvideo_data.T2V, rows_per_file=6, workers=1)
    (data / "linked").symlink_to(elsewhere)
    (data / "worker_0" / "loop").symlink_to(data)
    dataset = ParquetDataset(data)
    assert sorted(int(dataset[index].id) for index in range(len(dataset))) == list(range(12))
    assert "loop is left out: it is the same folder as" in caplog.text


def test_files_of_a_folder_are_read_without_those_below_it(rows: list[LatentRow], tmp_path: Path) -> None:
    """As before there were datasets in subfolders."""
    write_rows(tmp_path / "a.parquet", rows[:2])
    write_rows(tmp_path / "old" / "b.parquet", rows[2:])
    assert len(ParquetDataset(tmp_path)) == 2
