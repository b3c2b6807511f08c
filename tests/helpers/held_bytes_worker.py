"""Bytes that real ranks hold where the planner says so: gradients between micro-batches, an exchange of batches.

Usage: `torchrun ... held_bytes_worker.py RUNS.json FOLDER`, where RUNS.json maps names to command lines. Rank N leaves
FOLDER/NAME.rankN.json for each run. Living tensors are
counted, so nothing depends on time or load.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_distill.config.loading import load_config
from titan_distill.data.loader import Batch
from titan_distill.methods.base import LossResult
from titan_distill.parallelisms.fsdp import reshard
from titan_distill.parallelisms.mesh import BatchExchange, World, start_world
from titan_distill.resolve import resolve
from titan_distill.train import assemble
from titan_distill.trainer import Trainer


def main(runs_file: str, folder: str) -> None:
    torch.set_num_threads(1)
    world = start_world(120)
    for name, arguments in json.loads(Path(runs_file).read_text(encoding="utf-8")).items():
        found = measure(world, arguments)
        Path(folder, f"{name}.rank{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure(world: World, arguments: list[str]) -> dict[str, int]:
    """Bytes in an update of the student: `gradients` that its first micro-batches leave for the last one, and what an
    `exchange` of the teacher holds inside a feed-forward, without gathered weights, above what the rank held before."""
    trainer = assemble(resolve(load_config(arguments), world.size), world)
    held: dict[str, list[int]] = {"before": [], "gradients": [], "exchange": []}
    run, gelu, teacher = BatchExchange.run, F.gelu, trainer.roles["teacher"].network
    shards: dict[int, int] = {}

    def exchange(*arguments: Any) -> Tensor:
        only_what_lasts(trainer)
        held["before"].append(alive())
        shards.update(storages(teacher.parameters()))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "gelu", inside)
            return run(*arguments)

    def inside(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        result = gelu(x, *arguments, **options)
        gathered = {at: size for at, size in storages(teacher.parameters()).items() if at not in shards}
        held["exchange"].append(alive() - held["before"][-1] - sum(gathered.values()))
        return result

    def watched(batch: Batch, step: int) -> LossResult:
        only_what_lasts(trainer)
        held["gradients"].append(alive())
        return update.loss(batch, step)

    student = trainer.roles["student"]
    (update,) = (update for update in trainer.method.updates(0) if update.role == student.name)
    batch = trainer._next_batch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchExchange, "run", exchange)
        trainer.forward_backward(update, student, batch)  # makes what is made once: rotary phases
    student.skip()
    trainer.forward_backward(replace(update, loss=watched), student, batch)
    trainer.metrics.close()
    first, *_, last = held["gradients"]
    return {"gradients": last - first, "exchange": max(held["exchange"])}


def alive() -> int:
    """Bytes of all tensors of this process, gradients included. Each storage counts once. The least of a few counts,
    because gloo's threads release what they have sent a little later than the collective ends."""
    return min(_count() for _ in range(3) if time.sleep(0.02) is None)


def _count() -> int:
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum(storages(tensors).values())


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the storages of tensors by their address."""
    plain = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    found = [tensor.untyped_storage() for tensor in plain if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def only_what_lasts(trainer: Trainer) -> None:
    """Frees gathered weights, which the planner counts elsewhere, and cycles that Python has not collected yet."""
    for role in trainer.roles:
        reshard(role.network)
    gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
