"""Device meshes: the groups of ranks that share parameters, tokens and batches.

One grid of ranks, `dp_replicate × dp_shard × sequence × tensor` with tensor innermost, has three meshes:

- *parameters*, `dp_replicate × fsdp × tensor` with fsdp = dp_shard × sequence. All parameters of a role are DTensors on
  this mesh, so their gradient norm is one reduction. Each rank of a sequence group computes the gradients of its own
  tokens, which are partial sums like the gradients of ranks with different samples; sequence is therefore part of
  FSDP's axis.
- *tokens*, `data × sequence × tensor`: the groups of ranks that exchange tokens.
- *exchange*, `data × exchange × data group`: the groups of ranks that exchange samples, if a role's ranks span several
  data groups. A *data group* is a set of ranks that load the same samples: the sequence × tensor ranks of the default
  layout.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_distill.config.degrees import Degrees
from titan_distill.parallelisms import collectives

T = TypeVar("T")

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables with which a user can configure PyTorch's CUDA allocator."""


@dataclass(frozen=True)
class World:
    """Rank, number of ranks and device of this process. Without torchrun the world has size 1 and needs no process
    group."""

    rank: int
    size: int
    device: torch.device
    timeout_seconds: float | None = None
    """Timeout of each collective during start-up. None leaves process groups with torch's default."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class RoleMesh:
    """Meshes of one layout of ranks. `data_group` is the number of ranks that load the same samples."""

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
        """Mesh over which FSDP shards, and also replicates if there are replicas."""
        return self.parameters["dp_replicate", "fsdp"] if self.degrees.dp_replicate > 1 else self.parameters["fsdp"]

    @property
    def tensor(self) -> DeviceMesh | None:
        """Tensor axis of the parameters; None if it has one rank."""
        return self.parameters["tensor"] if self.degrees.tensor > 1 else None

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """Process group of the ranks that share the tokens of a sample; None for one rank."""
        return None if self._tokens is None else self._tokens.get_group("sequence")

    @property
    def exchange_group(self) -> dist.ProcessGroup | None:
        """Process group of one rank per data group that the role's sequence × tensor ranks span; None if they span only
        one."""
        return None if self._exchange is None else self._exchange.get_group("exchange")

    def groups(self) -> list[dist.ProcessGroup]:
        """All process groups of these meshes."""
        meshes = [mesh for mesh in (self.parameters, self._tokens, self._exchange) if mesh is not None]
        return [group for mesh in meshes for group in mesh.get_all_groups()]


@dataclass(frozen=True)
class BatchExchange:
    """Exchange of batches for a role whose ranks span several data groups: the role processes the samples of all of
    them, together or in turn.

    Example: four data-parallel copies of one role, each with its own prompt, and a role that is tensor-parallel over
    the same four ranks. Its ranks must all see the same input, so the four inputs are gathered, the role runs once on a
    batch of four, and every rank takes its own result back. Both directions carry gradients: the gathered inputs are
    replicated (each rank computes the same with them), and results are cut from a replicated tensor.

    In turn, the role runs four times on a batch of one, the input of one rank each, and has the temporary tensors of
    one sample at a time. All ranks take part in every turn, so they run the same collectives in the same order.

    Attributes:
        group: one rank of each data group that the role spans, in the order of their samples.
        in_turn: whether the role runs once for each data group.
    """

    group: dist.ProcessGroup
    in_turn: bool = False

    @property
    def num_turns(self) -> int:
        """Number of forwards for the samples of all data groups."""
        return self.group.size() if self.in_turn else 1

    def run(
        self,
        forwards: Sequence[Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]],
        x: Tensor,
        sigma_B: Tensor,
        condition: Mapping[str, Tensor],
    ) -> Tensor:
        """Runs the role on the samples of all data groups, with one of `forwards` in each turn, and returns the results
        of this rank's samples. Tensors are batch-first."""
        results = []
        for turn, forward in enumerate(forwards):
            collect = self._collect(turn)
            results.append(forward(collect(x), collect(sigma_B), {name: collect(t) for name, t in condition.items()}))
        return collectives.shard(torch.cat(results), 0, self.group)

    def _collect(self, turn: int) -> Callable[[Tensor], Tensor]:
        if self.in_turn:
            return lambda x: collectives.receive(x, turn, self.group)
        return lambda x: collectives.gather(x, 0, self.group)


