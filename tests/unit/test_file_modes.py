"""Everything that is written has the mode that the umask asks for: colleagues on a shared disk can read it, or not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runs import REPOSITORY, TINY_SHAPES, TINY_WAN
from tiny_media import write_film

from titan_distill import cli, train
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.state_dict import save_folder
from titan_distill.models.wan.text_encoder import TextEncoder
from titan_distill.validation.validator import Sample

JOB = REPOSITORY / "tests" / "assets" / "version_0_1" / "job.toml"


@pytest.fixture(params=[0o022, 0o027], ids=["umask 022", "umask 027"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_modes(folder: Path, umask: int) -> dict[str, str]:
    """Mode of each file and folder that has not the umask's."""
    found = {str(path.relative_to(folder)): path.stat().st_mode for path in folder.rglob("*")}
    assert any(path.is_file() for path in folder.rglob("*"))
    usual = {name: (0o777 if (folder / name).is_dir() else 0o666) & ~umask for name in found}
    return {name: oct(mode & 0o777) for name, mode in found.items() if mode & 0o777 != usual[name]}


def test_files_of_a_library(umask: int, tmp_path: Path) -> None:
    """safetensors writes through a temporary file of mode 0600."""
    save_folder({"a": torch.ones(2), "b": torch.ones(2)}, WanConfig(), tmp_path / "weights", max_shard_bytes=8)
    TextEncoder(TINY_WAN).cached_embedding("a red circle", 64, tmp_path / "cache")
    Sample(torch.ones(2), {}, None).save(tmp_path / "samples" / "0.safetensors")
    assert wrong_modes(tmp_path, umask) == {}


@pytest.mark.nightly
def test_every_kind_of_file(umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with validation, checkpoints and trackers, and what each command writes."""
    monkeypatch.chdir(REPOSITORY)
    run, checkpoint = tmp_path / "run", str(tmp_path / "run" / "checkpoints" / "latest")
    argv = ["--job.config_file", str(JOB), "--job.output_dir", str(run), "--job.imports", "tiny_world"]
    few = ["--training.steps", "2", "--validation.enabled", "true", "--validation.num_prompts", "2"]
    assert train.main([*argv, *few, "--validation.num_videos", "1", "--metrics.tensorboard", "true"]) == 0
    pipeline = shutil.copytree(TINY_WAN, tmp_path / "private")
    for file in pipeline.rglob("*.json"):
        file.chmod(0o600)  # what is copied is readable all the same
    cli.main(
        [
            "checkpoint",
            "export",
            "--checkpoint",
            checkpoint,
            "--out",
            f"{tmp_path}/exported",
            "--pipeline",
            str(pipeline),
        ]
    )
    shutil.rmtree(pipeline)
    cli.main(["checkpoint", "reshard", checkpoint, "--out", str(tmp_path / "resharded"), "--num-files", "2"])
    cli.main(["generate", "--checkpoint", checkpoint, "--prompt", "a red circle", "--out", str(tmp_path / "video.mp4")])
    write_film(tmp_path / "films" / "clouds.mp4", 0, num_frames=60)
    captions = tmp_path / "captions.csv"
    captions.write_text("file_name,caption\nclouds.mp4,clouds at dusk\n")
    wan = ["--vae", str(TINY_WAN), "--text-encoder", str(TINY_WAN), "--captions", str(captions)]
    cli.main(["data", "preprocess", str(tmp_path / "films"), *wan, "--out", str(tmp_path / "data")])
    pairs = ["--prompts", str(TINY_SHAPES / "prompts.parquet"), "--out", str(tmp_path / "pairs")]
    cli.main(["data", "ode-pairs", "train_configs/tiny_wan_kd.toml", *pairs, "--num-pairs", "1", "--num-steps", "4"])
    kinds = {path.suffix or path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {
        ".safetensors",
        ".distcp",
        ".metadata",
        ".json",
        ".jsonl",
        ".toml",
        ".parquet",
        ".mp4",
        ".png",
        ".txt",
    } <= kinds
    assert {"run.json", "manifest.json", "ode_pairs.json"} <= {path.name for path in tmp_path.rglob("*.json")}
    assert wrong_modes(tmp_path, umask) == {}
