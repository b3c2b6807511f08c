"""Export: from a training checkpoint to a folder that diffusers loads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from titan_distill.checkpoint.convert import export
from titan_distill.checkpoint.manager import CheckpointManager, RunInfo
from titan_distill.checkpoint.manifest import FrozenRole
from titan_distill.checkpoint.state import TrainState
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.state_dict import save_folder
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.roles import Ema, RoleHandle, RoleManager

CONFIG = WanConfig(
    num_layers=1,
    num_attention_heads=2,
    attention_head_dim=12,
    ffn_dim=16,
    text_dim=8,
    freq_dim=8,
    in_channels=4,
    out_channels=4,
)


def write_weights(
    tensors: Iterable[tuple[str, Tensor]], architecture: dict[str, Any], folder: Path, dtype: torch.dtype | None
) -> None:
    save_folder(tensors, WanConfig.from_diffusers(architecture), folder, dtype)


def make_transformer(seed: int) -> WanTransformer:
    torch.manual_seed(seed)
    model = WanTransformer.from_config(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def roles() -> RoleManager:
    student, critic = (
        RoleHandle(name, {"transformer": make_transformer(0)}, trainable=True) for name in ("student", "critic")
    )
    student.ema = Ema(student.transformer, decay=0.9, start_step=0)
    for tensor in student.ema.shadow.values():
        tensor.add_(1)
    return RoleManager([student, critic])


@pytest.fixture(scope="module")
def checkpoint(roles: RoleManager, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("outputs") / "my_run"
    architectures = {handle.name: CONFIG.to_diffusers() for handle in roles.trainable}
    info = RunInfo("wan", "d", architectures=architectures, frozen={"teacher": FrozenRole("weights/teacher", "t")})
    path = CheckpointManager(run / "checkpoints", keep=1, run_info=info).save(
        roles, TrainState(step=30, samples_seen=120)
    )
    (run / "config.toml").write_text('[job]\nname = "my_run"\n')
    return path


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with two parts beside the transformer, and a file that its index does not name."""
    folder = tmp_path_factory.mktemp("teacher_pipeline")
    save_folder(make_transformer(7).state_dict(), CONFIG, folder / "transformer")
    for part in ("vae", "scheduler"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps({"part": part}))
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "X", "vae": [], "scheduler": [], "transformer": []})
    )
    (folder / "notes.txt").write_text("not part of it")
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("use_ema", [False, True])
def test_exported_weights_are_the_saved_ones(
    use_ema: bool, roles: RoleManager, checkpoint: Path, tmp_path: Path
) -> None:
    out = export(checkpoint, "student", tmp_path / "out", write_weights=write_weights, use_ema=use_ema)
    student = roles["student"]
    assert student.ema is not None
    expected = student.ema.shadow if use_ema else dict(student.transformer.named_parameters())
    found = read(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_diffusers_computes_what_the_trained_model_computes(
    roles: RoleManager, checkpoint: Path, tmp_path: Path
) -> None:
    out = export(checkpoint, "critic", tmp_path / "out", write_weights=write_weights, use_ema=False)
    theirs = WanTransformer3DModel.from_pretrained(out / "transformer")
    inputs = torch.randn(1, 4, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 8)
    with torch.no_grad():
        expected = roles["critic"].transformer(*inputs)
        torch.testing.assert_close(theirs(*inputs, return_dict=False)[0], expected, rtol=1e-5, atol=1e-5)


def test_export_is_a_whole_pipeline_with_its_history(checkpoint: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    out = export(
        checkpoint, "student", tmp_path / "out",
        write_weights=write_weights, use_ema=True, dtype="bfloat16", pipeline_folder=pipeline_folder,
    )  # fmt: skip
    assert {path.name for path in out.iterdir()} == {"model_index.json", "vae", "scheduler", "transformer", "README.md"}
    card = (out / "README.md").read_text()
    assert all(fact in card for fact in ("student", "exponential moving average", "| step | 30 |", 'name = "my_run"'))
    assert {tensor.dtype for tensor in read(out).values()} == {torch.bfloat16}


REFUSED = {
    "unknown role": ({"role": "janitor"}, "student, critic"),
    "frozen role": ({"role": "teacher"}, "weights/teacher"),
    "no average": ({"role": "critic", "use_ema": True}, "no EMA"),
    "unknown dtype": ({"dtype": "int8"}, "float32, bfloat16, float16"),
    "no pipeline": ({"pipeline_folder": Path("nowhere")}, "model_index.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_leave_nothing_behind(name: str, checkpoint: Path, tmp_path: Path) -> None:
    changes, expected = REFUSED[name]
    arguments = {"role": "student", "use_ema": False} | changes
    with pytest.raises(ValueError, match=expected):
        export(checkpoint, out=tmp_path / "out", write_weights=write_weights, **arguments)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_touched(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        export(checkpoint, "student", tmp_path, write_weights=write_weights, use_ema=False)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "checkpoints" / "step-00000001"
    with pytest.raises(ValueError, match="step-00000001"):
        export(missing, "student", tmp_path / "out", write_weights=write_weights, use_ema=False)
