"""Footage to parquet with a tiny VAE and text encoder of random weights: real decoding, real libraries, no mocks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_family
import tyro
from diffusers import AutoencoderKLWan
from tiny_media import write_film, write_pipeline, write_video

from titan_distill.commands.preprocess import PreprocessConfig, preprocess, read_captions
from titan_distill.config.paths import of_key
from titan_distill.data.loader import SampleLoader
from titan_distill.data.parquet import ParquetDataset
from titan_distill.data.summary import inspect

CAPTION = "a grey ramp"


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


def write_captions(path: Path, captions: dict[str, str]) -> Path:
    lines = [json.dumps({"file_name": name, "caption": caption}) for name, caption in captions.items()]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def config(tmp_path: Path, pipeline_folder: Path) -> PreprocessConfig:
    """Two videos: 12 frames per second for 2 seconds, and 8 for 1.25 seconds."""
    write_video(tmp_path / "videos" / "a.mp4", num_frames=24, fps=12)
    write_video(tmp_path / "videos" / "more" / "b.mp4", num_frames=10, fps=8, size=(96, 48))
    return PreprocessConfig(
        folder=tmp_path / "videos",
        captions=write_captions(tmp_path / "captions.jsonl", {"a.mp4": CAPTION, "more/b.mp4": "another"}),
        vae=pipeline_folder,
        text_encoder=pipeline_folder,
        out=tmp_path / "out",
        height=32,
        width=48,
        num_frames=5,
        fps=8.0,
        dtype="float32",
    )


def test_captions_in_csv_and_jsonl_are_the_same(tmp_path: Path) -> None:
    captions = {"a.mp4": 'says "hi", twice', "sub/b.mp4": "größer"}
    (tmp_path / "c.csv").write_bytes(
        '\ufefffile_name,seconds,caption\na.mp4,3,"says ""hi"", twice"\nsub/b.mp4,4,größer\n'.encode()
    )
    assert read_captions(tmp_path / "c.csv", tmp_path) == captions
    assert read_captions(write_captions(tmp_path / "c.jsonl", captions), tmp_path) == captions


BAD_CAPTIONS = {
    "c.txt": ("", r"c\.txt ends in '\.txt': expected \.csv, \.tsv, \.jsonl, \.json"),
    "absent.csv": (None, r"no such captions file"),
    "columns.csv": (
        "name,caption\na,b\n",
        "line 2: there is no video or .* among the columns name, caption",
    ),
    "empty.csv": ("", "is empty: expected a line with the names of the columns"),
    "blank.csv": ("file_name,caption\na.mp4,x\nb.mp4, \n", "line 3: expected a non-empty file_name and caption"),
    "short.csv": ("file_name,caption\na.mp4\n", "line 2: expected a non-empty file_name and caption"),
    "twice.csv": ("file_name,caption\na.mp4,x\na.mp4,y\n", r"line 3: a\.mp4 has a second caption here"),
    "broken.jsonl": ('\n{"file_name": "a.mp4",\n', "line 2: not JSON"),
    "list.jsonl": ('["a.mp4", "x"]', "line 1: expected a JSON object with a video and its caption"),
    "deep.jsonl": ("[" * 100_000, "line 1: not JSON"),
    "blank.jsonl": ('\n{"file_name": "a.mp4", "caption": " "}', "line 2: expected a non-empty file_name and caption"),
    "long.csv": (f"file_name,caption\na.mp4,{'x' * 200_000}\n", "after line 1: not CSV"),
    "latin.csv": ("file_name,caption\na.mp4,größe\n".encode("latin-1"), r"is not valid UTF-8 \(.* at byte 26"),
    "wide.jsonl": ('{"file_name": "a.mp4", "caption": "x"}'.encode("utf-16"), "is not valid UTF-8"),
    "number.jsonl": ('{"file_name": "a.mp4", "caption": 3}', "line 1: expected a non-empty file_name and caption"),
}


@pytest.mark.parametrize("name", list(BAD_CAPTIONS))
def test_bad_captions_file_is_named(tmp_path: Path, name: str) -> None:
    content, message = BAD_CAPTIONS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error, of_key("--captions", tmp_path / name):
        read_captions(tmp_path / name, tmp_path)
    assert name in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_folder_to_parquet(config: PreprocessConfig, pipeline_folder: Path) -> None:
    assert preprocess(config).startswith(f"{config.out}: 5 clips of 2 videos, 5 of them made now")
    summary = inspect(config.out)
    assert summary.num_rows == 5  # 16 frames make three clips of 5, 10 make two
    assert summary.latents == {"[16, 2, 4, 6] float32": 5}
    assert not summary.bad_rows

    rows = [ParquetDataset(config.out)[index] for index in range(5)]
    assert [row.id for row in rows] == [
        "a.mp4-0000",
        "a.mp4-0001",
        "a.mp4-0002",
        "more/b.mp4-0000",
        "more/b.mp4-0001",
    ]
    assert [row.caption for row in rows] == [CAPTION] * 3 + ["another"] * 2
    row = rows[1]
    assert (row.file_name, row.width, row.height, row.num_frames, row.fps) == ("a.mp4", 48, 32, 5, 8.0)
    assert row.duration_sec == pytest.approx(5 / 8)
    assert row.text_embedding.shape == (len(CAPTION) + 1, 16)  # bytes and the end token, unpadded

    vae = AutoencoderKLWan.from_pretrained(pipeline_folder / "vae")
    # The second clip holds instants 5/8 to 9/8 s, whose nearest frames at 12 a second are:
    levels = torch.tensor([8, 9, 10, 12, 14]) * 8.0
    video_1CFHW = (levels / 127.5 - 1).view(1, 1, 5, 1, 1).expand(1, 3, 5, 32, 48)
    with torch.no_grad():
        z = vae.encode(video_1CFHW).latent_dist.mean[0]
    mean, std = (torch.tensor(v).view(16, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    scale = ((z - mean) / std).abs().max()
    assert (row.vae_latent - (z - mean) / std).abs().max() < 0.02 * scale, "up to the codec's rounding of grey levels"


def test_output_feeds_the_loader(config: PreprocessConfig) -> None:
    preprocess(dataclasses.replace(config, dtype="bfloat16", clips_per_video=1))
    dataset = ParquetDataset(config.out)
    batches = SampleLoader(dataset, global_batch_size=2, data_rank=0, data_world_size=1, seed=0, max_text_tokens=64)
    batch = next(batches)
    assert batch.latents is not None
    assert batch.latents.shape == (2, 16, 2, 4, 6)
    assert sorted(batch.captions) == [CAPTION, "another"]


def test_keeping_every_frame_records_the_videos_own_rate(config: PreprocessConfig) -> None:
    preprocess(dataclasses.replace(config, fps=None, num_frames=9))
    rows = list(map(ParquetDataset(config.out).__getitem__, range(3)))
    assert [round(row.fps, 6) for row in rows] == [12, 12, 8]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "frames": ({"num_frames": 8}, r"--num-frames = 8 must be 4 n \+ 1 for this VAE; set it to 5 or 9"),
    "height": ({"height": 40}, r"--height = 40 must be a multiple of 16 .*; set it to 32 or 48"),
    "width": ({"width": 0}, r"--width = 0 must be a multiple of 16 .*; set it to 16"),
    "fps": ({"fps": 0.0}, "--fps 0 is not positive"),
    "stride": ({"stride": -1}, "--stride -1 is not positive"),
    "too short": ({"num_frames": 13}, r"b\.mp4 has 10 frames at 8 frames per second, but a clip needs 13"),
    "folder": ({"folder": Path("/nowhere")}, "FOLDER = '/nowhere': there is no such folder"),
    "vae": ({"vae": Path("/nowhere")}, "no VAE in /nowhere"),
    "text encoder": ({"text_encoder": Path("/nowhere")}, "no text encoder in /nowhere"),
    "tokenizer": ({"tokenizer": Path("/nowhere")}, "no tokenizer folder /nowhere"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_settings_leave_nothing_behind(config: PreprocessConfig, case: str) -> None:
    """The video that is too short comes second, when rows of the first are already written."""
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as error:
        preprocess(dataclasses.replace(config, **change))
    assert "\n" not in str(error.value)
    assert not config.out.exists() or not list(config.out.iterdir())


def test_videos_and_captions_must_match(config: PreprocessConfig, tmp_path: Path) -> None:
    write_captions(config.captions, {"a.mp4": "x", "more/b.mp4": "y", "c.mp4": "z"})
    with pytest.raises(ValueError, match=r"captions\.jsonl names c\.mp4: no such video in"):
        preprocess(config)
    write_captions(config.captions, {"a.mp4": "x"})
    with pytest.raises(ValueError, match=r"captions\.jsonl has no caption for more/b\.mp4; add them"):
        preprocess(config)
    (tmp_path / "empty").mkdir()
    write_captions(config.captions, {})
    with pytest.raises(ValueError, match="no video in"):
        preprocess(dataclasses.replace(config, folder=tmp_path / "empty"))


def test_existing_output_is_not_replaced(config: PreprocessConfig) -> None:
    config.out.mkdir()
    (config.out / "clips.parquet").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"exists and .* does not; choose another"):
        preprocess(config)
    assert (config.out / "clips.parquet").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("family", "message"),
    [("toy", "ToyFamily encodes no footage; choose another --family"), ("wam", r"'wam' is not known; .* 'wan'")],
)
def test_the_family_brings_the_encoder(config: PreprocessConfig, family: str, message: str) -> None:
    assert toy_family.ToyFamily.__name__ == "ToyFamily", "registered by its import"
    with pytest.raises(ValueError, match=message):
        preprocess(dataclasses.replace(config, family=family))
    assert not config.out.exists()


def test_command_line() -> None:
    arguments = "videos --captions c.csv --vae v --text-encoder t --out o --fps None --height 64 --dtype bfloat16"
    config = tyro.cli(PreprocessConfig, args=arguments.split())
    assert (config.folder, config.fps, config.height, config.dtype) == (Path("videos"), None, 64, "bfloat16")


def test_wide_films_with_all_defaults(tmp_path: Path, pipeline_folder: Path) -> None:
    for seed, name in enumerate(("clouds.mp4", "meadow.mp4")):
        write_film(tmp_path / "films" / name, seed, num_frames=60)
    (tmp_path / "captions.csv").write_text("file_name,caption\nclouds.mp4,clouds\nmeadow.mp4,a meadow\n")
    preprocess(
        PreprocessConfig(
            folder=tmp_path / "films",
            captions=tmp_path / "captions.csv",
            vae=pipeline_folder,
            text_encoder=pipeline_folder,
            out=tmp_path / "out",
            clips_per_video=1,
        )
    )
    summary = inspect(tmp_path / "out")
    assert summary.latents == {"[16, 5, 12, 12] float16": 2}
    assert set(summary.captions) == {"clouds", "a meadow"}
