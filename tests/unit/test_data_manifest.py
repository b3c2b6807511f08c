"""Manifest of data: what made it is recorded, and a run with other encoders or sizes is refused before it trains."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY_WAN
from tiny_media import write_video
from toy_run import toy_pairs, toy_trainer

from titan_distill.commands.preprocess import PreprocessConfig, preprocess
from titan_distill.config.loading import load_config
from titan_distill.config.parsing import ConfigError
from titan_distill.config.sections import DataConfig, DataSource
from titan_distill.data.latents import LatentStatistics
from titan_distill.data.loader import AnyDataset, open_dataset
from titan_distill.data.manifest import (
    MANIFEST_NAME,
    DataManifest,
    check_manifest,
    read_manifest,
    write_manifest,
)
from titan_distill.data.parquet import LatentRow, write_rows
from titan_distill.resolve import resolve
from titan_distill.train import open_inputs

MANIFEST = DataManifest(latents="normalised", vae="a" * 64, text_encoder="b" * 64, sizes=((17, 96, 96),), fps=8.0)


def test_is_read_as_written_for_the_folder_and_its_files(tmp_path: Path) -> None:
    assert read_manifest(tmp_path / "data") is None
    write_manifest(tmp_path / "data", MANIFEST)
    write_manifest(tmp_path / "data", MANIFEST)
    assert read_manifest(tmp_path / "data") == read_manifest(tmp_path / "data" / "a.parquet") == MANIFEST
    other = dataclasses.replace(MANIFEST, fps=16.0)
    with pytest.raises(ValueError, match=r"data holds data with fps = 8\.0 instead of 16\.0; choose another folder"):
        write_manifest(tmp_path / "data", other)
    assert read_manifest(tmp_path / "data") == MANIFEST


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format_version 2, but this titan_distill reads up to 1"),
        ({"format_version": None}, "is no manifest of data .format_version is None"),
        ({"latents": "scaled"}, "latents is 'scaled'"),
        ({"vae": 3}, "vae is 3"),
        ({"fps": -1}, "fps is -1"),
        ({"sizes": [[17, 96]]}, "not enough values"),
        ({"sizes": [[17, 96, 0]]}, r"a size is \[17, 96, 0\]"),
        ({"sizes": 3}, "not iterable"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_damaged_or_newer(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_manifest(tmp_path, MANIFEST)
    content = json.loads((tmp_path / MANIFEST_NAME).read_text(encoding="utf-8"))
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(content | change), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "[" * 10_000])
def test_not_an_object(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="is no manifest of data"):
        read_manifest(tmp_path)


def test_other_encoders_and_sizes_are_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    same = {"vae": "a" * 64, "text_encoder": "b" * 64, "tokenizer": "c" * 64}
    check_manifest(tmp_path, encoders=same, sizes=[(17, 96, 96), (9, 64, 64)], needs_latents=True)
    check_manifest(tmp_path, encoders={}, sizes=[], needs_latents=True)
    # A run that reads no latents does not care who made them.
    check_manifest(tmp_path, encoders=same | {"vae": "d" * 64}, sizes=[(9, 64, 64)], needs_latents=False)
    with pytest.raises(ValueError, match=r"made with the vae aaaaaaaaaaaa, but that of the run is dddd"):
        check_manifest(tmp_path, encoders=same | {"vae": "d" * 64}, sizes=[], needs_latents=True)
    with pytest.raises(ValueError, match="made with the text encoder bbbb"):
        check_manifest(tmp_path, encoders=same | {"text_encoder": "d" * 64}, sizes=[], needs_latents=False)
    with pytest.raises(ValueError, match="frames × height × width 17 × 96 × 96, but the run trains on 9 × 64 × 64"):
        check_manifest(tmp_path, encoders=same, sizes=[(9, 64, 64)], needs_latents=True)


def test_a_size_that_the_run_does_not_take_is_told_at_the_start(tmp_path: Path) -> None:
    """Its rows may come hours later."""
    write_manifest(tmp_path, dataclasses.replace(MANIFEST, sizes=((17, 96, 96), (9, 64, 64))))
    with pytest.raises(ValueError, match=r"17 × 96 × 96, 9 × 64 × 64, but the run trains on 17 × 96 × 96; name all"):
        check_manifest(tmp_path, encoders={}, sizes=[(17, 96, 96)], needs_latents=True)


def write_part(folder: Path, manifest: DataManifest | None, offset: float = 0.0) -> Path:
    latent = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + offset
    write_rows(folder / "a.parquet", [LatentRow(folder.name, "a", torch.zeros(1, 1), latent)])
    if manifest is not None:
        write_manifest(folder, manifest)
    return folder


def open_parts(data: DataConfig, **options: Any) -> AnyDataset:
    far = LatentStatistics((5.0, 5.0), (1.0, 1.0))
    return open_dataset(data, tensors=(), video_size=None, needs_latents=True, statistics=far, **options)


def test_manifests_of_subfolders_count(tmp_path: Path) -> None:
    plain = DataManifest(latents="normalised", vae="a" * 64)
    write_part(tmp_path / "one", plain)
    write_part(tmp_path / "two", dataclasses.replace(plain, vae="b" * 64))
    data = DataConfig(path=str(tmp_path))
    with pytest.raises(ValueError, match=r"two/titan_data\.json says that the data was made with the vae bbbb"):
        open_parts(data, encoders={"vae": "a" * 64})
    write_part(tmp_path / "three", dataclasses.replace(plain, latents="raw"), offset=5.0)
    with pytest.raises(ValueError, match=r"there are normalised latents in .* and raw latents in .*/three; name these"):
        open_parts(data)


def test_the_form_in_a_manifest_goes_before_the_stated_one(tmp_path: Path) -> None:
    """`data.latents` is for the sets of a mixture that have no manifest; if none is without, it contradicts."""
    ours = write_part(tmp_path / "ours", DataManifest(latents="normalised"))
    theirs = write_part(tmp_path / "theirs", None, offset=5.0)
    sources = tuple(DataSource(path=str(path)) for path in (ours, theirs))
    dataset = open_parts(DataConfig(sources=sources, latents="raw"))
    first, second = dataset[0], dataset[1]
    assert isinstance(first, LatentRow) and isinstance(second, LatentRow)
    assert first.vae_latent is not None and second.vae_latent is not None
    torch.testing.assert_close(first.vae_latent, second.vae_latent, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"data\.latents = 'raw', but titan_data\.json in .*/ours says 'normalised'"):
        open_parts(DataConfig(path=str(ours), latents="raw"))


def test_preprocess_records_its_encoders_and_another_vae_is_refused(tmp_path: Path) -> None:
    """The tiny Wan's data trains with its own pipeline; with other encoders the run ends in a sentence."""
    write_video(tmp_path / "videos" / "a.mp4", num_frames=5, fps=8)
    (tmp_path / "captions.csv").write_text("file_name,caption\na.mp4,a ramp", encoding="utf-8")
    sizes = {"num_frames": 5, "height": 64, "width": 64}
    preprocess(
        PreprocessConfig(
            folder=tmp_path / "videos", captions=tmp_path / "captions.csv", out=tmp_path / "data",
            vae=TINY_WAN, text_encoder=TINY_WAN, **sizes,
        )
    )  # fmt: skip
    manifest = read_manifest(tmp_path / "data")
    assert manifest is not None and manifest.latents == "normalised"
    assert (manifest.sizes, manifest.fps) == (((5, 64, 64),), 8.0)
    assert len({manifest.vae, manifest.text_encoder, manifest.tokenizer}) == 3 and len(manifest.vae) == 64

    def opened(pipeline: Path, frames: int = 5) -> object:
        size = [word for key, value in sizes.items() for word in (f"--pipeline_config.{key}", str(value))]
        argv = [
            "--job.config_file", "train_configs/tiny_wan_finetune.toml", "--job.output_dir", str(tmp_path / "run"),
            "--data.path", str(tmp_path / "data"), "--validation.enabled", "false",
            "--pipeline_config.path", str(pipeline), *size, "--pipeline_config.num_frames", str(frames),
        ]  # fmt: skip
        return open_inputs(resolve(load_config(argv), 1))

    opened(TINY_WAN)
    with pytest.raises(ConfigError, match=r"clips have frames × height × width 5 × 64 × 64, but the run trains on 9 ×"):
        opened(TINY_WAN, frames=9)
    content = json.loads((tmp_path / "data" / MANIFEST_NAME).read_text(encoding="utf-8"))
    (tmp_path / "data" / MANIFEST_NAME).write_text(json.dumps(content | {"vae": "0" * 64}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.path = .*titan_data\.json says that the data was made with the vae"):
        opened(TINY_WAN)


def test_pairs_have_a_manifest(tmp_path: Path) -> None:
    toy_trainer(tmp_path, "finetune")
    pairs = toy_pairs(tmp_path, tmp_path / "toy.parquet")
    assert read_manifest(pairs) == DataManifest(latents="normalised")
