"""Device meshes: the groups of ranks that share parameters, tokens and batches.

One grid of ranks, `dp_replicate × dp_shard × sequence × tensor` with tensor innermost, is seen in three ways:

- *parameters*, `dp_replicate × fsdp × tensor` with fsdp = dp_shard × sequence. All parameters of a role are DTensors
  on this one mesh, so one gradient norm is right. Ranks of a sequence group hold partial gradients (each saw its own
  tokens), exactly like ranks with different samples; that is why they share FSDP's axis.
- *tokens*, `data × sequence × tensor`: who exchanges tokens with whom.
- *exchange*, `data × exchange × data group`: where a role's ranks span several data groups, who hands samples to
  whom. A *data group* is the sequence × tensor ranks of the default layout: they load the same samples.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_distill.config.degrees import Degrees
from titan_distill.parallelisms import collectives

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables by which a user sets up PyTorch's CUDA allocator."""


@dataclass(frozen=True)
class World:
    """This process among all processes. One process without torchrun is a world of size 1 and needs no process
    group."""

    rank: int
    size: int
    device: torch.device
    timeout_seconds: float | None = None
    """Limit of each collective during start-up; None leaves groups the one that they are made with."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class RoleMesh:
    """The meshes of one layout.

    `data_group` is the number of ranks that load the same samples.
    """

    def __init__(self, degrees: Degrees, data_group: int, device_type: str) -> None:
        self.degrees, self.data_group = degrees, data_group
        assert degrees.model_parallel % data_group == 0, "the configuration checks this"
        self.num_exchanged = degrees.model_parallel // data_group
        data, sequence, tensor = degrees.data_parallel, degrees.sequence, degrees.tensor
        axes = {"dp_replicate": degrees.dp_replicate, "fsdp": degrees.dp_shard * sequence, "tensor": tensor}
        used = {axis: size for axis, size in axes.items() if size > 1 or axis == "fsdp"}
        self.parameters = _mesh(device_type, **used)
        self._tokens = self._exchange = None
        if sequence > 1:
            self._tokens = _mesh(device_type, data=data, sequence=sequence, tensor=tensor)
        if self.num_exchanged > 1:
            self._exchange = _mesh(device_type, data=data, exchange=self.num_exchanged, data_group=data_group)

    @property
    def fsdp(self) -> DeviceMesh:
        """The axes over which FSDP shards, and replicates where there are replicas."""
        return self.parameters["dp_replicate", "fsdp"] if self.degrees.dp_replicate > 1 else self.parameters["fsdp"]

    @property
    def tensor(self) -> DeviceMesh | None:
        """The tensor axis of the parameters; None where it has one rank."""
        return self.parameters["tensor"] if self.degrees.tensor > 1 else None

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """Ranks that share the tokens of a sample; None for one rank."""
        return None if self._tokens is None else self._tokens.get_group("sequence")

    @property
    def exchange_group(self) -> dist.ProcessGroup | None:
        """One rank of each data group that this layout's sequence × tensor ranks span; None where it is one."""
        return None if self._exchange is None else self._exchange.get_group("exchange")

    def groups(self) -> list[dist.ProcessGroup]:
        """Every process group of these meshes."""
        meshes = [mesh for mesh in (self.parameters, self._tokens, self._exchange) if mesh is not None]
        return [group for mesh in meshes for group in mesh.get_all_groups()]


@dataclass(frozen=True)
class BatchExchange:
    """The batch exchange of a role whose ranks span several data groups: it serves all of them at once.

    Example: four data-parallel copies of one role, each with its own prompt, and a role that is tensor-parallel over
    the same four ranks. Its ranks must all see the same input, so the four inputs are gathered, the role runs once on a
    batch of four, and every rank takes its own result back. Both directions carry gradients: the gathered inputs are
    replicated (each rank computes the same with them), and results are cut from a replicated tensor.

    Attributes:
        group: one rank of each data group that the role spans, in the order of their samples.
    """

    group: dist.ProcessGroup

    def run(
        self,
        forward: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor],
        x: Tensor,
        sigma_B: Tensor,
        condition: Mapping[str, Tensor],
    ) -> Tensor:
        """`forward` of all groups' samples, of which this rank's are returned. Tensors are batch-first."""
        whole = {name: collectives.gather(value, 0, self.group) for name, value in condition.items()}
        everything = forward(collectives.gather(x, 0, self.group), collectives.gather(sigma_B, 0, self.group), whole)
        return collectives.shard(everything, 0, self.group)


