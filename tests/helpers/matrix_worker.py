"""Training of the layout matrix's rows on the ranks that torchrun started, one after the other.

One process group serves all rows: to start ranks costs more than to train them. Usage:
`torchrun ... matrix_worker.py ROWS.json FOLDER`, where a row is {"name", "arguments", "mutant"}. A row leaves its final
parameters in FOLDER/<name>.safetensors and what it was seen to do (`Seen`) in FOLDER/<name>.json.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch.distributed as dist
from layout_mutants import MUTANTS
from mutants import planted
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook

from titan_distill.config.loading import load_config
from titan_distill.models.wan.layers import SelfAttention
from titan_distill.parallelisms import collectives
from titan_distill.parallelisms.mesh import World, start_world
from titan_distill.resolve import resolve
from titan_distill.train import assemble
from titan_distill.trainer import Trainer

ALL_REDUCES = list(inspect.signature(_fsdp_param_group.foreach_reduce).parameters).index("all_reduce_grads")


def main(rows_file: str, folder: str) -> None:
    torch.set_num_threads(1)
    world = start_world(120)
    for row in json.loads(Path(rows_file).read_text()):
        with planted(MUTANTS.get(row["mutant"])):
            train_row(world, row["arguments"], Path(folder) / row["name"])
    if world.size > 1:
        dist.barrier()
        dist.destroy_process_group()


@dataclass
class Seen:
    """Counts of the main rank's actions in a row, which its losses would not tell.

    Attributes:
        forwards: self-attentions run with gradients, recomputed ones included; not counted under torch.compile.
        graphs: compiled by torch.compile.
        gathers: FSDP's all-gathers of parameters.
        offloaded: parameters that FSDP keeps in host memory.
        early_reductions: FSDP's reductions of gradients before the last micro-batch, without a sum over replicas.
        broadcasts: tensors that roles received from one data group at a time.
    """

    forwards: int = 0
    graphs: int = 0
    gathers: int = 0
    offloaded: int = 0
    early_reductions: int = 0
    broadcasts: int = 0


@contextmanager
def watched(is_compiled: bool) -> Iterator[Seen]:
    """Fills in what happens within the block."""
    seen, gather, statistics = Seen(), _fsdp_param_group.foreach_all_gather, torch._dynamo.utils.counters["stats"]
    reduce, (broadcast, backward) = _fsdp_param_group.foreach_reduce, collectives.PAIRS["receive"]

    def count_forward(module: nn.Module, _: Any) -> None:
        seen.forwards += isinstance(module, SelfAttention) and torch.is_grad_enabled()

    def count_gather(*arguments: Any) -> Any:
        seen.gathers += 1
        return gather(*arguments)

    def count_reduction(*arguments: Any) -> Any:
        seen.early_reductions += not arguments[ALL_REDUCES]
        return reduce(*arguments)

    def count_broadcast(*arguments: Any) -> Any:
        seen.broadcasts += 1
        return broadcast(*arguments)

    graphs = statistics["unique_graphs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fsdp_param_group, "foreach_all_gather", count_gather)
        patch.setattr(_fsdp_param_group, "foreach_reduce", count_reduction)
        patch.setitem(collectives.PAIRS, "receive", (count_broadcast, backward))
        hook = None if is_compiled else register_module_forward_pre_hook(count_forward)
        yield seen
        if hook is not None:
            hook.remove()
    seen.graphs = statistics["unique_graphs"] - graphs


def num_offloaded(module: nn.Module) -> int:
    groups = [part._get_fsdp_state()._fsdp_param_group for part in module.modules() if isinstance(part, FSDPModule)]
    return sum(parameter.offload_to_cpu for group in groups if group for parameter in group.fsdp_params)


def train_row(world: World, arguments: list[str], output: Path) -> None:
    trainer = assemble(resolve(load_config(arguments), world.size), world)
    with watched(trainer.config.compile.enabled) as seen:
        while trainer.state.step < trainer.config.training.steps:
            trainer.train_step()
    seen.offloaded = sum(num_offloaded(role.network) for role in trainer.roles.trainable)
    trainer.metrics.close()
    tensors = final_parameters(trainer)
    if world.is_main:
        save_file(tensors, f"{output}.safetensors")
        Path(f"{output}.json").write_text(json.dumps(asdict(seen)))


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
