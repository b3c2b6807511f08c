"""Trains every row of the layout matrix that is meant for as many ranks as torchrun started, one after the other.

One process group serves all rows: to start ranks costs more than to train them. Usage:
`torchrun ... matrix_worker.py ROWS.json FOLDER`, where a row is {"name", "arguments", "mutant"}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from mutants import MUTANTS
from planting import planted
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_distill.config.loading import load_config
from titan_distill.parallelisms.mesh import World, start_world
from titan_distill.resolve import resolve
from titan_distill.train import assemble
from titan_distill.trainer import Trainer


def main(rows_file: str, folder: str) -> None:
    torch.set_num_threads(1)
    world = start_world(120)
    for row in json.loads(Path(rows_file).read_text()):
        with planted(MUTANTS.get(row["mutant"])):
            train_row(world, row["arguments"], Path(folder) / f"{row['name']}.safetensors")
    if world.size > 1:
        dist.barrier()
        dist.destroy_process_group()


def train_row(world: World, arguments: list[str], output: Path) -> None:
    trainer = assemble(resolve(load_config(arguments), world.size), world)
    while trainer.state.step < trainer.config.training.steps:
        trainer.train_step()
    trainer.metrics.close()
    tensors = final_parameters(trainer)
    if world.is_main:
        save_file(tensors, output)


def final_parameters(trainer: Trainer) -> dict[str, Tensor]:
    tensors = {}
    for role in trainer.roles.trainable:
        for name, parameter in role.network.named_parameters():
            if not parameter.requires_grad:  # what is left as it was would hide how adapters differ
                continue
            value = parameter.detach()
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            tensors[f"{role.name}/{name.removeprefix('_orig_mod.')}"] = whole.clone()
    return tensors


if __name__ == "__main__":
    main(*sys.argv[1:])
