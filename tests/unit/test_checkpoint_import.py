"""Diffusers folders as initial weights: read by slices, exported again, and `titan-distill checkpoint import`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tomllib
import torch
from safetensors.torch import load_file
from small_checkpoints import (
    CONFIG,
    assert_identical,
    call,
    make_manager,
    make_role,
    make_roles,
    write_weights_only,
)

from titan_distill.checkpoint.initial_weights import read_weights
from titan_distill.checkpoint.state import TrainState
from titan_distill.models.wan.state_dict import load_weights, save_folder
from titan_distill.roles import RoleManager


@pytest.fixture
def weights_folder(tmp_path: Path) -> Path:
    """A diffusers folder of several files and dtypes."""
    torch.manual_seed(3)
    tensors = dict(make_role("", 3, ema=False).transformer.state_dict())
    tensors["proj_out.weight"] = tensors["proj_out.weight"].bfloat16()
    save_folder(tensors, CONFIG, tmp_path / "weights", max_shard_bytes=4096)
    return tmp_path / "weights"


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_there_and_back_is_byte_identical(weights_folder: Path, tmp_path: Path) -> None:
    """From a folder into a role, its checkpoint and an export."""
    original = tensors_in(weights_folder)
    assert len(list(weights_folder.glob("*.safetensors"))) > 1
    assert {tensor.dtype for tensor in original.values()} == {torch.float32, torch.bfloat16}
    role = make_role("student", 0, ema=False)
    role.transformer.proj_out.weight.data = role.transformer.proj_out.weight.data.bfloat16()
    load_weights(role.transformer, weights_folder)
    saved = make_manager(tmp_path / "run" / "checkpoints").save(RoleManager([role]), TrainState())
    assert call("export", "--checkpoint", saved, "--out", tmp_path / "exported") == 0
    assert_identical(tensors_in(tmp_path / "exported" / "transformer"), original)
    assert (tmp_path / "exported/transformer/config.json").read_bytes() == (weights_folder / "config.json").read_bytes()


class TestImport:
    """`titan-distill checkpoint import` is not needed any more, and says so."""

    @pytest.mark.parametrize("arguments", [(), ("--out", "imported"), ("--family", "wan", "--role", "teacher")])
    def test_says_what_to_write_instead(
        self, weights_folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
    ) -> None:
        assert call("import", weights_folder, *arguments) == 0
        sentence, toml = capsys.readouterr().out.split("Write in the job's TOML:")
        assert "No import is needed, and nothing is written" in sentence
        role = "teacher" if "teacher" in arguments else "student"
        assert tomllib.loads(toml) == {"roles": {role: {"path": str(weights_folder)}}}
        assert not Path("imported").exists()

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
            (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
            (lambda folder: edit_index(folder, "../secret"), "names '../secret', which is not a bare file name"),
            (lambda folder: edit_index(folder, "nothing"), "nothing does not exist"),
            (lambda folder: edit_index(folder, first_file(folder).name), "which does not hold it"),
            (lambda folder: os.truncate(first_file(folder), 100), "is damaged"),
            (lambda folder: shutil.rmtree(folder), "there is no folder"),
        ],
    )
    def test_wrong_folder_is_one_sentence_and_leaves_nothing(
        self,
        weights_folder: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        spoil: Callable[[Path], None],
        message: str,
    ) -> None:
        spoil(weights_folder)
        assert call("import", weights_folder) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert set(os.listdir(tmp_path)) <= {"weights"}


class TestImportedBefore:
    """Checkpoints of weights alone, which earlier versions imported, stay readable."""

    @pytest.fixture
    def imported(self, weights_folder: Path, tmp_path: Path) -> Path:
        modules = {"transformer": tensors_in(weights_folder)}
        return write_weights_only(tmp_path / "imported" / "step-00000000", modules, CONFIG.to_diffusers())

    def test_no_run_resumes_from_it(self, imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("verify", imported) == call("list", imported.parent) == 0
        assert "complete, weights only" in capsys.readouterr().out
        roles = make_roles(seed=0)
        with pytest.raises(ValueError, match="holds weights only"):
            make_manager(imported.parent).load(imported, roles)

    def test_a_role_starts_from_it_in_another_dtype(self, imported: Path, weights_folder: Path) -> None:
        module = make_role("", 71, ema=False).transformer.bfloat16()
        read_weights(f"{imported}#student", module)
        expected = {name: tensor.bfloat16() for name, tensor in tensors_in(weights_folder).items()}
        assert_identical(module.state_dict(), expected)

    def test_it_is_exported_as_it_was(self, imported: Path, weights_folder: Path, tmp_path: Path) -> None:
        assert call("export", "--checkpoint", imported, "--out", tmp_path / "exported", "--role", "student") == 0
        assert_identical(tensors_in(tmp_path / "exported" / "transformer"), tensors_in(weights_folder))
        assert "these weights were imported" in (tmp_path / "exported" / "README.md").read_text()


def first_file(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def edit_index(folder: Path, file_name: str) -> None:
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    last = max(index["weight_map"], key=lambda name: index["weight_map"][name])
    index["weight_map"][last] = file_name
    path.write_text(json.dumps(index))