class Layouts:
    """The layouts of a run: one for the data, one for each role; equal layouts share their process groups.

    Without a process group (one process) there are no meshes, and `role` answers None.
    """

    def __init__(self, world: World, default: Degrees, roles: dict[str, Degrees]) -> None:
        self.device, self.data_group = world.device, default.model_parallel
        self.data_rank, self.num_data_groups = world.rank // self.data_group, world.size // self.data_group
        self.degrees = roles
        self._meshes: dict[Degrees, RoleMesh] = {}
        if dist.is_initialized():
            device_type = "cpu" if world.device.type == "meta" else world.device.type
            # In one order on all ranks: making a group is collective.
            for degrees in dict.fromkeys(roles.values()):
                self._meshes[degrees] = RoleMesh(degrees, self.data_group, device_type)
        if world.timeout_seconds is not None:
            _limit_waiting(self.groups(), world.timeout_seconds)  # a mesh can't be told when it makes its groups

    def role(self, name: str) -> RoleMesh | None:
        """The meshes of a role; None without a process group."""
        return self._meshes.get(self.degrees[name]) if self._meshes else None

    @classmethod
    def alone(cls, device: torch.device) -> Layouts:
        """The layouts of a single process."""
        return cls(World(rank=0, size=1, device=device), Degrees(), {})

    def exchange(self, name: str) -> BatchExchange | None:
        """The batch exchange of a role; None where each data group has its own ranks for it."""
        mesh = self.role(name)
        group = None if mesh is None else mesh.exchange_group
        return None if group is None else BatchExchange(group)

    def groups(self) -> list[dist.ProcessGroup]:
        return [group for mesh in self._meshes.values() for group in mesh.groups()]


def _mesh(device_type: str, **shape: int) -> DeviceMesh:
    return init_device_mesh(device_type, tuple(shape.values()), mesh_dim_names=tuple(shape))


def num_ranks() -> int:
    """Ranks of this run, from torchrun's environment; known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def default_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none.

    Call it before the first allocation on a GPU: it also lets PyTorch's allocator grow its segments, without which
    memory is lost to fragmentation when sizes change, unless the user's environment sets the allocator up.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        # Not through the environment, which the allocator may have read by now.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def check_local_ranks() -> None:
    """Raises ValueError where torchrun starts more ranks on this machine than it has GPUs; CPUs have no limit."""
    num_local, num_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if torch.cuda.is_available() and num_local > num_gpus:
        raise ValueError(
            f"{num_local} ranks on this machine are more than the {num_gpus} GPUs that it shows; start {num_gpus} "
            "(NGPU, RANKS_PER_NODE or --nproc-per-node), or make more visible with CUDA_VISIBLE_DEVICES"
        )


def start_world(timeout_seconds: float, force_group: bool = False) -> World:
    """Reads torchrun's environment, picks the device and starts NCCL or gloo. Call once a process.

    One process gets a process group only when `force_group` asks for one: see `config.degrees.needs_group`. Raises
    ValueError for more ranks than GPUs.
    """
    check_local_ranks()
    rank, size, device = int(os.environ.get("RANK", 0)), num_ranks(), default_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 or force_group:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore() if size == 1 else None
        timeout = datetime.timedelta(seconds=timeout_seconds)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, device, timeout_seconds)


def tighten_timeout(seconds: float, layouts: Layouts) -> None:
    """Limits how long ranks wait for each other from now on; start-up, with compilation and loading, has a longer
    limit."""
    if dist.is_initialized():
        _limit_waiting([None, *layouts.groups()], seconds)


def _limit_waiting(groups: Iterable[dist.ProcessGroup | None], seconds: float) -> None:
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


def sum_over_samples(values: torch.Tensor, data_group: int) -> torch.Tensor:
    """In-place sum of a small tensor over all samples of a global batch, where every rank holds the sum over its own.

    All ranks of a data group hold the same samples, so each is counted as often as the group has ranks.
    """
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= data_group
    return values
