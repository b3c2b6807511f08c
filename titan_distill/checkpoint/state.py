"""The state of a run: its keys in a checkpoint, and functions that collect it from the roles and restore it.

    models/{role}/{module}        parameters and buffers; of a role with a LoRA adapter, only that
    optimizers/{role}/{name}      moments and hyperparameters, by parameter name
    schedulers/{role}/{name}      position and last learning rates
    ema/{role}                    averaged weights, sharded like the weights; by module where there are several
    random/torch                  torch's CPU generator
    train_state                   step, samples_seen, seed, num_updates and num_skips by role

Sharded tensors are DTensors, so any layout can load the checkpoint of any other. Frozen roles are not saved; the
manifest names them. Noise is a function of seed, step and sample, so it needs no generator state. The state of torch's
generator is saved for other random numbers.

An optimizer that has never stepped has no state and is not saved. DCP's helper would create a state by a step with zero
gradients. That step would count, so saving a checkpoint would change Adam's bias correction and the training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from titan_distill.optimizer import set_rates
from titan_distill.roles import RoleHandle, RoleManager

_PROGRESS = "train_state"
_RANDOM = "random/torch"


@dataclass
class TrainState:
    """Progress of a run."""

    step: int = 0
    """Number of completed steps."""
    samples_seen: int = 0
    """Number of samples taken from the data, over all ranks. It is the position in the data."""
    seed: int = 0
    """Seed of every random draw."""


def model_key(role: str, module: str) -> str:
    """Returns the key prefix of a module's state. In a checkpoint a dot and the tensor's name follow it."""
    return f"models/{role}/{module}"


def ema_key(role: str) -> str:
    """Returns the key prefix of a role's EMA. In a checkpoint a dot and the tensor's name follow it."""
    return f"ema/{role}"


def mesh_of(handle: RoleHandle) -> dict[str, int]:
    """Returns the degrees of a role's layout by mesh axis; empty if its parameters are plain tensors."""
    for parameter in handle.parameters():
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            names = mesh.mesh_dim_names or tuple(f"axis{i}" for i in range(mesh.ndim))
            return dict(zip(names, mesh.shape))
    return {}


def collect(roles: RoleManager, train_state: TrainState) -> dict[str, Any]:
    """Returns the state of all trainable roles, for DCP. It contains the live tensors, not copies."""
    state = _without_optimizers(roles, train_state)
    for key, handle, optimizer in _optimizers(roles):
        if handle.num_updates:
            state[key] = get_optimizer_state_dict(_network(handle), optimizer)
        else:
            assert not optimizer.state, f"{handle.name} has optimizer state but num_updates is 0"
    return state


def template(roles: RoleManager, saved_names: Collection[str]) -> dict[str, Any]:
    """Returns a state into which a checkpoint with these names can be read: that of `collect`, with tensors for the
    optimizer state."""
    state = _without_optimizers(roles, TrainState())
    if not any(saved.startswith(f"{_PROGRESS}.num_skips.") for saved in saved_names):
        del state[_PROGRESS]["num_skips"]  # the checkpoint is older than the count
    for key, handle, optimizer in _optimizers(roles):
        if any(saved.startswith(f"{key}.") for saved in saved_names):
            state[key] = get_optimizer_state_dict(_network(handle), optimizer)
            state[key]["state"] = {
                parameter: entries
                for parameter, entries in state[key]["state"].items()
                if any(f"{key}.state.{parameter}.{entry}" in saved_names for entry in entries)
            }
        else:
            assert not optimizer.state, "a checkpoint from before a role's first update needs fresh roles"
    return state


def restore(state: dict[str, Any], roles: RoleManager) -> TrainState:
    """Restores the roles from a `template` that has been read. Returns the progress of the run.

    The state is the checkpoint's: weights, moments, averages, positions in the schedules. The settings are those that
    the roles were built with: learning rates, schedules, decays.
    """
    progress = state[_PROGRESS]
    for key, handle, optimizer in _optimizers(roles):
        if (saved := state.get(key)) is not None:
            for group, present in zip(saved["param_groups"], optimizer.param_groups, strict=True):
                group.update({name: value for name, value in present.items() if name != "params"})
            # Not strict: a parameter that never had a gradient has no state, and must stay so.
            options = StateDictOptions(strict=False)
            set_optimizer_state_dict(_network(handle), optimizer, saved, options=options)
    for handle in roles.trainable:
        for name, module in handle.modules.items():
            # Not strict where only LoRA adapters are saved. All names have been compared before anything was read.
            options = StateDictOptions(strict=not handle.adapters_only)
            set_model_state_dict(module, state[model_key(handle.name, name)], options=options)
        for name, scheduler in handle.schedulers.items():
            scheduler.load_state_dict({**state[_scheduler_key(handle, name)], "base_lrs": scheduler.base_lrs})
            set_rates(scheduler)
        handle.num_updates = progress["num_updates"][handle.name]
        handle.num_skips = progress.get("num_skips", {}).get(handle.name, 0)
    torch.set_rng_state(state[_RANDOM])
    return TrainState(progress["step"], progress["samples_seen"], progress["seed"])


def _without_optimizers(roles: RoleManager, train_state: TrainState) -> dict[str, Any]:
    state: dict[str, Any] = {
        _PROGRESS: {
            "step": train_state.step,
            "samples_seen": train_state.samples_seen,
            "seed": train_state.seed,
            "num_updates": {handle.name: handle.num_updates for handle in roles.trainable},
            "num_skips": {handle.name: handle.num_skips for handle in roles.trainable},
        },
        _RANDOM: torch.get_rng_state(),
    }
    for handle in roles.trainable:
        for name, module in handle.modules.items():
            options = StateDictOptions(ignore_frozen_params=handle.adapters_only)
            state[model_key(handle.name, name)] = get_model_state_dict(module, options=options)
        for name, scheduler in handle.schedulers.items():
            state[_scheduler_key(handle, name)] = scheduler.state_dict()
        if handle.ema is not None:
            state[ema_key(handle.name)] = handle.ema.shadow
    return state


def _optimizers(roles: RoleManager) -> Iterator[tuple[str, RoleHandle, Optimizer]]:
    """Yields key, role and optimizer of all optimizers."""
    for handle in roles.trainable:
        for name, optimizer in handle.optimizers.items():
            yield f"optimizers/{handle.name}/{name}", handle, optimizer


def _scheduler_key(handle: RoleHandle, name: str) -> str:
    return f"schedulers/{handle.name}/{name}"


def _network(handle: RoleHandle) -> nn.ModuleDict:
    """Returns all modules of a role as one module, so that parameters of different modules have different names in the
    optimizer state."""
    return nn.ModuleDict(handle.modules)
