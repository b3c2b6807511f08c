"""Folders of videos as VBench names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_media import write_video

from titan_distill.validation.video_folder import VideoFolder, VideoWriter, prompts_file, video_name

LONG = "a very long prompt " * 20


def test_what_is_written_is_found_again(tmp_path: Path) -> None:
    """Also prompts that end like an index, or that no file name can hold."""
    keys = [("a cat", 0), ("a cat", 1), ("take-5", 0), ("either/or", 0), (LONG, 0), (LONG, 1)]
    writer = VideoWriter(tmp_path / "student", fps=8)
    for brightness, key in enumerate(keys):
        writer.write(key, torch.full((3, 32, 64, 3), 40 * brightness, dtype=torch.uint8))
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert {"a cat-0.mp4", "a cat-1.mp4", "take-5-0.mp4"} <= names and len(names) == 6  # and nothing but videos
    prompts = json.loads((tmp_path / "student.json").read_text())
    assert prompts["a cat-1.mp4"] == "a cat" and set(prompts) == names and set(prompts.values()) == {x for x, _ in keys}
    folder = VideoFolder.scan(tmp_path / "student")
    assert set(folder.files) == set(keys) and folder.size == (3, 32, 64)
    for brightness, key in enumerate(keys):
        assert abs(folder.read(key).float().mean().item() - 40 * brightness) < 3


def test_names_are_read_where_no_file_has_the_prompts(tmp_path: Path) -> None:
    for name in ("a dog-0.mp4", "a dog-1.MP4", "clip.mov"):
        write_video(tmp_path / name, 3)
    (tmp_path / "notes.txt").write_text("not a video")
    folder = VideoFolder.scan(tmp_path)
    assert {key: path.name for key, path in folder.files.items()} == {
        ("a dog", 0): "a dog-0.mp4", ("a dog", 1): "a dog-1.MP4", ("clip", 0): "clip.mov",
    }  # fmt: skip
    assert folder.size == (3, 64, 96)
    assert [round(x) for x in folder.read(("clip", 0)).numpy().mean((1, 2, 3)) / 8] == [0, 1, 2]


@pytest.mark.parametrize(
    ("files", "prompts", "sentence"),
    [
        ((), None, "has no videos"),
        (("x-0.mp4", "x-0.mov"), None, "both video 0 of one prompt; rename one"),
        (("x-0.mp4",), "[1]", "must hold one prompt per file name"),
        (("x-0.mp4",), "{", "is not valid JSON"),
    ],
)
def test_bad_folders(tmp_path: Path, files: tuple[str, ...], prompts: str | None, sentence: str) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in files:
        (folder / name).touch()
    if prompts is not None:
        prompts_file(folder).write_text(prompts)
    with pytest.raises(ValueError, match=sentence):
        VideoFolder.scan(folder)


def test_a_file_that_is_no_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "x-0.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"x-0\.mp4 can't be decoded"):
        _ = VideoFolder.scan(tmp_path).size


def test_shortened_names_differ() -> None:
    assert video_name(LONG + "1", 0) != video_name(LONG + "2", 0)
    assert len(video_name(LONG, 0).encode()) <= 255 and "/" not in video_name("a/b", 0)