class Layouts:
    """Meshes of a run: one layout for the data and one for each role. Equal layouts share their process groups.

    Without a process group (one process) there are no meshes, and `role` returns None.

    `in_turn` names the roles that exchange batches with one data group at a time.
    """

    def __init__(
        self, world: World, default: Degrees, roles: dict[str, Degrees], in_turn: Collection[str] = ()
    ) -> None:
        self.device, self.data_group = world.device, default.model_parallel
        self.data_rank, self.num_data_groups = world.rank // self.data_group, world.size // self.data_group
        self.degrees, self.in_turn = roles, in_turn
        self._meshes: dict[Degrees, RoleMesh] = {}
        if dist.is_initialized():
            device_type = "cpu" if world.device.type == "meta" else world.device.type
            # In one order on all ranks: making a group is collective.
            for degrees in dict.fromkeys(roles.values()):
                self._meshes[degrees] = RoleMesh(degrees, self.data_group, device_type)
        if world.timeout_seconds is not None:
            _limit_waiting(self.groups(), world.timeout_seconds)  # a mesh can't be told when it makes its groups

    def role(self, name: str) -> RoleMesh | None:
        """Returns the meshes of a role; None without a process group."""
        return self._meshes.get(self.degrees[name]) if self._meshes else None

    @classmethod
    def alone(cls, device: torch.device) -> Layouts:
        """Returns the layouts of a single process."""
        return cls(World(rank=0, size=1, device=device), Degrees(), {})

    def exchange(self, name: str) -> BatchExchange | None:
        """Returns the batch exchange of a role; None if the role's ranks do not span several data groups."""
        mesh = self.role(name)
        group = None if mesh is None else mesh.exchange_group
        return None if group is None else BatchExchange(group, name in self.in_turn)

    def groups(self) -> list[dist.ProcessGroup]:
        return [group for mesh in self._meshes.values() for group in mesh.groups()]


class Peers:
    """The ranks of one data group, for work on a sample that one of them does for all.

    They talk over a gloo group of their own, which does not mix with the collectives of training. The constructor is
    collective over all ranks if `size` is above 1.
    """

    def __init__(self, size: int, timeout_seconds: float) -> None:
        self.size, self.group = size, None
        self.rank = 0
        if size > 1:
            timeout = datetime.timedelta(seconds=timeout_seconds)
            self.group, _ = dist.new_subgroups(size, timeout=timeout, backend="gloo")
            self.rank = dist.get_rank(self.group)

    def owns(self, index: int) -> bool:
        """Returns whether this rank does the work on sample `index` of a batch."""
        return index % self.size == self.rank

    def share(self, index: int, value: T | None) -> T:
        """Returns what the owner of sample `index` gives as `value`. Collective over the peers, in one order on all of
        them. Tensors must be on the CPU."""
        values = [value]
        if self.group is not None:
            dist.broadcast_object_list(values, group=self.group, group_src=index % self.size)
        return cast(T, values[0])


def _mesh(device_type: str, **shape: int) -> DeviceMesh:
    return init_device_mesh(device_type, tuple(shape.values()), mesh_dim_names=tuple(shape))


def num_ranks() -> int:
    """Returns the number of ranks from torchrun's environment. It works before a process group exists. Raises
    ValueError for a variable that is no such number."""
    return _from_environment("WORLD_SIZE", default=1, least=1)


def is_main_process() -> bool:
    """Whether this is rank 0 by torchrun's environment, before any process group exists. Raises as `num_ranks`."""
    return _rank() == 0


