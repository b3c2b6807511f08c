"""Export: from a training checkpoint to a folder that diffusers' own WanPipeline loads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from small_checkpoints import CONFIG
from torch import Tensor
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from titan_distill.checkpoint.manager import CheckpointManager, RunInfo
from titan_distill.checkpoint.manifest import CheckpointDamaged, FrozenRole
from titan_distill.checkpoint.state import TrainState
from titan_distill.checkpoint.tools.contents import role_tensors
from titan_distill.commands.export import export
from titan_distill.models.wan.plugin import WanFamily
from titan_distill.roles import Ema, RoleHandle, RoleManager

VIDEO = {
    "prompt": "a red disc",
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "num_inference_steps": 2,
    "output_type": "pt",
}


def make_transformer(seed: int) -> WanTransformer3DModel:
    """Diffusers' own transformer: what is exported must equal it, whoever trained it."""
    torch.manual_seed(seed)
    architecture = {name: value for name, value in CONFIG.to_diffusers().items() if not name.startswith("_")}
    return WanTransformer3DModel(**architecture)


@pytest.fixture(scope="module")
def roles() -> RoleManager:
    names = ("student", "critic")
    student, critic = (RoleHandle(name, {"transformer": make_transformer(0)}, trainable=True) for name in names)
    student.ema = Ema(student.transformer, decay=0.9, start_step=0)
    for averaged in student.ema.shadow.values():
        averaged.mul_(0.5)
    return RoleManager([student, critic])


@pytest.fixture(scope="module")
def checkpoint(roles: RoleManager, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("outputs") / "my_run"
    architectures = {handle.name: CONFIG.to_diffusers() for handle in roles.trainable}
    info = RunInfo("wan", "d", architectures=architectures, frozen={"teacher": FrozenRole("weights/teacher", "t")})
    manager = CheckpointManager(run / "checkpoints", keep=1, run_info=info)
    path = manager.save(roles, TrainState(step=30, samples_seen=120))
    (run / "config.toml").write_text('[job]\nname = "my_run"\n')
    return path


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with another transformer, as small as diffusers builds it, and files that are no part of an export."""
    folder = tmp_path_factory.mktemp("teacher_pipeline")
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    parts = {"tokenizer": ByT5Tokenizer(), "text_encoder": encoder, "vae": vae, "scheduler": scheduler}
    WanPipeline(transformer=make_transformer(7), **parts).save_pretrained(folder)
    for name in ("Wan2.1_VAE.pth", "transformer/notes.txt"):
        (folder / name).write_text("stays behind")
    return folder


@pytest.mark.parametrize("use_ema", [False, True])
def test_diffusers_makes_the_same_video(
    roles: RoleManager, checkpoint: Path, pipeline_folder: Path, tmp_path: Path, use_ema: bool
) -> None:
    out, weights = tmp_path / "exported", "ema" if use_ema else "raw"
    export(checkpoint.with_name("latest"), out, weights=weights, pipeline=pipeline_folder)
    exported, expected = WanPipeline.from_pretrained(out), WanPipeline.from_pretrained(pipeline_folder)
    student = roles["student"]
    expected.transformer.load_state_dict(student.ema.shadow if use_ema else student.transformer.state_dict())
    videos = [pipe(**VIDEO, generator=torch.Generator().manual_seed(0)).frames for pipe in (exported, expected)]
    assert torch.equal(*videos)
    assert not any(path.read_bytes() == b"stays behind" for path in out.rglob("*") if path.is_file())
    assert os.listdir(tmp_path) == ["exported"]


def test_model_card_says_where_the_weights_are_from(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(checkpoint, out)
    assert sorted(os.listdir(out)) == ["README.md", "transformer"]
    card = (out / "README.md").read_text()
    for line in ("| role | student |", "| weights | exponential moving average |", "| step | 30 |", 'name = "my_run"'):
        assert line in card


def test_dtype_is_that_of_the_file(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "out", "critic", dtype="bfloat16")
    (weights,) = (tmp_path / "out" / "transformer").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "studnet"}, "has no role 'studnet'; it has student, critic"),
        ({"role": "teacher"}, "role 'teacher' is frozen.*weights/teacher"),
        ({"role": "critic", "weights": "ema"}, "has no EMA of 'critic'"),
        ({"pipeline": Path("nowhere")}, r"nowhere \(seen from .*\) is not a diffusers pipeline"),
    ],
)
def test_wrong_requests_are_one_sentence_and_leave_nothing(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export(checkpoint, tmp_path / "out", **changes)
    assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        export(checkpoint, tmp_path)


def test_missing_checkpoint_is_named(checkpoint: Path, tmp_path: Path) -> None:
    missing = checkpoint.with_name("step-00000031")
    with pytest.raises(ValueError, match=r"no checkpoint .*step-00000031; .* has step-00000030"):
        export(missing, tmp_path / "out")


def test_writer_that_fails_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(tensors: Iterable[tuple[str, Tensor]], architecture: Any, folder: Path, dtype: Any) -> None:
        folder.mkdir()
        next(iter(tensors))
        raise OSError("No space left on device")

    monkeypatch.setattr(WanFamily, "write_weights", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export(checkpoint, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_damaged_checkpoint_is_not_exported(roles: RoleManager, tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=1, run_info=RunInfo("wan", "d"))
    path = manager.save(roles, TrainState(step=1))
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[-1] ^= 1
    (path / "__0_0.distcp").write_bytes(content)
    with pytest.raises(CheckpointDamaged, match=r"__0_0\.distcp is damaged"):
        role_tensors(path, "student", use_ema=False)
