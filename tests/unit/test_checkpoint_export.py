"""Export: from a training checkpoint to a folder that diffusers' own WanPipeline loads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from torch import Tensor
from transformers import UMT5Config

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
    """A random pipeline, as small as diffusers builds it, with a teacher as its transformer and a file that is none of
    it."""
    folder = tmp_path_factory.mktemp("teacher_pipeline")
    encoder = UMT5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])
    save_folder(make_transformer(7).state_dict(), CONFIG, folder / "transformer")
    transformer = WanPipeline.from_pretrained  # noqa: F841
    return folder
