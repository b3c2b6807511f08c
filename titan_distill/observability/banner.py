"""What a run says before its first step and after its last: nothing that decides numbers or speed stays silent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

from titan_distill.attention.dense import dense_backend
from titan_distill.config.degrees import Degrees
from titan_distill.config.role_sections import HEAD_FLAVOR
from titan_distill.parallelisms.activation_checkpoint import describe as describe_checkpointing
from titan_distill.parallelisms.compile import describe as describe_compile
from titan_distill.parallelisms.float8 import describe as describe_float8
from titan_distill.parallelisms.lora import describe as describe_lora

if TYPE_CHECKING:
    from titan_distill.config.config import Config
    from titan_distill.parallelisms.mesh import World
    from titan_distill.roles import RoleHandle, RoleManager


def banner(
    config: Config, roles: RoleManager, world: World, degrees: Mapping[str, Degrees], num_micro_batches: int
) -> str:
    """Method, roles with size, dtype, attention and layout, batch, data and output, one fact a line."""
    training = config.training
    ranks = "1 process" if world.size == 1 else f"{world.size} ranks"
    lines = [
        f"{config.job.name}: {config.recipe.method} on {config.recipe.family}, {training.steps} steps, "
        f"seed {config.job.seed}",
        f"  device    {ranks} on {world.device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        f"  batch     {training.global_batch_size} samples = {world.size} ranks x {num_micro_batches} micro-batches x "
        f"{training.local_batch_size}",
    ]
    lines += [f"  {role.name:<9} {_describe(config, role, world.device)}" for role in roles]
    lines += [
        f"  data      {config.data.path}",
        f"  output    {config.job.output_folder}",
    ]
    return "\n".join(lines)


def closing(config: Config, metrics: Mapping[str, float]) -> str:
    """The last scores as a table, and where to look."""
    folder, steps = config.job.output_folder, config.training.steps
    lines = [f"{config.job.name} is done after {steps} steps."]
    scores = {
        name.removeprefix("validation/"): value for name, value in metrics.items() if name.startswith("validation/")
    }
    lines += [f"  {name:<44} {value:8.4f}" for name, value in scores.items()]
    lines.append(f"  metrics        {folder / 'metrics.jsonl'}")
    if config.checkpoint.enabled:
        lines.append(f"  checkpoint     {folder / 'checkpoints' / f'step-{steps:08d}'}")
    if config.validation.enabled:
        lines.append(f"  look at        {folder / 'validation' / f'step-{steps:08d}' / 'contact_sheet.png'}")
    return "\n".join(lines)


def _describe(config: Config, handle: RoleHandle, device: torch.device) -> str:
    name, module = handle.name, handle.network
    parameters = list(module.parameters())
    role = config.roles[name]
    size = sum(p.numel() for p in parameters) / 1e6
    precision = str(parameters[0].dtype).removeprefix("torch.")
    if config.training.dtype != precision:
        precision += f" stored, {config.training.dtype} computed"
    layout = "FSDP2 sharded" if hasattr(parameters[0], "placements") else "whole"
    kind = "trained" if role.trainable else "frozen"
    segmentation = getattr(module, "segmentation", None)
    attention = f"{role.attention} attention" + (f" in {segmentation.describe()}" if segmentation else "")
    if backend := _dense_backend(config, module, device, role.trainable):
        attention += f" by {backend}" if role.attention == "dense" else f" (dense: {backend})"
    extras = ["head" if role.flavor == HEAD_FLAVOR else attention]
    if len(handle.modules) > 1:
        extras.append(f"{len(handle.modules)} experts")
    if role.lora.enabled:
        extras.append(describe_lora(role.lora, module))
    if role.trainable and config.activation_checkpoint.mode != "none":
        extras.append(f"activation checkpointing {describe_checkpointing(config.activation_checkpoint)}")
    if config.compile.enabled:
        extras.append(describe_compile(config.compile))
    if config.float8.for_role(name).enabled:
        extras.append(describe_float8(config.float8, module))
    if config.ema.decay and config.ema.role == name:
        extras.append(f"EMA {config.ema.decay} from update {config.ema.start_step}")
    return f"{kind}, {size:,.1f} M parameters, {precision}, {layout}, {', '.join(extras)}"


def _dense_backend(config: Config, module: Module, device: torch.device, trained: bool) -> str:
    """The kernel of dense attention, which sparse roles need below their crossover and between video and text."""
    architecture: Any = getattr(module, "config", None)
    if not hasattr(architecture, "attention_head_dim") or device.type == "meta":
        return ""  # a family without attention, or a dry run, which has no device to ask
    heads, head_dim = architecture.num_attention_heads, architecture.attention_head_dim
    dtype = getattr(torch, config.training.dtype)
    return dense_backend(heads, head_dim, dtype, device, trained)
