"""Preprocessing of videos as they come: good ones come out right, bad ones are named once, and a kill loses nothing."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import multiprocessing
import os
import random
import signal
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from forked import train_forked
from odd_clips import BAD, GOOD, OddClip, level, write_all, write_clip
from tiny_media import write_film, write_pipeline

from titan_distill.commands import clip_plan
from titan_distill.commands.clip_files import OutputFolder
from titan_distill.commands.clip_plan import crop_position, nearest_size
from titan_distill.commands.preprocess import PreprocessConfig, preprocess
from titan_distill.data.footage import ClipStart, VideoSize, read_clips
from titan_distill.data.manifest import read_manifest
from titan_distill.data.parquet import ParquetDataset
from titan_distill.data.probe import clip_starts, probe
from titan_distill.models.wan import vae as wan_vae

SIZE = VideoSize(9, 32, 48, 8.0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder videos/ and captions.jsonl."""
    folder = tmp_path_factory.mktemp("odd")
    write_captions(folder, write_all(folder / "videos"))
    return folder


def write_captions(folder: Path, captions: dict[str, str]) -> None:
    lines = (json.dumps({"file_name": name, "caption": caption}) for name, caption in captions.items())
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")


def config_for(folder: Path, pipeline: Path, out: Path, **changes: Any) -> PreprocessConfig:
    config = PreprocessConfig(
        folder=folder / "videos", captions=folder / "captions.jsonl", vae=pipeline, text_encoder=pipeline, out=out,
        height=SIZE.height, width=SIZE.width, num_frames=SIZE.num_frames, fps=SIZE.fps, dtype="float32",
        device="cpu",
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def green_levels(pixels_T3HW: torch.Tensor) -> list[float]:
    return pixels_T3HW[:, 1].float().mean((1, 2)).tolist()


@pytest.mark.parametrize("clip", GOOD, ids=lambda clip: clip.name)
def test_good_ones_are_upright_and_in_time(clip: OddClip, odd: Path) -> None:
    path = odd / "videos" / clip.name
    size = SIZE if clip.size[1] > clip.size[0] else VideoSize(9, 48, 32, 8.0)
    clips = list(read_clips(path, size))
    assert len(clips) == len(clip_starts(path, probe(path), size)) >= 2, "the probe counts without decoding"
    starts = np.array(clip.starts)
    for number, (pixels_T3HW, seconds) in enumerate(clips):
        instants = starts[0] + np.arange(9 * number, 9 * number + 9) / 8
        nearest = np.searchsorted((starts[1:] + starts[:-1]) / 2, instants, side="right")
        assert green_levels(pixels_T3HW) == pytest.approx([level(starts[index]) for index in nearest], abs=6)
        assert seconds == pytest.approx(9 / 8)
        red = pixels_T3HW[:, 0].float().mean(0)
        quarters = [half.mean() for rows in red.chunk(2, 0) for half in rows.chunk(2, 1)]
        assert int(torch.stack(quarters).argmax()) == 0, "the red quarter is the upper left one"


@pytest.mark.parametrize("clip", GOOD, ids=lambda clip: clip.name)
@pytest.mark.parametrize("fps", [8.0, None])
def test_a_clip_is_the_same_when_reading_begins_at_it(clip: OddClip, fps: float | None, odd: Path) -> None:
    path, size = odd / "videos" / clip.name, dataclasses.replace(SIZE, fps=fps, num_frames=5)
    facts = probe(path)
    whole, starts = list(read_clips(path, size, 4)), clip_starts(path, facts, size, 4)
    assert len(whole) == len(starts)
    for index in range(len(starts)):
        start = ClipStart(index, facts.starts[0], starts[index])
        alone = next(read_clips(path, size, 4, start=start))
        assert torch.equal(alone.pixels, whole[index].pixels)
        assert alone.duration_seconds == pytest.approx(whole[index].duration_seconds)


def test_pixels_that_are_not_square_are_widened(tmp_path: Path) -> None:
    path = write_clip(tmp_path, OddClip("a.mkv", size=(64, 128), pixel_aspect=Fraction(2)))
    facts = probe(path)
    assert (facts.height, facts.width) == (64, 128)
    (clip,) = read_clips(path, VideoSize(17, 64, 128, 8.0), 99)
    red = clip.pixels[0, 0] > 100
    sides = [int(red.any(dim).sum()) for dim in (1, 0)]
    assert sides == pytest.approx([32, 64], abs=2), "a quarter, and nothing is cropped"


def test_each_bad_one_is_named_once(
    odd: Path, pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(odd, pipeline, tmp_path / "out")
    with pytest.raises(ValueError, match=r"5 of 25 videos cannot be used: .* and 2 more\. Correct") as error:
        preprocess(config)
    assert "\n" not in str(error.value) and not config.out.exists(), "nothing was encoded"
    for name, reason in BAD.items():
        (line,) = [record.message for record in caplog.records if f"/{name} " in record.message]
        assert reason in line
    skipping = dataclasses.replace(config, on_error="skip")
    with pytest.raises(ValueError, match="--max-skipped 4 allows no more"):
        preprocess(dataclasses.replace(skipping, max_skipped=4))
    assert not config.out.exists()

    report = preprocess(skipping)
    assert "of 25 videos" in report and "5 videos and clips were left out, see skipped.csv" in report
    with (config.out / "skipped.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file_name"] for row in rows] == sorted(BAD)
    assert all(row["clips"] == "all" and BAD[row["file_name"]] in row["reason"] for row in rows)
    dataset = ParquetDataset(config.out)
    found = [dataset[index] for index in range(len(dataset))]
    assert {row.file_name for row in found} == {clip.name for clip in GOOD}
    assert all(list(row.vae_latent.shape) == [16, 3, 4, 6] for row in found if row.vae_latent is not None)
    assert sorted(path.name for path in config.out.iterdir() if path.suffix != ".parquet") == [
        "preprocess.json",
        "skipped.csv",
        "titan_data.json",
    ]
    assert preprocess(skipping).endswith(f"all {len(found)} clips are there")
    with pytest.raises(ValueError, match="clips made with batch_size = 1, not 2"):
        preprocess(dataclasses.replace(skipping, batch_size=2))


def damage(path: Path) -> None:
    """Overwrites the middle of a video. Its packets still have the right times, so only decoding notices."""
    data = bytearray(path.read_bytes())
    begin, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    first, last = begin + (end - begin) * 6 // 10, begin + (end - begin) * 9 // 10
    data[first:last] = bytes(last - first)
    path.write_bytes(data)


def test_damage_that_only_decoding_finds(pipeline: Path, tmp_path: Path) -> None:
    """The job stops and keeps the rest; skipping goes on from there."""
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_film(tmp_path / "videos" / name, seed=0, num_frames=72, size=(64, 96))
    damage(tmp_path / "videos" / "b.mp4")
    write_captions(tmp_path, dict.fromkeys(("a.mp4", "b.mp4", "c.mp4"), "clouds"))
    config = config_for(tmp_path, pipeline, tmp_path / "out")
    with pytest.raises(ValueError, match=r"b\.mp4 .*All that is made stays; .* --on-error skip"):
        preprocess(config)
    assert not list(config.out.glob("*.parquet")), "half a set is not trained on by accident"
    assert len(list((config.out / "unfinished").glob("*.parquet"))) >= 2
    for path in (config.out, config.out.parent, config.out / "unfinished"):
        with pytest.raises(ValueError, match=r"out lacks clips, because .* was stopped there; the same command"):
            ParquetDataset(path)
    damaged = (tmp_path / "videos" / "b.mp4").read_bytes()
    (tmp_path / "videos" / "b.mp4").write_bytes(damaged + bytes(1))
    with pytest.raises(ValueError, match=r"holds clips of other videos: .* restore them, or choose another --out"):
        preprocess(config)
    (tmp_path / "videos" / "b.mp4").write_bytes(damaged)
    report = preprocess(dataclasses.replace(config, on_error="skip"))
    (row,) = csv.DictReader((config.out / "skipped.csv").read_text(encoding="utf-8").splitlines())
    assert (row["file_name"], row["clips"][-5:]) == ("b.mp4", " of 2")
    names = [row.file_name for row in map(ParquetDataset(config.out).__getitem__, range(report_rows(report)))]
    assert names.count("a.mp4") == names.count("c.mp4") == 2 > names.count("b.mp4")


def report_rows(report: str) -> int:
    return int(report.split(": ", 1)[1].split()[0])


def test_aspect_buckets_and_random_crops(pipeline: Path, tmp_path: Path) -> None:
    assert nearest_size(1080, 1920, [(480, 832), (832, 480), (624, 624)]) == (480, 832)
    assert nearest_size(1000, 900, [(480, 832), (832, 480), (624, 624)]) == (624, 624)
    (tmp_path / "videos").mkdir()
    for name, size in (("wide.mp4", (64, 160)), ("tall.mp4", (160, 64))):
        write_film(tmp_path / "videos" / name, seed=1, num_frames=72, size=size)
    write_captions(tmp_path, {"wide.mp4": "a", "tall.mp4": "b"})
    config = config_for(tmp_path, pipeline, tmp_path / "out", sizes=("32x64", "64x32", "64x64"), batch_size=2)
    preprocess(config)
    shapes = {path.name: pq.read_metadata(path).num_rows for path in config.out.glob("*.parquet")}
    assert shapes == {"clips-9x32x64-00000.parquet": 2, "clips-9x64x32-00000.parquet": 2}
    manifest = read_manifest(config.out)
    assert manifest is not None and manifest.sizes == ((9, 32, 64), (9, 64, 32)), "only sizes that have clips"
    cropped = dataclasses.replace(config, out=tmp_path / "cropped", crop="random", seed=3)
    preprocess(cropped)
    centre, moved = (ParquetDataset(one.out) for one in (config, cropped))
    same = [torch.equal(centre[index].vae_latent, moved[index].vae_latent) for index in range(4)]
    assert sum(same) <= 1, "a random place may be the centre"

    places = [crop_position(name, index, "random", 3) for name in ("a", "b") for index in range(50)]
    assert len(set(places)) == 100 and crop_position("a", 7, "random", 3) == places[7]
    assert torch.tensor(places).mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.1)
    path = tmp_path / "videos" / "wide.mp4"
    left, right = (next(read_clips(path, SIZE, position=lambda _, at=at: (0.0, at))).pixels for at in (0.0, 1.0))
    assert torch.equal(left, next(read_clips(path, dataclasses.replace(SIZE, width=80))).pixels[..., :48])
    assert torch.equal(right, next(read_clips(path, dataclasses.replace(SIZE, width=80))).pixels[..., 32:])


