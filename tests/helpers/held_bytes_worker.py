"""Bytes that real ranks hold where the planner says so: gradients between micro-batches, an exchange of batches.

Usage: `torchrun ... held_bytes_worker.py RUNS.json FOLDER`, where RUNS.json maps names to command lines. Rank N leaves
FOLDER/NAME.rankN.json for each run. Torch's profiler counts the allocations, so nothing depends on time or load.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import allocated_peak, allocations
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from titan_distill.config.loading import load_config
from titan_distill.data.loader import Batch
from titan_distill.methods.base import LossResult
from titan_distill.parallelisms.fsdp import reshard
from titan_distill.parallelisms.mesh import BatchExchange, World, start_world
from titan_distill.resolve import resolve
from titan_distill.train import assemble
from titan_distill.trainer import Trainer

Loss = Callable[[Batch, int], LossResult]


def main(runs_file: str, folder: str) -> None:
    torch.set_num_threads(1)
    world = start_world(120)
    for name, arguments in json.loads(Path(runs_file).read_text(encoding="utf-8")).items():
        found = measure(world, arguments)
        Path(folder, f"{name}.rank{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure(world: World, arguments: list[str]) -> dict[str, int]:
    """Bytes in an update of the student: `gradients` that its first micro-batches leave for the last one, and the peak
    of an `exchange` of the teacher above what the rank holds before it."""
    trainer = assemble(resolve(load_config(arguments), world.size), world)
    trainer.train_step()  # makes what is made once: optimizer state, rotary phases
    found = {"gradients": accumulated(trainer), "exchange": exchanged(trainer)}
    trainer.metrics.close()
    return found


def accumulated(trainer: Trainer) -> int:
    """Bytes allocated and not freed between the losses of the first and of the last micro-batch."""
    recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    num_left = trainer.config.training.global_batch_size // (
        trainer.config.training.local_batch_size * trainer.layouts.num_data_groups
    )
    assert num_left > 1

    def watched(loss: Loss) -> Loss:
        def at_ends(batch: Batch, step: int) -> LossResult:
            nonlocal num_left
            if recorded.profiler is None:
                recorded.start()
            num_left -= 1
            if num_left == 0:
                recorded.stop()
            return loss(batch, step)

        return at_ends

    update_student(trainer, watched)
    return sum(allocations(recorded))


def exchanged(trainer: Trainer) -> int:
    peaks = [0]
    run = BatchExchange.run

    def watched(*arguments: Any) -> Tensor:
        result = []
        reshard(trainer.roles["teacher"].transformer)
        peaks.append(allocated_peak(lambda: result.append(run(*arguments))))
        return result[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchExchange, "run", watched)
        update_student(trainer, lambda loss: loss)
    return max(peaks)


def update_student(trainer: Trainer, watched: Callable[[Loss], Loss]) -> None:
    student = trainer.roles["student"]
    (update,) = (update for update in trainer.method.updates(0) if update.role == student.name)
    trainer.forward_backward(replace(update, loss=watched(update.loss)), student, trainer._next_batch())
    student.skip()


if __name__ == "__main__":
    main(*sys.argv[1:])
