"""The tile of sparse attention: decided once, recorded, and followed by whatever starts from the weights.

The runs here have 3 × 10 × 4 tokens, on which auto takes 3 × 5 × 4; the jobs as shipped have 5 × 6 × 6, on which it
takes 4 × 4 × 4.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from diffusers import WanTransformer3DModel
from runs import REPOSITORY, TINY_WAN, read_metrics, tiny_argv
from safetensors.torch import load_file

from titan_distill.checkpoint.manifest import read_manifest, write_manifest
from titan_distill.commands.export import export
from titan_distill.commands.generate import generate, load_role
from titan_distill.config.config import Config
from titan_distill.config.loading import load_config, to_toml
from titan_distill.config.parsing import ConfigError
from titan_distill.models.wan.state_dict import WEIGHTS_NAME, read_config
from titan_distill.resolve import resolve
from titan_distill.train import main

SHORT, PUBLISHED = (3, 5, 4), (4, 4, 4)
SIZE = (
    "--pipeline_config.num_frames", "9", "--pipeline_config.height", "160", "--pipeline_config.width", "64",
    "--training.global_batch_size", "1", "--training.local_batch_size", "1",
)  # fmt: skip
SPARSE = "--roles.student.attention", "sparse"
FROM_FOLDER = "--roles.student.path", ""


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def job(output: Path, *overrides: str, steps: int = 1) -> list[str]:
    """A sparse student, distilled on texts alone, with the tile left to the run."""
    return tiny_argv(
        "dmd2_sparse", output, "--training.steps", str(steps), "--checkpoint.interval", "1",
        "--sparse_attention.tile", "auto", *overrides,
    )  # fmt: skip


def resolved(*argv: str) -> Config:
    return resolve(load_config([*argv]), 1).config


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on a grid that 3 × 5 × 4 divides."""
    output = tmp_path_factory.mktemp("tile") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        assert main(job(output, *SIZE)) == 0
    return output


@pytest.fixture(scope="module")
def exported(first: Path) -> Path:
    out = first.parent / "exported"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        export(first / "checkpoints" / "latest", out)
    return out


@pytest.fixture
def old(first: Path, tmp_path: Path) -> Path:
    """The run as a version without the key would have left it."""
    run = tmp_path / "old"
    shutil.copytree(first, run)
    step = run / "checkpoints" / "step-00000001"
    manifest = read_manifest(step)
    config: dict[str, Any] = manifest.config or {}
    del config["sparse_attention"]["tile"]
    for role in config["roles"].values():
        del role["tile"]
    del manifest.trained["student"].architecture["vsa_tile"]
    write_manifest(step, manifest)
    lines = (run / "config.toml").read_text().splitlines()
    (run / "config.toml").write_text("\n".join(line for line in lines if not line.startswith("tile =")))
    return run


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return line


def reference(run: Path) -> str:
    return f"{run / 'checkpoints' / 'latest'}#student:raw"


def test_the_first_start_decides_and_records(first: Path, exported: Path) -> None:
    written = tomllib.loads((first / "config.toml").read_text())
    assert written["sparse_attention"]["tile"] == [3, 5, 4]
    assert {role["tile"] for role in written["roles"].values()} == {"none"}
    manifest = read_manifest(first / "checkpoints" / "step-00000001")
    assert manifest.config is not None and manifest.config["sparse_attention"]["tile"] == [3, 5, 4]
    assert manifest.trained["student"].architecture["vsa_tile"] == [3, 5, 4]
    assert "vsa_tile" not in manifest.trained["critic"].architecture  # it is dense
    assert json.loads((exported / "transformer" / "config.json").read_text())["vsa_tile"] == [3, 5, 4]


