"""Fully sharded data parallel (FSDP2) for any network with a list of equal blocks.

Losses are already divided by the global sample count, so gradients must be summed over ranks, not averaged: uneven
shards stay right and one rank, many ranks and micro-batches give the same update.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def apply_fsdp(module: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shards ``blocks`` one by one and the rest of ``module`` as the root unit.

    Computes in ``compute_dtype``, reduces gradients in fp32. Inputs keep their dtype: timesteps must never be cast
    down.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    units = [*blocks, module]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    for unit in units:
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        # gloo has no pre-multiplied sum; a plain SUM is what a divide factor of 1 means anyway.
        unit.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Whether the next backward reduces gradients over ranks; micro-batches before the last one need not."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