def test_large_frames_are_encoded_in_tiles(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = wan_vae.load_vae(pipeline, "cpu")
    frames = torch.randint(0, 256, (1, 5, 96, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = wan_vae.encode_video(vae, frames)
    monkeypatch.setattr(wan_vae, "MAX_WHOLE_PIXELS", 96 * 127)
    monkeypatch.setattr(wan_vae, "TILE_PIXELS", 64)
    monkeypatch.setattr(wan_vae, "TILE_STRIDE_PIXELS", 32)
    tiled = wan_vae.encode_video(vae, frames)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole) and not vae.use_tiling
    assert (tiled - whole).abs().mean() < 0.3 * whole.abs().mean()


# --- kills


def rows_of(out: Path) -> list[dict[str, Any]]:
    """All rows with all columns, bytes included, in the order of the files."""
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.ParquetFile(path).read().to_pylist()]


def start(config: PreprocessConfig, kill_at: int | None = None, after: bool = False) -> multiprocessing.Process:
    """Preprocesses in a fork, which kills itself before or after it writes the given batch."""

    def run() -> None:
        logging.getLogger().handlers.clear()
        write, num_written = OutputFolder.write_batch, 0

        def write_batch(*arguments: Any) -> None:
            nonlocal num_written
            num_written += 1
            if num_written == kill_at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            write(*arguments)
            if num_written == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        OutputFolder.write_batch = write_batch  # type: ignore[method-assign]
        preprocess(config)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Three films of 3, 3 and 6 clips."""
    for seed, (name, num_frames) in enumerate({"a.mp4": 90, "b.mp4": 90, "c.mp4": 170}.items()):
        write_film(tmp_path / "videos" / name, seed, num_frames=num_frames, size=(64, 96))
    write_captions(tmp_path, {"a.mp4": "clouds", "b.mp4": "a meadow", "c.mp4": "the sea"})
    return tmp_path


def test_two_kills_lose_only_the_batches_in_flight(
    films: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_plan, "SHARD_CLIPS", 4)
    config = config_for(films, pipeline, films / "killed", batch_size=2)
    assert report_rows(preprocess(dataclasses.replace(config, out=films / "whole"))) == 12
    for kill_at, after, num_batches in ((2, False, 1), (3, True, 4)):
        process = start(config, kill_at, after)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        output, shards = OutputFolder(config.out), sorted((config.out / "unfinished").glob("clips-*.parquet"))
        parts = list((config.out / "unfinished").glob("9x*.parquet"))
        assert 2 * len(shards) + len(parts) == num_batches and not output.is_finished
    report = preprocess(config)
    assert report_rows(report) == 12 and ", 4 of them made now" in report
    assert rows_of(config.out) == rows_of(films / "whole")
    assert [path.name for path in sorted(config.out.glob("*.parquet"))] == [
        f"clips-9x32x48-{number:05d}.parquet" for number in range(3)
    ]


def test_two_ranks_write_the_same_rows(films: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_plan, "SHARD_CLIPS", 4)
    whole = config_for(films, pipeline, films / "whole")
    preprocess(whole)
    config = dataclasses.replace(whole, out=films / "out")
    codes = train_forked(2, [], films, main=lambda _: print(preprocess(config)))
    outputs = [(films / f"rank{rank}.txt").read_text(encoding="utf-8") for rank in range(2)]
    assert codes == [0, 0], outputs
    assert all("12 clips of 3 videos, 12 of them made now" in output for output in outputs)
    assert rows_of(config.out) == rows_of(whole.out)
    # A video that is bad on one rank stops all of them.
    (films / "videos" / "b.mp4").write_bytes(b"")
    codes = train_forked(2, [], films, main=lambda _: print(preprocess(dataclasses.replace(config, out=films / "x"))))
    assert codes == [1, 1] and not (films / "x").exists()
    for rank in range(2):
        assert "1 of 3 videos cannot be used" in (films / f"rank{rank}.txt").read_text(encoding="utf-8")


@pytest.mark.nightly
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_killed_at_random_twenty_times(
    num_ranks: int, odd: Path, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills of the whole job at any moment, from the first pass to the end, on one rank and on two in turn."""
    monkeypatch.setattr(clip_plan, "SHARD_CLIPS", 6)
    config = config_for(odd, pipeline, tmp_path / "killed", on_error="skip", batch_size=2, stride=3)
    began = time.monotonic()
    preprocess(whole := dataclasses.replace(config, out=tmp_path / "whole"))
    seconds, rng = time.monotonic() - began, random.Random(num_ranks)
    num_kills = 0
    for _ in range(200):
        patience = rng.uniform(0, 0.05 * seconds)
        if num_ranks == 1:
            process = start(config)
            process.join(patience)
            codes = [process.exitcode]
            process.kill()
            process.join()
        else:
            codes = train_forked(2, [], tmp_path, main=lambda _: print(preprocess(config)), timeout=patience / 2)
        num_kills += codes != [0] * num_ranks
        if OutputFolder(config.out).is_finished:
            break
    if not OutputFolder(config.out).is_finished:
        preprocess(config)
    assert num_kills >= 20, "the job is too short for this machine; raise the number of clips"
    assert rows_of(config.out) == rows_of(whole.out)
    assert (config.out / "skipped.csv").read_bytes() == (whole.out / "skipped.csv").read_bytes()