def _rank() -> int:
    rank, size = _from_environment("RANK", default=0, least=0), num_ranks()
    if rank >= size:
        raise ValueError(
            f"the environment has RANK = {rank}, but WORLD_SIZE = {size}, whose largest rank is {size - 1}; {_UNSET}"
        )
    return rank


def _from_environment(name: str, default: int, least: int) -> int:
    value = os.environ.get(name, str(default))
    if not (value.isascii() and value.isdecimal()) or int(value) < least:
        raise ValueError(
            f"the environment has {name} = {value!r}, which must be a whole number of at least {least}; {_UNSET}"
        )
    return int(value)


_UNSET = "unset it, or start the ranks with run_train.sh or torchrun, which set it"


def default_device() -> torch.device:
    """Returns this rank's GPU, or the CPU if there is none.

    Call it before the first allocation on a GPU. It also sets PyTorch's allocator to expandable segments, which reduces
    fragmentation when tensor sizes change, unless the user's environment configures the allocator.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        # Not through the environment, which the allocator may have read by now.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    return torch.device("cuda", _from_environment("LOCAL_RANK", default=0, least=0))


def named_device(name: str | None) -> torch.device:
    """Returns the device that an option --device names; None names the default. Raises ValueError if there is none."""
    if name is None:
        return default_device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the second is "not compiled with CUDA"
        raise ValueError(
            f"--device {name!r} is none of this machine's, which has cpu and {torch.cuda.device_count()} GPUs (cuda:0 "
            "is the first); leave it out for the default"
        ) from error


def check_local_ranks() -> None:
    """Raises ValueError if torchrun starts more ranks on this machine than it has GPUs, or if its environment is no
    torchrun's. Without GPUs there is no limit."""
    _from_environment("LOCAL_RANK", default=0, least=0)
    num_local, num_gpus = _from_environment("LOCAL_WORLD_SIZE", default=1, least=1), torch.cuda.device_count()
    if torch.cuda.is_available() and num_local > num_gpus:
        raise ValueError(
            f"{num_local} ranks on this machine are more than the {num_gpus} GPUs that it shows; start {num_gpus} "
            "(NGPU, RANKS_PER_NODE or --nproc-per-node), or make more visible with CUDA_VISIBLE_DEVICES"
        )


def start_world(timeout_seconds: float, force_group: bool = False) -> World:
    """Reads torchrun's environment, selects the device and starts NCCL or gloo. Call it once per process.

    A single process gets a process group only if `force_group` is true, see `config.degrees.needs_group`. Raises
    ValueError for more ranks than GPUs.
    """
    check_local_ranks()
    rank, size, device = _rank(), num_ranks(), default_device()
    check_rendezvous()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 or force_group:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore() if size == 1 else None
        timeout = datetime.timedelta(seconds=timeout_seconds)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, device, timeout_seconds)


def check_rendezvous() -> None:
    """Raises ValueError if the environment announces several ranks but does not say where they meet."""
    if num_ranks() == 1:
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(
                f"the environment has WORLD_SIZE = {num_ranks()}, but no {name}; unset WORLD_SIZE, or start the ranks "
                "with run_train.sh or torchrun, which set them"
            )
    _from_environment("MASTER_PORT", default=0, least=1)


def tighten_timeout(seconds: float, layouts: Layouts, *groups: dist.ProcessGroup | None) -> None:
    """Sets the timeout of collectives for the rest of the run. During start-up it is longer, because compiling and
    loading take time. `groups` are further groups beside the default one and those of the layouts."""
    if dist.is_initialized():
        _limit_waiting([None, *layouts.groups(), *groups], seconds)


def _limit_waiting(groups: Iterable[dist.ProcessGroup | None], seconds: float) -> None:
    for group in groups:
        # The only way to change it; TorchTitan does the same.
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def sum_over_samples(values: torch.Tensor, data_group: int) -> torch.Tensor:
    """Sums a small tensor in place over all samples of a global batch; before the call every rank holds the sum over
    its own samples.

    All ranks of a data group hold the same samples, so the sum over ranks is divided by `data_group`.
    """
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= data_group
    return values
