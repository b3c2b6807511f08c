"""Tables of videos and captions: every format gives the same rows, in training, preprocessing and prompts."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_media import brightness, write_pipeline, write_video

from titan_distill.cli import main as cli
from titan_distill.commands.index import IndexOptions, index
from titan_distill.commands.preprocess import find_videos, read_captions
from titan_distill.config.sections import DataConfig
from titan_distill.data.footage import VideoSize
from titan_distill.data.loader import open_dataset
from titan_distill.data.manifest import DataManifest, read_manifest, write_manifest
from titan_distill.data.parquet import ParquetDataset
from titan_distill.data.prompts import read_prompts
from titan_distill.data.videos import ClipRow, VideoDataset
from titan_distill.models.wan.text_encoder import TextEncoder

CAPTIONS = {"a.mp4": "a disc, red", "more/b.mp4": "größer"}
SIZE = VideoSize(3, 32, 48)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "a.mp4", 3, size=(32, 48))
    write_video(folder / "more" / "b.mp4", 5, size=(32, 48))
    return folder


@pytest.fixture
def folder(clips: Path, tmp_path: Path) -> Path:
    """A folder of links to the clips, so that each test may write tables beside them."""
    for name in CAPTIONS:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).symlink_to(clips / name)
    return tmp_path / "data"


def as_csv(video: str, caption: str, separator: str = ",") -> Callable[[Path], str]:
    def text(folder: Path) -> str:
        lines = [f'./{name}{separator}3{separator}"{text}"' for name, text in CAPTIONS.items()]
        return "\n".join([separator.join([video, "seconds", caption]), *lines])

    return text


def as_json(folder: Path) -> str:
    entries = [{"path": str(folder / name), "cap": [text], "fps": 8} for name, text in CAPTIONS.items()]
    return json.dumps(entries)


def as_jsonl(folder: Path) -> str:
    return "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in CAPTIONS.items())


TABLES: dict[str, Callable[[Path], str]] = {
    "a.csv": as_csv("video", "prompt"),
    "b.CSV": as_csv("file_name", "caption"),
    "c.tsv": as_csv("path", "text", "\t"),
    "metadata.csv": as_csv("file_name", "text"),
    "metadata.jsonl": as_jsonl,
    "videos2caption.json": as_json,
}


def training_rows(table: Path) -> list[ClipRow]:
    config = DataConfig(path=str(table))
    dataset = open_dataset(config, tensors=(), video_size=(3, 32, 48), needs_latents=True)
    assert isinstance(dataset, VideoDataset)
    return [dataset[row] for row in range(len(dataset))]


@pytest.mark.parametrize("name", TABLES)
def test_all_formats_mean_the_same_everywhere(name: str, folder: Path) -> None:
    (folder / name).write_text(TABLES[name](folder), encoding="utf-8")
    rows = training_rows(folder / name)
    assert [row.caption for row in rows] == list(CAPTIONS.values())
    assert all(row.pixels is not None and brightness(row.pixels) == [0, 1, 2] for row in rows)
    captions = read_captions(folder / name, folder)
    assert captions == CAPTIONS and set(find_videos(folder, captions, folder / name)) == set(CAPTIONS)
    assert read_prompts(folder / name, None) == list(CAPTIONS.values())


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "videos2caption.json", "beside"])
def test_index_makes_one_table_of_a_folder(name: str, folder: Path) -> None:
    if name == "beside":
        for video, text in CAPTIONS.items():
            (folder / video).with_suffix(".txt").write_text(f"{text}\n", encoding="utf-8")
    else:
        (folder / name).write_text(TABLES[name](folder), encoding="utf-8")
    assert index(IndexOptions(folder=folder)) == f"{folder}/index.jsonl: 2 videos with captions"
    lines = [json.loads(line) for line in (folder / "index.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [{"video": name, "prompt": text} for name, text in CAPTIONS.items()]
    assert [row.caption for row in training_rows(folder / "index.jsonl")] == list(CAPTIONS.values())
    assert read_captions(folder, folder) == CAPTIONS, "preprocessing takes the folder itself"
    elsewhere = folder.parent / "x" / "all.jsonl"
    index(IndexOptions(folder=folder, out=elsewhere))
    assert [row.caption for row in training_rows(elsewhere)] == list(CAPTIONS.values())
    with pytest.raises(ValueError, match=r"index\.jsonl exists; choose another --out"):
        index(IndexOptions(folder=folder))


def test_videos_in_their_own_folder_beside_the_table(folder: Path) -> None:
    (folder / "more").rename(folder / "videos")
    (folder / "videos2caption.json").write_text('[{"path": "b.mp4", "cap": ["one", "two"]}]')
    assert [row.caption for row in training_rows(folder / "videos2caption.json")] == ["one"]


def test_index_says_which_videos_its_table_lacks(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\na.mp4,one\n")
    expected = (
        f"index.jsonl: 1 videos with captions; 1 videos have no caption there and are left out: {folder}/more/b.mp4"
    )
    assert index(IndexOptions(folder=folder)).endswith(expected)


def test_preprocessing_takes_names_from_the_table_on(folder: Path) -> None:
    """As training does; also where the videos have a folder of their own, and through `..`."""
    (folder / "more").rename(folder / "videos")
    for name, at in (("videos/b.mp4", folder / "videos"), ("b.mp4", folder), ("videos/../a.mp4", folder)):
        table = folder / "t.csv"
        table.write_text(f"video,prompt\n{name},one\n")
        expected = {"videos/b.mp4": "b.mp4", "b.mp4": "videos/b.mp4", "videos/../a.mp4": "a.mp4"}[name]
        assert read_captions(table, at) == {expected: "one"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4,a cat, asleep\n", "line 2: there are more values than the 2 columns; put a text with ',' in quotes"),
        ('a.mp4,"a cat\nb.mp4,a dog\nc.mp4,x\n', "not CSV .unexpected end of data.; end each text in quotes"),
        ('a.mp4,"a cat\nb.mp4,"a dog"\n', "not CSV .*; end each text in quotes"),
        (f"{'a cat ' * 60},a.mp4\n", "line 2: there is no file .*a cat"),
    ],
)
def test_rows_are_not_cut_or_swallowed(text: str, message: str, folder: Path) -> None:
    (folder / "t.csv").write_text(f"video,prompt\n{text}")
    with pytest.raises(ValueError, match=message):
        training_rows(folder / "t.csv")


def test_files_are_those_of_the_videos(folder: Path, clips: Path) -> None:
    """A table that shares a video with another shares its files."""
    (folder / "t.csv").write_text("video,prompt\nmore/b.mp4,x\n")
    assert VideoDataset(folder / "t.csv", SIZE).files == {str((clips / "more" / "b.mp4").resolve())}


def test_a_video_without_caption_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.txt").write_text("a disc")
    with pytest.raises(SystemExit) as exit_:
        cli(["data", "index", str(folder)])
    printed = capsys.readouterr().err
    assert exit_.value.code == 2 and len(printed.splitlines()) == 1
    assert "nor a .txt with the caption beside more/b.mp4; add captions" in printed


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_are_compared_in_one_unicode_form(on_disk: str, in_table: str, clips: Path, tmp_path: Path) -> None:
    stored, written = (unicodedata.normalize(form, "été/é.mp4") for form in (on_disk, in_table))
    assert stored != written
    (tmp_path / stored).parent.mkdir()
    (tmp_path / stored).symlink_to(clips / "a.mp4")
    (tmp_path / "t.csv").write_text(f"video,prompt\n{written},a disc\n", encoding="utf-8")
    assert [row.caption for row in training_rows(tmp_path / "t.csv")] == ["a disc"]
    captions = read_captions(tmp_path / "t.csv", tmp_path)
    assert set(find_videos(tmp_path, captions, tmp_path / "t.csv")) == set(captions)


def test_linked_folders_of_videos_are_found_once(folder: Path, clips: Path) -> None:
    (folder / "linked").symlink_to(clips / "more")
    (folder / "loop").symlink_to(folder)
    names = ("a.mp4", "more/b.mp4", "linked/b.mp4")
    assert tuple(sorted(find_videos(folder, names, folder / "t.csv"))) == tuple(sorted(names))


def test_data_prompts_makes_a_text_only_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = write_pipeline(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("a disc\n\ngrößer\n", encoding="utf-8")
    argv = ["data", "prompts", str(tmp_path / "prompts.txt"), "--text-encoder", str(pipeline), "--device", "cpu"]
    cli([*argv, "--out", str(tmp_path / "out"), "--dtype", "float32"])
    assert capsys.readouterr().out.strip().endswith("prompts.parquet: 2 prompts")
    config = DataConfig(path=str(tmp_path / "out"))
    dataset = open_dataset(config, tensors=(), video_size=(5, 32, 48), needs_latents=False)
    assert isinstance(dataset, ParquetDataset) and not dataset.has_latents
    encoder = TextEncoder(pipeline)
    assert read_manifest(tmp_path / "out") == DataManifest().with_encoders(encoder.digests)
    for row, prompt in enumerate(("a disc", "größer")):
        assert dataset[row].caption == prompt
        assert torch.equal(dataset[row].text_embedding, encoder.embed(prompt, 512))
    with pytest.raises(SystemExit, match="2"):
        cli([*argv, "--out", str(tmp_path / "out")])
    assert "prompts.parquet exists; choose another folder" in capsys.readouterr().err
    (tmp_path / "clips").mkdir()
    (tmp_path / "out" / "prompts.parquet").rename(tmp_path / "clips" / "clips.parquet")
    with pytest.raises(SystemExit, match="2"):
        cli([*argv, "--out", str(tmp_path / "clips")])
    assert "clips.parquet exists; choose another folder" in capsys.readouterr().err, "a set is not made part of another"
    write_manifest(tmp_path / "latents", DataManifest(latents="normalised"))
    with pytest.raises(SystemExit, match="2"):
        cli([*argv, "--out", str(tmp_path / "latents")])
    assert "holds data with latents = normalised instead of None" in capsys.readouterr().err
    assert not (tmp_path / "latents" / "prompts.parquet").exists()