def test_a_resume_follows_and_refuses_another(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = job(first, *SIZE, "--checkpoint.resume_from", "latest", steps=2)
    before = (first / "config.toml").read_text()
    line = refused([*again, "--sparse_attention.tile", "4,4,4"], capsys)
    assert "sparse_attention.tile = [4, 4, 4]" in line and "trained with tile = [3, 5, 4]" in line
    assert 'set sparse_attention.tile to [3, 5, 4] or "auto"' in line
    assert (first / "config.toml").read_text() == before
    # On the second grid auto would take another tile; a changed grid is refused elsewhere.
    for size in (SIZE, ()):
        assert resolved(*job(first, *size, "--checkpoint.resume_from", "latest")).sparse_attention.tile == SHORT


@pytest.mark.nightly
def test_a_resumed_run_trains_with_the_recorded_tile(first: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(first, run)
    assert main(job(run, *SIZE, "--checkpoint.resume_from", "latest", steps=2)) == 0
    assert [line["step"] for line in read_metrics(run)] == [1, 2]
    assert tomllib.loads((run / "config.toml").read_text())["sparse_attention"]["tile"] == [3, 5, 4]
    # The recorded configuration is a start of its own.
    assert main(["--job.config_file", str(run / "config.toml"), "--checkpoint.resume_from", "latest"]) == 0


def test_initial_weights_keep_their_tile_on_another_grid(
    first: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolved(*job(tmp_path)).sparse_attention.tile == PUBLISHED  # from dense weights
    folder = str(exported / "transformer")
    for start in ((*FROM_FOLDER, "--roles.student.init_from", reference(first)), ("--roles.student.path", folder)):
        assert resolved(*job(tmp_path, *start)).sparse_attention.tile == SHORT
        line = refused(job(tmp_path, *start, "--sparse_attention.tile", "[4, 4, 4]"), capsys)
        assert "sparse_attention.tile = [4, 4, 4]" in line and "was trained with tile = [3, 5, 4]; set " in line
    assert not (tmp_path / "config.toml").exists()


@pytest.mark.nightly
def test_diffusers_and_generate_read_what_was_written(first: Path, exported: Path, tmp_path: Path) -> None:
    oracle = WanTransformer3DModel.from_pretrained(exported / "transformer")
    stored = load_file(exported / "transformer" / WEIGHTS_NAME)
    assert all(torch.equal(value, stored[name]) for name, value in oracle.state_dict().items())
    step = first / "checkpoints" / "step-00000001"
    _, _, role, _ = load_role(step, "student", torch.device("cpu"), raw_weights=True)
    assert role.transformer.tile == SHORT
    generate(step, "a red circle moving left slowly", tmp_path / "video.mp4")
    assert (tmp_path / "video.mp4").stat().st_size > 0


@pytest.mark.nightly
def test_what_does_not_say_its_tile_has_the_published_one(
    old: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = old / "checkpoints" / "step-00000001"
    again = job(old, *SIZE, "--checkpoint.resume_from", "latest", steps=2)
    line = refused([*again, "--sparse_attention.tile", "3,5,4"], capsys)
    assert "sparse_attention.tile = [3, 5, 4]" in line and "trained with tile = [4, 4, 4]" in line
    _, _, role, _ = load_role(step, "student", torch.device("cpu"), raw_weights=True)
    assert role.transformer.tile == PUBLISHED
    export(step, tmp_path / "again")
    assert read_config(tmp_path / "again" / "transformer").vsa_tile == PUBLISHED
    start = (*FROM_FOLDER, "--roles.student.init_from", reference(old))
    assert resolved(*job(tmp_path / "next", *SIZE, *start)).sparse_attention.tile == PUBLISHED
    # Exports without the field, and those of others, in which only the tensors tell.
    for without in (("vsa_tile",), ("vsa_tile", "sparse_attention")):
        folder = tmp_path / "-".join(without)
        shutil.copytree(exported / "transformer", folder)
        content = json.loads((folder / "config.json").read_text())
        kept = {key: value for key, value in content.items() if key not in without}
        (folder / "config.json").write_text(json.dumps(kept))
        found = resolved(*job(tmp_path / "next", *SIZE, "--roles.student.path", str(folder)))
        assert found.sparse_attention.tile == PUBLISHED
        with pytest.raises(ConfigError, match=r"trained with tile = \[4, 4, 4\]"):
            resolved(*job(tmp_path / "next", *SIZE, "--roles.student.path", str(folder), "--roles.student.tile=3,5,4"))
    assert main(again) == 0
    assert tomllib.loads((old / "config.toml").read_text())["sparse_attention"]["tile"] == [4, 4, 4]


@pytest.mark.nightly
def test_roles_may_have_different_tiles(old: Path, tmp_path: Path) -> None:
    """The student starts dense, the critic from a sparse checkpoint of before the key."""
    critic = ("--roles.critic.path", "", "--roles.critic.init_from", reference(old), "--roles.critic.attention=sparse")
    run = tmp_path / "run"
    assert main(job(run, *SIZE, *critic)) == 0
    written = tomllib.loads((run / "config.toml").read_text())
    assert written["sparse_attention"]["tile"] == [4, 4, 4]
    assert {name: role["tile"] for name, role in written["roles"].items()} == {
        "teacher": "none", "student": [3, 5, 4], "critic": "none",
    }  # fmt: skip
    trained = read_manifest(run / "checkpoints" / "step-00000001").trained
    assert [trained[name].architecture["vsa_tile"] for name in ("student", "critic")] == [[3, 5, 4], [4, 4, 4]]
    config = resolved(*job(run, *SIZE, *critic, "--checkpoint.resume_from", "latest"))
    again = tmp_path / "again.toml"
    again.write_text(to_toml(config))
    assert load_config(["--job.config_file", str(again)]).tile("student") == SHORT
    assert main(job(run, *SIZE, *critic, "--checkpoint.resume_from", "latest", steps=2)) == 0


def test_causal_and_dense_roles_have_no_choice(tmp_path: Path) -> None:
    for attention in ("dense", "causal"):
        with pytest.raises(ConfigError, match=f"roles.student.tile .* has no effect with attention = .{attention}"):
            resolved(*job(tmp_path, "--roles.student.attention", attention, "--roles.student.tile", "3,5,4"))
    config = read_config(TINY_WAN / "transformer")
    assert config.vsa_tile == PUBLISHED and "vsa_tile" not in config.to_diffusers()
    sparse = dataclasses.replace(config, sparse_attention=True, vsa_tile=SHORT)
    assert sparse.to_diffusers()["vsa_tile"] == [3, 5, 4]
