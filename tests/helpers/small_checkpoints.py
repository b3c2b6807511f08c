"""Small real Wan roles, their checkpoints, and `titan-distill checkpoint` in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from titan_distill import cli
from titan_distill.checkpoint import commit, storage
from titan_distill.checkpoint.manager import CheckpointManager, RunInfo
from titan_distill.checkpoint.manifest import FrozenRole, Manifest, TrainedRole
from titan_distill.fault_tolerance.ranks import Ranks
from titan_distill.models.wan.config import WanConfig
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


def trained_role(name: str, module: nn.Module, *, ema: Ema | None, lr: float = 1e-2) -> RoleHandle:
    """A role with AdamW and a learning rate that changes at every update."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
    return RoleHandle(
        name,
        {"transformer": module},
        trainable=True,
        optimizers={"transformer": optimizer},
        schedulers={"transformer": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))},
        ema=ema,
    )


def make_role(name: str, seed: int, *, ema: bool) -> RoleHandle:
    torch.manual_seed(seed)
    module = WanTransformer(CONFIG)
    return trained_role(name, module, ema=Ema(module, decay=0.9, start_step=0) if ema else None)


def make_roles(seed: int) -> RoleManager:
    return RoleManager([make_role("student", seed, ema=True), make_role("critic", seed + 1, ema=False)])


def train(handle: RoleHandle) -> None:
    for parameter in handle.parameters():
        generator = torch.Generator().manual_seed(handle.num_updates)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    handle.step(handle.num_updates, tick_ema=True)


def make_manager(folder: Path) -> CheckpointManager:
    architectures = {name: CONFIG.to_diffusers() for name in ("student", "critic")}
    info = RunInfo("wan", "d", architectures=architectures, frozen={"teacher": FrozenRole("weights/teacher", "t")})
    return CheckpointManager(folder, keep=2, run_info=info)


def write_weights_only(
    folder: Path, modules: dict[str, dict[str, torch.Tensor]], architecture: dict[str, Any], *, role: str = "student"
) -> Path:
    """A checkpoint of weights alone, as `titan-distill checkpoint import` wrote it from a folder of diffusers."""
    trained = TrainedRole(list(modules), 0, has_ema=False, mesh={}, architecture=architecture)
    manifest = Manifest(0, 0, 0, 1, "", "wan", {}, {role: trained}, frozen={}, files={}, weights_only=True)
    state = {f"models/{role}/{module}": tensors for module, tensors in modules.items()}
    commit.publish(folder, manifest, lambda temporary: storage.write(state, temporary, None), Ranks())
    return folder


def call(*arguments: Any) -> int:
    """Exit code of the command."""
    try:
        cli.main(["checkpoint", *map(str, arguments)])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def assert_identical(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        else:
            assert found[name] == value, name
