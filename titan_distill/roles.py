"""Roles: the named models of a run. Teacher, student and critic differ only in name and `trainable`.

A RoleHandle has the modules, optimizers, schedulers and EMA of one role. Parameters are plain tensors (one process) or
DTensors (FSDP2); everything here works on both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from titan_distill.parallelisms.fsdp import reshard


class Ema:
    """Exponential moving average of a module's trained parameters, sharded as they are.

    In the first `start_step` training steps the average equals the parameters, so it does not contain the initial
    weights. Recipes count this start in training steps, also where the role has an update only every few steps.
    """

    def __init__(self, module: nn.Module, decay: float, start_step: int) -> None:
        self.decay, self.start_step = decay, start_step
        self.shadow: dict[str, Tensor] = {
            name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module, train_step: int) -> None:
        """Adds the parameters that training step `train_step`, counted from 0, has made to the average."""
        decay = self.decay if train_step >= self.start_step else 0.0
        reshard(module)
        shadow, current = list(self.shadow.values()), [p.detach() for p in module.parameters() if p.requires_grad]
        torch._foreach_lerp_(shadow, current, 1.0 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Swaps the averaged weights into the module within the block, and the trained weights back after it."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        reshard(module)
        parameters = dict(module.named_parameters())
        for name, averaged in self.shadow.items():
            kept = parameters[name].detach().clone()
            parameters[name].copy_(averaged)
            averaged.copy_(kept)


@dataclass
class RoleHandle:
    """One role. `modules["transformer"]` is its network; a second expert has a name of its own."""

    name: str
    modules: dict[str, nn.Module]
    trainable: bool
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    schedulers: dict[str, LRScheduler] = field(default_factory=dict)
    ema: Ema | None = None
    adapters_only: bool = False
    """Whether only LoRA adapters train. A checkpoint then stores them and names the weights that they adapt."""
    max_grad_norm: float = math.inf
    num_updates: int = 0
    """Number of optimizer steps. A checkpoint stores it."""
    num_skips: int = 0
    """Number of updates skipped because they were not finite. A checkpoint stores it."""

    @property
    def transformer(self) -> nn.Module:
        return self.modules["transformer"]

    @property
    def network(self) -> nn.Module:
        """The whole network: the transformer, or all modules by name where there are several."""
        return self.transformer if len(self.modules) == 1 else nn.ModuleDict(self.modules)

    def step(self, train_step: int, *, tick_ema: bool) -> None:
        """Applies the accumulated gradients of training step `train_step` (counted from 0), advances the schedules and
        updates the EMA."""
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for scheduler in self.schedulers.values():
            scheduler.step()
        self.num_updates += 1
        if self.ema is not None and tick_ema:
            self.ema.update(self.network, train_step)

    def skip(self) -> None:
        """Drops the accumulated gradients. Weights, optimizer state, schedules and EMA stay as they are."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self.num_skips += 1

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        return float(self.schedulers["transformer"].get_last_lr()[0])

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Uses the averaged weights within the block, if there is an EMA."""
        if self.ema is None:
            yield
        else:
            with self.ema.applied(self.network):
                yield

    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of all modules, in their stored (sharded) form."""
        for module in self.modules.values():
            reshard(module)
        return [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]


class RoleManager:
    """The roles of a run by name."""

    def __init__(self, handles: list[RoleHandle]) -> None:
        self._handles = {handle.name: handle for handle in handles}

    def __getitem__(self, name: str) -> RoleHandle:
        return self._handles[name]

    def __iter__(self) -> Iterator[RoleHandle]:
        return iter(self._handles.values())

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    @property
    def trainable(self) -> list[RoleHandle]:
        """The roles that have optimizers."""
        return [handle for handle in self if handle.trainable]
