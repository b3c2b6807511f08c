"""Trains stretches of runs on the ranks that torchrun started, and leaves what can be compared beside each.

A job is {"name", "arguments", "saves_at", "mutant"}; its run writes to FOLDER/<name>. Beside that folder there will be

    <name>.ids.json              sample ids of each step, over all ranks
    <name>.loaded.safetensors    state of all trained roles right after resuming
    <name>.saved.safetensors     the same, right before the checkpoint of step "saves_at" (None saves nothing)
    <name>.end.safetensors       the same, after the last step

A state is whole tensors, whatever the layout. One process group serves all jobs: to start ranks costs more than to
train them. Usage: `torchrun ... resume_worker.py JOBS.json FOLDER`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matrix_worker import final_parameters
from mutants import planted
from resume_mutants import MUTANTS
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_distill.config.loading import load_config
from titan_distill.data.loader import Batch
from titan_distill.parallelisms.fsdp import reshard
from titan_distill.parallelisms.mesh import World, start_world
from titan_distill.resolve import resolve
from titan_distill.train import assemble
from titan_distill.trainer import Trainer


def main(jobs_file: str, folder: str) -> None:
    torch.set_num_threads(1)
    world = start_world(300)
    run_jobs(world, json.loads(Path(jobs_file).read_text()), Path(folder))
    if world.size > 1:
        dist.barrier()
        dist.destroy_process_group()


def run_jobs(world: World, jobs: list[dict[str, Any]], folder: Path) -> None:
    for job in jobs:
        with planted(MUTANTS.get(job["mutant"])):
            run_job(world, job, folder / job["name"])


def run_job(world: World, job: dict[str, Any], output: Path) -> None:
    # A resumed run must get torch's generator from the checkpoint, not from having started alike.
    torch.manual_seed(int("--checkpoint.resume_from" in job["arguments"]))
    trainer = assemble(resolve(load_config(job["arguments"]), world.size), world)
    sample_ids: list[list[int]] = []
    trainer.loader = _noting(trainer.loader, sample_ids)  # type: ignore[assignment]
    if trainer.state.step:
        _write_state(trainer, world, output, "loaded")
    with trainer.checkpoints or nullcontext():
        while trainer.state.step < trainer.config.training.steps:
            trainer.train_step()
            if trainer.state.step == job["saves_at"]:
                _write_state(trainer, world, output, "saved")
                trainer.save()
    _write_state(trainer, world, output, "end")
    of_all_steps = [_of_all_ranks(ids, world) for ids in sample_ids]
    if world.is_main:
        Path(f"{output}.ids.json").write_text(json.dumps(of_all_steps))
    trainer.metrics.close()


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that training goes on from, named `kind/role/...`; collective."""
    tensors = {f"weights/{name}": weights for name, weights in final_parameters(trainer).items()}
    tensors["random/torch"] = torch.get_rng_state()
    for role in trainer.roles.trainable:
        optimizer, scheduler = role.optimizers["transformer"], role.schedulers["transformer"]
        reshard(role.network)  # the optimizer knows the shards, not what a forward gathered from them
        for name, parameter in role.network.named_parameters():
            for kind, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{kind}/{role.name}/{name}"] = _whole(value)
        for name, value in role.ema.shadow.items() if role.ema else ():
            tensors[f"ema/{role.name}/{name}"] = _whole(value)
        numbers = {
            "num_updates": role.num_updates,
            "schedule": scheduler.last_epoch,
            "last_lr": scheduler.get_last_lr()[0],
            "lr": optimizer.param_groups[0]["lr"],
        }
        for kind, number in numbers.items():
            tensors[f"{kind}/{role.name}"] = torch.tensor(number, dtype=torch.float64)
    return tensors


def _write_state(trainer: Trainer, world: World, output: Path, moment: str) -> None:
    state = state_of(trainer)
    if world.is_main:
        save_file(state, f"{output}.{moment}.safetensors")


def _noting(batches: Iterator[Batch], sample_ids: list[list[int]]) -> Iterator[Batch]:
    for batch in batches:
        sample_ids.append(batch.sample_ids)
        yield batch


def _of_all_ranks(ids: list[int], world: World) -> list[int]:
    """The ids of a global batch. Ranks of one data group have the same ones."""
    gathered: list[list[int]] = [ids] * world.size
    if world.size > 1:
        dist.all_gather_object(gathered, ids)
    return sorted(set(chain.from_iterable(gathered)))


def _whole(value: Tensor) -> Tensor:
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


if __name__ == "__main__":
    main(*sys.argv[1:])
