"""Own footage in two commands: preprocess a folder of films, finetune on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from runs import REPOSITORY, TINY_WAN, read_metrics
from tiny_media import write_film

from titan_distill.cli import main as cli
from titan_distill.config.loading import load_config
from titan_distill.data.footage import VideoSize, read_clips
from titan_distill.data.parquet import ParquetDataset
from titan_distill.models.base import model_family
from titan_distill.parallelisms.mesh import Layouts
from titan_distill.train import main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    for seed, name in enumerate(("clouds.mp4", "meadow.mp4")):
        write_film(folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def data(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two films as parquet latents, through the small VAE and text encoder."""
    folder = tmp_path_factory.mktemp("footage")
    captions = folder / "captions.csv"
    captions.write_text("file_name,caption\nclouds.mp4,clouds at dusk\nmeadow.mp4,a flowering meadow\n")
    wan = str(TINY_WAN)
    parts = ["--captions", str(captions), "--vae", wan, "--text-encoder", wan, "--out", str(folder / "data")]
    cli(["data", "preprocess", str(films), *parts])
    return folder / "data"


def test_finetuning_on_films_lowers_the_loss(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From drawn shapes to films: after 60 steps the mean loss of the last ten is below 0.8 of the first ten's."""
    monkeypatch.chdir(REPOSITORY)
    argv = ["--job.config_file", "train_configs/tiny_wan_finetune.toml", "--data.path", str(data)]
    short = ["--training.steps", "60", "--training.global_batch_size", "6", "--training.local_batch_size", "6"]
    off = ["--validation.enabled", "false", "--checkpoint.enabled", "false", "--job.output_dir", str(tmp_path)]
    assert main([*argv, *short, *off, "--optimizer.lr", "1e-3"]) == 0
    losses = [line["loss/student"] for line in read_metrics(tmp_path)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_stored_latents_decode_to_the_footage(data: Path, films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded frames follow the footage they came from, and not the other film: recognisable, not merely present."""
    monkeypatch.chdir(REPOSITORY)
    config = load_config(["--job.config_file", "train_configs/tiny_wan_finetune.toml"])
    adapter = model_family("wan")(config).build_adapter(CPU, Layouts.alone(CPU))
    rows = [ParquetDataset(data)[index] for index in range(6)]
    first = next(row for row in rows if row.file_name.startswith("clouds")).vae_latent
    assert first is not None
    decoded = adapter.decode_latents(first[None].float())[0].double().permute(0, 3, 1, 2)
    assert _correlation(decoded, films / "clouds.mp4") > 0.7
    assert _correlation(decoded, films / "meadow.mp4") < 0.3


def _correlation(frames_T3HW: torch.Tensor, film: Path) -> float:
    clip = next(iter(read_clips(film, VideoSize(17, 96, 96, 8.0))))
    return torch.corrcoef(torch.stack([frames_T3HW.flatten(), clip.pixels.double().flatten()]))[0, 1].item()
