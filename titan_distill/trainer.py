"""The training loop.

`run` → `train_step` → `run_step` → `run_update` → `forward_backward`: a step fetches one global batch and runs the
updates that the method says are due. The trainer knows neither roles nor losses nor model families.

A method returns one loss per sample. The trainer divides their sum by the *global* batch size and sums gradients over
ranks. One rank, many ranks and any number of micro-batches therefore take the same step.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_distill.checkpoint.manager import CheckpointManager
from titan_distill.checkpoint.state import TrainState
from titan_distill.config.config import Config
from titan_distill.data.loader import Batch, SampleLoader
from titan_distill.data.rows import BadRowError
from titan_distill.diffusion.transfer import to_device
from titan_distill.fault_tolerance.nonfinite import NonFiniteError, count_nonfinite, describe_nonfinite, skip_or_raise
from titan_distill.fault_tolerance.ranks import RankFailure, Ranks
from titan_distill.fault_tolerance.signals import Stop, StopRequested
from titan_distill.fault_tolerance.watchdog import LostRankError, Watchdog
from titan_distill.methods.base import TrainingMethod, Update
from titan_distill.methods.held_out import HeldOutLoss
from titan_distill.models.base import Adapter
from titan_distill.observability.metrics import MetricsLogger
from titan_distill.observability.profiling import Profiler
from titan_distill.observability.progress import CHECKPOINT, PAGE, VALIDATION
from titan_distill.observability.timing import PhaseTimer
from titan_distill.parallelisms.fsdp import set_gradient_sync
from titan_distill.parallelisms.mesh import Layouts, sum_over_samples, tighten_timeout
from titan_distill.roles import RoleHandle, RoleManager
from titan_distill.validation.report.doctor import Doctor
from titan_distill.validation.report.page import update_page
from titan_distill.validation.validator import Validator

__all__ = ["NonFiniteError", "Trainer"]


@dataclass
class Trainer:
    """A run, whose parts `train.assemble` builds."""

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
    ranks: Ranks
    """All ranks, for waits that may last longer than a collective during training."""
    step_ranks: Ranks
    """All ranks, for what they tell each other in every step."""
    doctor: Doctor
    held_out: HeldOutLoss | None = None
    watchdog: Watchdog | None = None
    stop: Stop = field(default_factory=Stop)

    def run(self) -> bool:
        """Trains from `state.step` to `training.steps`. Returns False when a signal ended it before."""
        gc.disable()
        try:
            with suppress(StopRequested):  # a signal during start-up
                self.stop.poll()
            if self.state.step == 0:
                self.validate()
            first_step = self.state.step
            with self.profiler, self.checkpoints or nullcontext():
                while self.state.step < self.config.training.steps and not self.stop.is_agreed:
                    self.train_step()
                    if self.state.step == first_step + 1:
                        tighten_timeout(self.config.comm.train_timeout_seconds, self.layouts, self.step_ranks.group)
                        if self.watchdog is not None:
                            self.watchdog.tighten(self.config.comm.train_timeout_seconds)
                    self.after_step()
        finally:
            gc.enable()
            self._write_page(is_running=False)
        return not self.stop.is_agreed

    def train_step(self) -> None:
        """Trains on one global batch, counts the step and logs its metrics."""
        values: dict[str, float] = {}
        for _, found in self.run_step():
            values |= found
        self.state.step += 1
        if self.watchdog is not None:
            self.watchdog.step = self.state.step
        self.state.samples_seen += self.config.training.global_batch_size
        self.metrics.step(self.state.step, values, samples_seen=self.state.samples_seen)

    def run_step(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Runs all updates that are due on the next global batch. Yields the metrics of each part as it ends: first the
        batch, under the name "step", then every update under its role's name."""
        step = self.state.step
        with self.timer("data"):
            batch = self._next_batch()
        watched = self.doctor.watch(step + 1, batch.captions)
        yield "step", self.adapter.start_step(self.roles, step) | watched
        for update in self.method.updates(step):
            yield update.role, self.run_update(update, batch)

    def _next_batch(self) -> Batch:
        """Loads and prepares this rank's part of the global batch. An error on one rank is every rank's, before they
        wait for that rank in a collective.

        Raises:
            BadRowError: on all ranks, if one sentence explains the error.
            LostRankError: any other error of another rank; the rank at fault raises its own, with its traceback.
        """
        try:
            batch = self.step_ranks.together(lambda: self.adapter.prepare_batch(next(self.loader)))
            return self.adapter.share_batch(batch)
        except BadRowError:
            raise
        except ValueError as error:
            raise BadRowError(str(error)) from error
        except RankFailure as failure:
            lost = failure.__cause__ or LostRankError(str(failure))
        raise lost  # out here, so that the traceback does not tell of the agreement, too

    def run_update(self, update: Update, batch: Batch) -> dict[str, float]:
        """Accumulates gradients over micro-batches, checks and clips them, and steps the optimizer of one role."""
        role = self.roles[update.role]
        totals, losses_N = self.forward_backward(update, role, batch)
        totals |= self.doctor.sums(losses_N.device)
        with self.timer("optimizer"):
            means, norm, num_nonfinite = self._sum_over_ranks(totals, losses_N, self._clip_gradients(role))
            values = self.doctor.received(self.state.step + 1, role.name, means)
            values |= {f"grad_norm/{role.name}": norm, f"lr/{role.name}": role.learning_rate}
            if num_nonfinite:
                step = self.state.step + 1  # messages count as the progress line does, from 1
                sentence = describe_nonfinite(role.name, step, batch.sample_ids, losses_N, norm)
                role.skip()
                skip_or_raise(sentence, role.num_skips, self.config.training.max_nonfinite_skips)
            else:
                self._release_state()
                with self.doctor.weighing(role, norm):
                    role.step(self.state.step, tick_ema=update.ema)
        if self.config.training.max_nonfinite_skips:
            values[f"nonfinite_skips/{role.name}"] = role.num_skips
        return values

    def forward_backward(self, update: Update, role: RoleHandle, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Sums the gradients of all micro-batches. Returns sums of the loss and of the method's metrics over this
        rank's samples, and the [N] losses themselves."""
        training = self.config.training
        micro_batches: Sequence[Batch] = batch.split(training.local_batch_size)
        if update.prepare is not None:
            with torch.no_grad():
                micro_batches = update.prepare(micro_batches, self.state.step, self._global_mean)
        totals: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        for index, micro_batch in enumerate(micro_batches):
            is_last, reduce_every = index == len(micro_batches) - 1, training.reduce_gradients == "every"
            for module in role.modules.values():
                set_gradient_sync(module, is_last=is_last, reduce_every=reduce_every)
            result = update.loss(micro_batch, self.state.step)
            with self.timer("backward"):
                (result.losses_B.sum() / training.global_batch_size).backward()
            for name, value_B in {f"loss/{role.name}": result.losses_B, **result.metrics_B}.items():
                total = value_B.detach().double().sum()
                totals[name] = totals[name] + total if name in totals else total
            losses.append(result.losses_B.detach())
        return totals, torch.cat(losses)

    def _global_mean(self, values_N: Tensor) -> Tensor:
        total = sum_over_samples(values_N.double().sum(0), self.layouts.data_group)
        return total / self.config.training.global_batch_size

    def _sum_over_ranks(
        self, totals: dict[str, Tensor], losses_N: Tensor, norm: Tensor
    ) -> tuple[dict[str, float], float, float]:
        """Reduces in one collective all that ranks tell each other about an update: its sums, whether it is finite, and
        whether a rank was asked to stop. Returns means over the global batch, the gradient norm, and the number of
        non-finite values. The host waits for the device here, once per update."""
        norm = to_device(norm.double(), losses_N.device)
        num_nonfinite = count_nonfinite(losses_N, norm)
        asked_to_stop = torch.full_like(num_nonfinite, self.stop.vote)
        summed = sum_over_samples(
            torch.stack([*totals.values(), num_nonfinite, asked_to_stop]), self.layouts.data_group
        )
        *sums, nonfinite, stops, norm_value = torch.cat([summed, norm[None]]).tolist()
        self.stop.agree(stops)
        means = {name: value / self.config.training.global_batch_size for name, value in zip(totals, sums)}
        return means, norm_value, nonfinite

    def after_step(self) -> None:
        """Saves, validates, collects garbage and advances the profiler, each if it is due. A run that was asked to stop
        saves now and does not validate."""
        config, step = self.config, self.state.step
        last = step == config.training.steps
        saves = last or step % config.checkpoint.interval == 0
        if saves:
            self.save()
        elif self.checkpoints is not None and self.checkpoints.is_saving:
            with self.timer(CHECKPOINT):
                self.checkpoints.poll()
        if last or (config.validation.interval and step % config.validation.interval == 0):
            self.validate()
        if self.stop.is_agreed and not saves:
            self.save()
        if step % config.training.gc_interval == 0:
            # At the same step on all ranks, because a rank that collects alone makes every other rank wait.
            gc.collect(1)
        self.profiler.step()

    def save(self) -> None:
        """Saves a checkpoint of this step, or begins to when saving is asynchronous. Does nothing when checkpoints are
        off."""
        if self.checkpoints is not None:
            with self.timer(CHECKPOINT):
                self.checkpoints.save(self.roles, self.state)

    def _release_state(self) -> None:
        """Waits until an asynchronous save no longer reads weights, optimizer state and averages."""
        if self.checkpoints is not None and self.checkpoints.is_saving:
            with self.timer(CHECKPOINT):
                self.checkpoints.before_change()

    def validate(self) -> None:
        """Samples and scores as the method asks, and measures the held-out loss. Does nothing when both are off or the
        run is to stop."""
        if (self.validator is None and self.held_out is None) or self.stop.is_agreed:
            return
        self._release_state()  # validation swaps averaged weights in
        counting = self.adapter.work.paused() if self.adapter.work else nullcontext()
        step, scores, held_out_seconds = self.state.step, dict[str, float](), 0.0
        request = self.method.validation_request()
        try:
            with self.timer(VALIDATION), counting:
                if self.validator is not None:
                    self.validator.poll = self.stop.poll
                    scores |= self.validator.validate(step, request, self.roles)
                    self.metrics.log_media(step, self.validator.media(step))
                if self.held_out is not None:
                    started, self.held_out.poll = time.perf_counter(), self.stop.poll
                    scores |= self.held_out.measure(step, self.roles)
                    held_out_seconds = time.perf_counter() - started
                # After what rank 0 does alone, which may take longer than a collective during training may.
                self.ranks.wait()
        except StopRequested:
            return
        judged = {} if self.validator is None else self.doctor.validated(step, self.validator.readings, self.roles)
        self.metrics.log(step, {f"validation/{name}": value for name, value in scores.items()} | judged)
        if (sampling := self.validator.seconds(request, self.roles) if self.validator else 0.0) is not None:
            self.metrics.expect({VALIDATION: sampling + held_out_seconds})
        torch.cuda.empty_cache()  # training cannot use blocks of the decoder's sizes
        if step < self.config.training.steps:
            self._write_page(is_running=True)

    def _write_page(self, *, is_running: bool) -> None:
        """Writes the run's page on rank 0, if the run validates. Other ranks may have to wait longer than for a
        collective during training."""
        if self.validator is None and self.held_out is None:
            return
        with self.timer(PAGE):
            if self.ranks.rank == 0:
                update_page(self.config.job.output_folder, is_running=is_running)
            if is_running:
                self.ranks.wait()

    def _clip_gradients(self, role: RoleHandle) -> Tensor:
        """Clips the gradients of a role. Returns their norm before it, on their device: the host does not wait."""
        parameters = role.parameters()
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        torch.nn.utils.clip_grads_with_norm_(parameters, role.max_grad_norm, norm)
        return norm
