"""Paths and files as users write them: a # in a name, endings in capitals, relative paths, and remedies that keep
their files."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import REPOSITORY, TINY_SHAPES, TINY_WAN, tiny_argv
from tiny_media import write_video

from titan_distill import cli
from titan_distill.checkpoint.diffusers_folder import open_folder
from titan_distill.commands.preprocess import read_captions
from titan_distill.config.loading import load_config
from titan_distill.data.loader import open_dataset
from titan_distill.data.parquet import ParquetDataset
from titan_distill.data.prompts import read_prompts
from titan_distill.data.videos import VideoDataset
from titan_distill.models.wan.prompt_pictures import FirstFrames, PictureRows
from titan_distill.resolve import resolve


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


class TestHash:
    """Only `init_from` may name a role of a checkpoint, and an existing folder wins."""

    @pytest.mark.parametrize("key", ["path", "init_from"])
    def test_a_folder_with_a_hash_is_a_folder(self, tmp_path: Path, key: str) -> None:
        folder = shutil.copytree(TINY_WAN / "transformer", tmp_path / "run#2 student")
        words = ["--roles.student.path", "", "--roles.student.flavor", "tiny"] if key == "init_from" else []
        argv = [*tiny_argv("finetune", tmp_path / "run"), *words, f"--roles.student.{key}", str(folder)]
        run = resolve(load_config(argv), 1)
        module = run.family.build_module("student", run.config.roles["student"], None, torch.device("cpu"))
        expected = open_folder(folder).read("proj_out.bias")
        assert torch.equal(module.state_dict()["proj_out.bias"], expected)

    @pytest.mark.parametrize("text", ["missing#student", "missing#student:ema"])
    def test_a_path_is_never_a_reference(self, tmp_path: Path, text: str) -> None:
        config = load_config([*tiny_argv("finetune", tmp_path), "--roles.student.path", text])
        with pytest.raises(ValueError, match=rf"roles.student.path = '{text}' is no existing folder \(seen from /"):
            resolve(config, 1)

    def test_a_reference_that_leads_nowhere_names_its_key(self, tmp_path: Path) -> None:
        argv = [
            *tiny_argv("finetune", tmp_path),
            "--roles.student.path",
            "",
            "--roles.student.init_from",
            "no/x#student",
        ]
        with pytest.raises(
            ValueError, match=r"roles.student.init_from = 'no/x#student' \(seen from /.*\): there is no"
        ):
            resolve(load_config(argv), 1)

    def test_a_file_in_place_of_its_folder(self, tmp_path: Path) -> None:
        file = TINY_WAN / "transformer" / "diffusion_pytorch_model.safetensors"
        config = load_config([*tiny_argv("finetune", tmp_path), "--roles.student.path", str(file)])
        with pytest.raises(ValueError, match=r"safetensors' is a file; name the folder that it is in"):
            resolve(config, 1)


class TestEndings:
    """Endings in capitals mean what those in small letters mean."""

    def test_of_data(self, tmp_path: Path) -> None:
        folder = tmp_path / "data"
        folder.mkdir()
        shutil.copy(TINY_SHAPES / "prompts.parquet", folder / "A.PARQUET")
        assert len(ParquetDataset(folder)) == len(ParquetDataset(TINY_SHAPES / "prompts.parquet"))

    def test_of_videos_to_train_on(self, tmp_path: Path) -> None:
        write_video(tmp_path / "a.mp4", 4).rename(tmp_path / "A.MP4")
        (tmp_path / "X.CSV").write_text("video,prompt\nA.MP4,a disc\n", encoding="utf-8")
        config = load_config([*tiny_argv("finetune", tmp_path), "--data.path", str(tmp_path / "X.CSV")])
        dataset = open_dataset(config.data, tensors=(), video_size=(1, 64, 96), needs_latents=True)
        assert isinstance(dataset, VideoDataset) and dataset[0].caption == "a disc"

    @pytest.mark.parametrize(
        ("name", "text"),
        [("P.TXT", "a disc\n"), ("P.Csv", "prompt\na disc\n"), ("P.JSONL", '{"caption": "a disc"}\n')],
    )
    def test_of_prompts(self, tmp_path: Path, name: str, text: str) -> None:
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_prompts(tmp_path / name, None) == ["a disc"]
        with pytest.raises(ValueError, match="holds no embeddings"):
            PictureRows(str(tmp_path / name), ("image_latent",))

    def test_of_prompts_without_pictures(self, tmp_path: Path) -> None:
        (tmp_path / "P.TXT").write_text("a disc\n", encoding="utf-8")
        with pytest.raises(ValueError, match="holds prompts only"):
            FirstFrames(str(tmp_path / "P.TXT"), 64, 96, lambda dataset: None)

    def test_of_captions(self, tmp_path: Path) -> None:
        (tmp_path / "C.CSV").write_text("file_name,caption\na.mp4,a disc\n", encoding="utf-8")
        assert read_captions(tmp_path / "C.CSV", tmp_path) == {"a.mp4": "a disc"}


COMMANDS: dict[str, tuple[str, str]] = {
    "data inspect no/x.parquet": ("PATH", "no/x.parquet"),
    "data inspect --path no/x.parquet": ("PATH", "no/x.parquet"),
    "checkpoint list no/x": ("RUN", "no/x"),
    "checkpoint verify no/x": ("CHECKPOINT", "no/x"),
    "checkpoint reshard no/x --out y --num-files 1": ("CHECKPOINT", "no/x"),
    "checkpoint diff no/x no/y": ("A", "no/x"),
    "checkpoint import no/x": ("FOLDER", "no/x"),
    "checkpoint export no/x --out y": ("CHECKPOINT", "no/x"),
    "checkpoint export --out y --checkpoint=no/x": ("CHECKPOINT", "no/x"),
    "generate no/x --prompt x --out {out}": ("CHECKPOINT", "no/x"),
    "generate --prompt x --checkpoint no/x --out {out}": ("CHECKPOINT", "no/x"),
    "data preprocess no/x --captions no/c.csv --out y --vae v --text-encoder t": ("--captions", "no/c.csv"),
    "data ode-pairs train_configs/tiny_wan_kd.toml --prompts no/p.txt --out y": ("--prompts", "no/p.txt"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_which_option_and_from_where(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, path = COMMANDS[command]
    with pytest.raises(SystemExit) as exit_:
        cli.main(command.format(out=tmp_path / "v.mp4").split())
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1
    assert f"{key} = '{path}' (seen from {REPOSITORY}): " in error


@pytest.mark.parametrize(
    ("key", "path"),
    [("validation.prompts", "no/p.txt"), ("data.path", "no/d.parquet"), ("checkpoint.resume_from", "no/step")],
)
def test_a_key_says_from_where(tmp_path: Path, key: str, path: str) -> None:
    argv = [*tiny_argv("finetune", tmp_path), "--validation.enabled", "true", f"--{key}", path]
    with pytest.raises(ValueError, match=rf"{key} = '{path}' .*\(seen from {REPOSITORY}\)"):
        resolve(load_config(argv), 1)


def test_a_missing_configuration_says_from_where() -> None:
    with pytest.raises(ValueError, match=rf"no/x.toml \(seen from {REPOSITORY}\): the file cannot be read"):
        load_config(["--job.config_file", "no/x.toml"])


def messages(path: Path) -> list[str]:
    """Texts of raised errors and of constants, as one line each."""
    found: list[Any] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            parts = [part.value for part in ast.walk(node.exc) if isinstance(part, ast.Constant)]
            found.append(" ".join(part for part in parts if isinstance(part, str)))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found.append(node.value.value)
    return [text for text in found if isinstance(text, str)]


LOSES = re.compile(
    r"write (it|them|the dataset) again|delete (it|them)|remove the folder|(exists|damaged|file).*remove (it|them)\b"
)
ITS_OWN = {"text_encoder.py": "and it will be computed again", "clip_plan.py": "and the videos are probed again"}
"""Messages about files that the project made itself, for itself: cached text embeddings, results of a probe."""


@pytest.mark.parametrize("path", sorted((REPOSITORY / "titan_distill").rglob("*.py")), ids=lambda path: path.name)
def test_no_remedy_deletes_what_is_not_ours(path: Path) -> None:
    losing = [text for text in messages(path) if LOSES.search(text)]
    assert [text for text in losing if ITS_OWN.get(path.name, "\0") not in text] == []


def test_such_remedies_are_found() -> None:
    assert all(map(LOSES.search, ("x.parquet is damaged: remove it or write it again", "it exists already; remove it")))
    assert not LOSES.search("fps = 8 has no effect; remove it")


CALLS: dict[str, Callable[[Path], object]] = {"parquet": ParquetDataset, "text": lambda path: read_prompts(path, None)}


@pytest.mark.parametrize("kind", CALLS)
def test_a_broken_file_of_the_user_is_not_to_be_removed(tmp_path: Path, kind: str) -> None:
    file = tmp_path / ("a.parquet" if kind == "parquet" else "a.txt")
    file.write_bytes(b"\xff\xfe broken")
    with pytest.raises(ValueError, match=r"copy it again|save it as UTF-8") as error:
        CALLS[kind](file)
    assert "remove" not in str(error.value)


@pytest.mark.parametrize("close", [True, False])
def test_a_mistyped_job_is_answered_with_a_near_one_of_its_folder(close: bool, tmp_path: Path) -> None:
    (tmp_path / "wan14b_to_1.3b.toml").touch()
    given = tmp_path / ("wan14b_to_1.3.toml" if close else "another.toml")
    with pytest.raises(ValueError, match="cannot be read: No such file") as found:
        load_config(["--job.config_file", str(given)])
    assert str(found.value).endswith(f"; did you mean {tmp_path}/wan14b_to_1.3b.toml?") == close
