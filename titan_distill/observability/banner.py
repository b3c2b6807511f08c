"""Banner: the lines that a run prints before its first step (everything that determines its numbers and speed) and
after its last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Module

from titan_distill.attention.dense import dense_backend
from titan_distill.config.config import Config
from titan_distill.config.degrees import Degrees
from titan_distill.config.role_sections import HEAD_FLAVOR
from titan_distill.parallelisms.activation_checkpoint import describe as describe_checkpointing
from titan_distill.parallelisms.compile import describe as describe_compile
from titan_distill.parallelisms.float8 import describe as describe_float8
from titan_distill.parallelisms.lora import describe as describe_lora
from titan_distill.parallelisms.mesh import World
from titan_distill.roles import RoleHandle, RoleManager


def banner(
    config: Config, roles: RoleManager, world: World, degrees: Mapping[str, Degrees], num_micro_batches: int
) -> str:
    """Method, batch, roles (size, dtype, layout, attention), data and output, one fact per line.

    Args:
        degrees: each role's layout by the role's name.
        num_micro_batches: micro-batches of each rank per global batch.
    """
    training = config.training
    num_groups = training.global_batch_size // (num_micro_batches * training.local_batch_size)
    reduced = ", gradients reduced after each" if training.reduce_gradients == "every" and num_micro_batches > 1 else ""
    return "\n".join(
        [
            f"{config.job.name}: {config.recipe.method} on {config.recipe.family}, {training.steps} steps, "
            f"seed {config.job.seed}",
            f"  device    {_counted(world.size, 'rank')} on {world.device.type}, "
            f"{_counted(torch.get_num_threads(), 'thread')} per rank, torch {torch.__version__}",
            f"  batch     {_counted(training.global_batch_size, 'sample')} = "
            f"{_counted(num_groups, 'data-parallel group')} × "
            f"{_counted(num_micro_batches, 'micro-batch', 'es')} × {training.local_batch_size}{reduced}",
            *(f"  {role.name:<9} {_describe(config, role, degrees[role.name], world.device)}" for role in roles),
            *(f"  data      {path}" for path in config.data.paths),
            f"  output    {config.job.output_folder}",
        ]
    )


def closing(config: Config, metrics: Mapping[str, float]) -> str:
    """The last validation scores as a table, and the paths of the run's output."""
    folder, steps = config.job.output_folder, config.training.steps
    prefix = "validation/"
    lines = [f"{config.job.name} is done after {steps} steps."]
    lines += [f"  {name[len(prefix) :]:<44} {value:8.4f}" for name, value in metrics.items() if name.startswith(prefix)]
    lines.append(f"  metrics        {folder / 'metrics.jsonl'}")
    if config.checkpoint.enabled:
        lines.append(f"  checkpoint     {folder / 'checkpoints' / f'step-{steps:08d}'}")
    if (sheet := folder / "validation" / f"step-{steps:08d}" / "contact_sheet.png").is_file():
        lines.append(f"  look at        {sheet}")
    return "\n".join(lines)


def _describe(config: Config, handle: RoleHandle, degrees: Degrees, device: torch.device) -> str:
    name, module, role = handle.name, handle.network, config.roles[handle.name]
    parameters = list(module.parameters())
    precision = str(parameters[0].dtype).removeprefix("torch.")
    if config.training.dtype != precision:
        precision += f" stored, {config.training.dtype} computed"
    facts = [
        "trained" if role.trainable else "frozen",
        f"{sum(p.numel() for p in parameters) / 1e6:,.1f} M parameters",
        precision,
        layout(degrees, cpu_offload=config.roles[name].parallelism.cpu_offload),
        "head" if role.flavor == HEAD_FLAVOR else _attention(config, role.attention, module, device, role.trainable),
    ]
    if role.parallelism.exchange_groups == "in_turn" and degrees.model_parallel > config.parallelism.model_parallel:
        facts.append("one data group at a time")
    if len(handle.modules) > 1:
        facts.append(f"{len(handle.modules)} experts")
    if role.lora.enabled:
        facts.append(describe_lora(role.lora, module))
    if role.trainable and config.activation_checkpoint.mode != "none":
        facts.append(f"activation checkpointing {describe_checkpointing(config.activation_checkpoint)}")
    if config.compile.enabled:
        facts.append(describe_compile(config.compile))
    if config.float8.for_role(name).enabled:
        facts.append(describe_float8(config.float8, module))
    if config.ema.decay and config.ema.role == name:
        start = f" after step {config.ema.start_step}" if config.ema.start_step else ""
        facts.append(f"EMA {config.ema.decay}{start}")
    return " · ".join(facts)


def layout(degrees: Degrees, *, cpu_offload: bool) -> str:
    """A role's layout in words."""
    return f"{degrees}, offloaded to the CPU" if cpu_offload else str(degrees)


def _attention(config: Config, kind: str, module: Module, device: torch.device, trained: bool) -> str:
    """Returns the role's attention and the kernel of its dense attention. Sparse roles use dense attention, too: below
    their crossover, and between video and text."""
    segmentation = getattr(module, "segmentation", None)
    words = f"{kind} attention" + (f" in {segmentation.describe()}" if segmentation else "")
    tile: Any = getattr(module, "tile", None)
    if kind == "sparse" and tile:
        words += f" in tiles of {' × '.join(map(str, tile))}"
    architecture: Any = getattr(module, "config", None)
    if not hasattr(architecture, "attention_head_dim") or device.type == "meta":
        return words  # a family without attention, or a dry run, which has no device to ask
    heads, head_dim = architecture.num_attention_heads, architecture.attention_head_dim
    backend = dense_backend(heads, head_dim, getattr(torch, config.training.dtype), device, trained)
    return f"{words} by {backend}" if kind == "dense" else f"{words} (dense: {backend})"


def _counted(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{plural}"
