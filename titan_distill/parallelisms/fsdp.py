"""Fully sharded data parallel (FSDP2, HSDP) for any network with a list of equal blocks.

Losses are already divided by the global batch size, so gradients are summed over ranks, not averaged. One rank, many
ranks and any number of micro-batches then give the same update. Sequence ranks belong to the sharded axis, because the
gradients that they compute are also parts of one sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard


@dataclass(frozen=True)
class FsdpOptions:
    """The sharding of one role.

    Attributes:
        compute_dtype: dtype of forward and backward; gradients are reduced in fp32.
        reshard_after_forward: free a block's gathered weights after its forward and gather them again for its backward.
        cpu_offload: keep shards, gradients and optimizer state in host memory.
    """

    compute_dtype: torch.dtype
    reshard_after_forward: bool = True
    cpu_offload: bool = False


def apply_fsdp(module: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, options: FsdpOptions) -> None:
    """Shards each of `blocks` as one unit and the rest of `module` as the root unit. Inputs are not cast, because
    timesteps must not lose precision."""
    policy = MixedPrecisionPolicy(
        param_dtype=options.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if options.cpu_offload else OffloadPolicy()
    units = [*blocks, module]
    for unit in units:
        # The backward begins with the last block: freeing its weights would only mean to gather them at once again.
        reshard = options.reshard_after_forward and unit not in (*blocks[-1:], module)
        fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
    for unit in units:
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        # gloo has no pre-multiplied sum; a plain SUM is what a divide factor of 1 means anyway.
        unit.set_force_sum_reduction_for_comms(True)
    # The host may run ahead of the device, but not past an all-gather that it has not issued: name the next one.
    for unit, following in pairwise(blocks):
        assert isinstance(unit, FSDPModule) and isinstance(following, FSDPModule)
        unit.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([unit])


def reshard(module: nn.Module) -> None:
    """Frees all gathered weights, so that `module.parameters()` are the shards again.

    After a forward without a backward, for instance in a rollout, FSDP leaves the root and the last block gathered.
    `module.parameters()` would then return these temporary tensors.
    """
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def set_gradient_sync(module: nn.Module, *, is_last: bool, reduce_every: bool) -> None:
    """Sets whether the next backward sums gradients over ranks, given whether it is that of the last micro-batch.

    With `reduce_every` each backward reduce-scatters, and gradients accumulate in shards; otherwise only the last one
    does, and gradients accumulate whole. Replicas of the weights sum their shards in the last backward in both cases,
    so the last backward must reach every parameter that an earlier one has reached.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last or reduce_every)
        module.set_requires_all_reduce(is_last)
