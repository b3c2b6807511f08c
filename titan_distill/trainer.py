"""The loop, and only the loop.

``run`` → ``train_step`` → ``run_update`` → ``forward_backward``: a step fetches one global batch and runs the updates
that the method says are due. The trainer knows neither roles nor losses nor model families.

Losses come per sample; their sum is divided by the *global* batch size and gradients are summed over ranks. One rank,
many ranks and any number of micro-batches therefore take the same step.
"""

from __future__ import annotations

import gc
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_distill.checkpoint.manager import CheckpointManager
from titan_distill.checkpoint.state import TrainState
from titan_distill.config import Config
from titan_distill.data.loader import Batch, SampleLoader
from titan_distill.methods.base import TrainingMethod, Update
from titan_distill.models.base import Adapter
from titan_distill.observability.metrics import MetricsLogger, PhaseTimer
from titan_distill.observability.profiling import Profiler
from titan_distill.parallelisms.fsdp import set_gradient_sync
from titan_distill.parallelisms.mesh import Layouts, sum_over_samples, tighten_timeout
from titan_distill.parallelisms.watchdog import Watchdog
from titan_distill.roles import RoleHandle, RoleManager
from titan_distill.validation.base import Validator


class NonFiniteError(RuntimeError):
    """A loss or gradient norm is not finite; raised on all ranks before the optimizer could spread it."""


@dataclass
class Trainer:
    """Everything a run needs, assembled by ``train.assemble``."""

    config: Config
    roles: RoleManager
    method: TrainingMethod
    adapter: Adapter
    loader: SampleLoader
    validator: Validator | None
    checkpoints: CheckpointManager | None
    metrics: MetricsLogger
    timer: PhaseTimer
    profiler: Profiler
    state: TrainState
    layouts: Layouts
    watchdog: Watchdog | None = None

    def run(self) -> None:
        """Trains from ``state.step`` to ``training.steps``."""
        gc.disable()
        try:
            if self.state.step == 0:
                self.validate()
            first_step = self.state.step
            with self.profiler:
                while self.state.step < self.config.training.steps:
                    self.train_step()
                    if self.state.step == first_step + 1:
                        tighten_timeout(self.config.comm.train_timeout_seconds, self.layouts)
                        if self.watchdog is not None:
                            self.watchdog.tighten(self.config.comm.train_timeout_seconds)
                    self.after_step()
        finally:
            gc.enable()

    def train_step(self) -> None:
        """One global batch, all updates due."""
        step = self.state.step
        with self.timer("data"):
            batch = self.adapter.prepare_batch(next(self.loader))
        values = self.adapter.start_step(self.roles, step)
        for update in self.method.updates(step):
            values |= self.run_update(update, batch)
        self.state.step += 1
        if self.watchdog is not None:
            self.watchdog.step = self.state.step
        self.state.samples_seen += self.config.training.global_batch_size
        self.metrics.step(self.state.step, values, samples_seen=self.state.samples_seen)

    def run_update(self, update: Update, batch: Batch) -> dict[str, float]:
        """Accumulates over micro-batches, checks, clips and steps one role."""
        role = self.roles[update.role]
        values = self.forward_backward(update, role, batch)
        with self.timer("optimizer"):
            values[f"grad_norm/{role.name}"] = self._clip_gradients(role)
            self._check_finite(role, batch, values)
            values[f"lr/{role.name}"] = float(role.schedulers["transformer"].get_last_lr()[0])
            role.step(tick_ema=update.ema)
        return values

    def forward_backward(self, update: Update, role: RoleHandle, batch: Batch) -> dict[str, float]:
        """Sums gradients of all micro-batches. Returns the loss and the method's metrics, averaged over the global
        batch."""
        micro_batches = batch.split(self.config.training.local_batch_size)
        global_batch_size = self.config.training.global_batch_size
        totals: dict[str, Tensor] = {}
        for index, micro_batch in enumerate(micro_batches):
            for module in role.modules.values():
                set_gradient_sync(module, index == len(micro_batches) - 1)
            result = update.loss(micro_batch, self.state.step)
            with self.timer("backward"):
                (result.losses_B.sum() / global_batch_size).backward()
            for name, value_B in {f"loss/{role.name}": result.losses_B, **result.metrics_B}.items():
                total = value_B.detach().double().sum()
                totals[name] = totals[name] + total if name in totals else total
        summed = sum_over_samples(torch.stack(list(totals.values())), self.layouts.data_group)
        return dict(zip(totals, (summed / global_batch_size).tolist(), strict=True))

    def after_step(self) -> None:
        """What happens between steps: checkpoint, validation, garbage collection, profiler."""
        config, step = self.config, self.state.step
        last = step == config.training.steps
        if self.checkpoints and (last or step % config.checkpoint.interval == 0):
            with self.timer("checkpoint"):
                self.checkpoints.save(self.roles, self.state)
        if last or (config.validation.interval and step % config.validation.interval == 0):
            self.validate()
        if step % config.training.gc_interval == 0:
            # At the same step on all ranks: a rank that collects alone makes every other rank wait for it.
            gc.collect(1)
        self.profiler.step()

    def validate(self) -> None:
        """Samples and scores as the method asks; a no-op when validation is off."""
        if self.validator is None:
            return
        counting = self.adapter.work.paused() if self.adapter.work else nullcontext()
        with self.timer("validation"), counting:
            scores = self.validator.validate(self.state.step, self.method.validation_request(), self.roles)
        self.metrics.log(self.state.step, {f"validation/{name}": value for name, value in scores.items()})
        self.metrics.log_media(self.state.step, self.validator.media(self.state.step))

    def _clip_gradients(self, role: RoleHandle) -> float:
        parameters = role.parameters()
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        torch.nn.utils.clip_grads_with_norm_(parameters, role.max_grad_norm, norm)
        return float(norm)

    def _check_finite(self, role: RoleHandle, batch: Batch, values: dict[str, float]) -> None:
        for name in (f"loss/{role.name}", f"grad_norm/{role.name}"):
            if not math.isfinite(values[name]):
                raise NonFiniteError(
                    f"{name} is {values[name]} at step {self.state.step}; this rank's samples are {batch.sample_ids}. "
                    "Nothing was updated; lower the learning rate or look at these samples"
                )
