"""Roles: the named models of a run. A teacher, a student and a critic differ in nothing but name and ``trainable``.

A RoleHandle holds what belongs to one role: its modules, optimizers, schedulers and EMA, whatever the layout.
Parameters may be plain tensors (one process) or DTensors (FSDP2); everything here works on both.
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
    """Exponential moving average of a module's trained parameters, stored like them: sharded where they are sharded.

    Before ``start_step`` updates the average simply follows the parameters, so that it never remembers the initial
    weights.
    """

    def __init__(self, module: nn.Module, decay: float, start_step: int) -> None:
        self.decay, self.start_step = decay, start_step
        self.shadow: dict[str, Tensor] = {
            name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module, num_updates: int) -> None:
        """Folds the current parameters in. ``num_updates`` counts the role's optimizer steps so far, this one
        included."""
        decay = self.decay if num_updates > self.start_step else 0.0
        reshard(module)
        shadow, current = list(self.shadow.values()), [p.detach() for p in module.parameters() if p.requires_grad]
        torch._foreach_lerp_(shadow, current, 1.0 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Puts the averaged weights into the module for the duration of the block, then the trained ones back."""
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
    """One role. ``modules["transformer"]`` is the network; further modules (a second expert) may stand beside it."""

    name: str
    modules: dict[str, nn.Module]
    trainable: bool
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    schedulers: dict[str, LRScheduler] = field(default_factory=dict)
    ema: Ema | None = None
    adapters_only: bool = False
    """Whether only adapters are trained, and so saved: the weights that they change are named by the checkpoint."""
    max_grad_norm: float = math.inf
    num_updates: int = 0
    """Optimizer steps taken; saved with the checkpoint, drives the EMA's start."""
    num_skips: int = 0
    """Updates left out because they were not finite; saved with the checkpoint."""

    @property
    def transformer(self) -> nn.Module:
        return self.modules["transformer"]

    @property
    def network(self) -> nn.Module:
        """All that is trained and averaged: the transformer where it is alone, else all modules by name."""
        return self.transformer if len(self.modules) == 1 else nn.ModuleDict(self.modules)

    def step(self, *, tick_ema: bool) -> None:
        """Applies the accumulated gradients, advances the schedules and folds the result into the EMA."""
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for scheduler in self.schedulers.values():
            scheduler.step()
        self.num_updates += 1
        if self.ema is not None and tick_ema:
            self.ema.update(self.network, self.num_updates)

    def skip(self) -> None:
        """Drops the accumulated gradients; weights, moments, schedules and EMA stay as they are."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self.num_skips += 1

    @property
    def learning_rate(self) -> float:
        """Of the next update of the network."""
        return float(self.schedulers["transformer"].get_last_lr()[0])

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """For the duration of the block: the averaged weights where there is an EMA, else the trained ones."""
        if self.ema is None:
            yield
        else:
            with self.ema.applied(self.network):
                yield

    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of all modules, as they are stored."""
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
