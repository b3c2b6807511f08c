"""``titan-distill checkpoint import``: from a diffusers folder to weights that any layout can start from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_memory_worker import NUM_TENSORS, TENSOR_BYTES
from runs import HELPERS
from safetensors.torch import load_file
from small_checkpoints import CONFIG, assert_identical, call, make_manager, make_role, make_roles

from titan_distill.checkpoint import storage
from titan_distill.checkpoint.diffusers_folder import open_folder
from titan_distill.checkpoint.initial_weights import read_weights
from titan_distill.checkpoint.manifest import read_manifest
from titan_distill.checkpoint.tools import rewrite
from titan_distill.checkpoint.tools.contents import open_checkpoint
from titan_distill.checkpoint.tools.imports import import_folder
from titan_distill.models.wan.state_dict import save_folder


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


class TestImport:
    def test_there_and_back_is_byte_identical(self, weights_folder: Path, tmp_path: Path) -> None:
        for number in (1, 2):
            source = weights_folder if number == 1 else tmp_path / "exported1" / "transformer"
            out, exported = tmp_path / f"imported{number}", tmp_path / f"exported{number}"
            assert call("import", source, "--out", out, "--family", "wan") == 0
            assert call("export", "--checkpoint", out, "--out", exported, "--role", "student") == 0
        original, first, second = (
            tensors_in(folder)
            for folder in (weights_folder, tmp_path / "exported1/transformer", tmp_path / "exported2/transformer")
        )
        assert len(list(weights_folder.glob("*.safetensors"))) > 1
        assert {tensor.dtype for tensor in original.values()} == {torch.float32, torch.bfloat16}
        assert_identical(first, original)
        assert_identical(second, original)
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            files = [tmp_path / f"exported{number}" / "transformer" / name for number in (1, 2)]
            assert files[0].read_bytes() == files[1].read_bytes()
        assert "these weights were imported" in (tmp_path / "exported1" / "README.md").read_text()

    def test_is_a_checkpoint_that_no_run_resumes_from(
        self, weights_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pipeline, out = tmp_path / "pipeline", tmp_path / "checkpoints" / "step-00000000"
        pipeline.mkdir()
        weights_folder.rename(pipeline / "transformer")
        assert call("import", pipeline, "--out", out) == call("verify", out) == call("list", out.parent) == 0
        assert "complete, weights only" in capsys.readouterr().out
        roles = make_roles(seed=0)
        with pytest.raises(ValueError, match="holds weights only"):
            make_manager(out.parent).load(out, roles)

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone measures peaks from now on")
    def test_memory_is_bounded_by_a_tensor_and_not_by_the_model(self, tmp_path: Path) -> None:
        worker = HELPERS / "checkpoint_memory_worker.py"
        process = subprocess.run([sys.executable, worker, tmp_path], capture_output=True, text=True, check=True)
        peaks = json.loads(process.stdout.splitlines()[-1])
        # One tensor, and in `diff` two, are 8 and 16 MiB of 192; what else there is depends on the kernel's page cache.
        assert len(peaks) == 4 and all(peak < NUM_TENSORS * TENSOR_BYTES / 2 for peak in peaks.values()), peaks
        imported, rewritten = tmp_path / "imported", tmp_path / "rewritten"
        stored = storage.read_metadata(imported).storage_data.values()
        assert max(info.length for info in stored) < rewrite.PIECE_BYTES + 4096
        opened = open_checkpoint(rewritten)
        for i in range(NUM_TENSORS):
            assert bool((opened.read(f"models/r/transformer.layer{i}") == i).all())

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
        assert call("import", weights_folder, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert set(os.listdir(tmp_path)) <= {"weights"}

    def test_family_decides_what_belongs_to_the_network(self, weights_folder: Path, tmp_path: Path) -> None:
        kept = [name for name in open_folder(weights_folder).kinds if "attn2" not in name]
        out = import_folder(weights_folder, tmp_path / "out", "r", "toy", lambda architecture, shapes: kept)
        assert open_checkpoint(out).names == sorted(f"models/r/transformer.{name}" for name in kept)
        assert read_manifest(out).trained["r"].architecture == CONFIG.to_diffusers()


def first_file(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def edit_index(folder: Path, file_name: str) -> None:
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    last = max(index["weight_map"], key=lambda name: index["weight_map"][name])
    index["weight_map"][last] = file_name
    path.write_text(json.dumps(index))


def test_role_starts_from_imported_weights_in_another_dtype(weights_folder: Path, tmp_path: Path) -> None:
    assert call("import", weights_folder, "--out", tmp_path / "out", "--role", "teacher") == 0
    module = make_role("", 71, ema=False).transformer.bfloat16()
    read_weights(f"{tmp_path / 'out'}#teacher", module)
    expected = {name: tensor.bfloat16() for name, tensor in tensors_in(weights_folder).items()}
    assert_identical(module.state_dict(), expected)
