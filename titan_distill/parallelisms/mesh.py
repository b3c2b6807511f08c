"""Device meshes: which ranks do what together.

``dp_replicate × dp_shard`` ranks each hold a shard of the parameters and see their own samples (HSDP; plain FSDP when
``dp_replicate`` is 1). One mesh serves all parameters of a role, so that one gradient-norm reduction is right.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class World:
    """This process among all processes. One process without torchrun is a world of size 1 and needs no process
    group."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def num_ranks() -> int:
    """Ranks of this run, from torchrun's environment; known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start_world(timeout_seconds: float, force_group: bool = False) -> World:
    """Reads torchrun's environment, picks the device and starts NCCL or gloo. Call once a process.

    One process gets a process group only when ``force_group`` asks for one (FSDP's mixed precision needs it).
    """
    rank, size = int(os.environ.get("RANK", 0)), num_ranks()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if size > 1 or force_group:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore() if size == 1 else None
        timeout = datetime.timedelta(seconds=timeout_seconds)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, device)


def data_parallel_mesh(world: World, dp_replicate: int, dp_shard: int) -> DeviceMesh | None:
    """A mesh with the axes ``dp_replicate`` (when > 1) and ``dp_shard``; None without a process group."""
    assert dp_replicate * dp_shard == world.size, "the configuration checks degrees against the world size"
    if not dist.is_initialized():
        return None
    if dp_replicate == 1:
        return init_device_mesh(world.device.type, (dp_shard,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(world.device.type, (dp_replicate, dp_shard), mesh_dim_names=("dp_replicate", "dp_shard"))


def tighten_timeout(seconds: float, mesh: DeviceMesh | None) -> None:
    """Limits how long ranks wait for each other from now on; start-up, with compilation and loading, is given more."""
    groups = [] if mesh is None else [None, *mesh.get_all_groups()]
    for group in groups:
        # The only way to change it; TorchTitan does the same.
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


@contextmanager
def main_rank_first() -> Iterator[None]:
    """Rank 0 runs the block before all others do: it fills a cache on disk that the others then read."""
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """In-place sum of a small tensor over all ranks; the tensor itself in a world of one."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
