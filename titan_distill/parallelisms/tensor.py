"""Tensor parallelism: the ranks of an axis share each weight matrix.

A *region* is a part of a network in which every rank computes a part of the result. It begins with column-wise linear
layers, in which each rank computes some of the outputs (some heads or some hidden features). It ends with a row-wise
linear layer, in which each rank uses some of the inputs, and the partial results are summed. Between regions
activations are replicated. With `TokenRegion` each rank instead holds a run of the tokens there, so that norms and
residuals are not computed and stored on every rank.

    region         enter                    leave
    Region         nothing  / all-reduce    all-reduce     / nothing        (forward / backward)
    TokenRegion    all-gather / reduce-sc.  reduce-scatter / all-gather

Both move the same number of bytes. Weights are DTensors on the tensor axis, so FSDP and checkpoints know their shards.
The computation uses local tensors and the functions of `collectives`, whose names appear in a profile.

A replicated weight that is used inside a region must *enter* the region as well; otherwise its gradient is only this
rank's part.

A layer's new `forward` is a method, and the objects that it needs are attributes. All blocks thus share code and
objects, which lets the compiler make one graph for all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from titan_distill.parallelisms import collectives

TOKEN_DIM = 1


def local(parameter: Tensor) -> Tensor:
    """Returns a parameter's values on this rank: its tensor-parallel shard, or the parameter itself."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@dataclass(frozen=True)
class Region:
    """Region between replicated activations; see the module's docstring."""

    group: dist.ProcessGroup

    def enter(self, x: Tensor) -> Tensor:
        """Takes a replicated activation into the region, where each rank uses it differently."""
        return collectives.enter_parts(x, self.group)

    def hook(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Forward pre-hook that applies `enter` to a module's first argument."""
        return self.enter(args[0]), *args[1:]

    def leave(self, x: Tensor) -> Tensor:
        """Returns the sum of the ranks' partial results."""
        return collectives.sum_parts(x, self.group)


@dataclass(frozen=True)
class TokenRegion(Region):
    """Region between activations of which each rank holds its own tokens, [B, L / ranks, ...]."""

    def enter(self, x: Tensor) -> Tensor:
        return collectives.gather_for_parts(x, TOKEN_DIM, self.group)

    def leave(self, x: Tensor) -> Tensor:
        return collectives.reduce_scatter(x, TOKEN_DIM, self.group)

    def share(self, x: Tensor) -> Tensor:
        """Takes a replicated tensor that each rank applies to its own tokens."""
        return collectives.enter_parts(x, self.group)


def distribute_parameters(module: nn.Module, mesh: DeviceMesh, shards: Mapping[str, int]) -> None:
    """Makes every parameter a DTensor on the tensor axis: sharded along `shards[name]`, else replicated.

    Works on the meta device. Raises ValueError for a size that the ranks do not divide.
    """
    for name, parameter in list(module.named_parameters()):
        placement: Placement = Replicate()
        if name in shards:
            dim = shards[name]
            if parameter.shape[dim] % mesh.size():
                raise ValueError(
                    f"{name} has {parameter.shape[dim]} entries along dim {dim}, which {mesh.size()} tensor-parallel "
                    "ranks do not divide; choose a degree that divides heads and widths"
                )
            placement = Shard(dim)
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        # Every rank has the whole tensor (or, on meta, none has one), so nobody sends anything.
        distributed = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
        owner.register_parameter(leaf, nn.Parameter(distributed, requires_grad=parameter.requires_grad))


def use_local_parameters(linear: nn.Module) -> None:
    """Makes a linear layer compute with its local weight: some of the outputs if it is sharded column-wise, all if it
    is replicated."""
    _replace_forward(linear, _linear)


def make_row_wise(linear: nn.Module, region: Region) -> None:
    """Makes a linear layer compute with its shard of the inputs, sum the results over ranks, and then add its bias."""
    _replace_forward(linear, _row_wise, region=region)


def gather_outputs(linear: nn.Module, group: dist.ProcessGroup) -> None:
    """Makes a column-wise layer gather and return all outputs, for small results that all ranks need."""
    _replace_forward(linear, _gathered, group=group)


def share_norm(norm: nn.Module, group: dist.ProcessGroup) -> None:
    """Makes an RMS norm compute its mean square over the features of all ranks."""
    _replace_forward(norm, _shared_rms_norm, group=group)


def _replace_forward(layer: nn.Module, forward: Callable[..., Tensor], **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(layer, name, value)
    layer.forward = MethodType(forward, layer)


def enter_region(module: nn.Module, region: Region) -> None:
    """Makes the module's first argument enter `region`. The module's last layer, a row-wise one, leaves it."""
    module.register_forward_pre_hook(region.hook)


def _compute(linear: nn.Linear) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Returns the function that computes a layer's product. Layers with their own precision define one."""
    return getattr(linear, "compute", F.linear)


def _linear(linear: Any, x: Tensor) -> Tensor:
    bias = None if linear.bias is None else local(linear.bias)
    return _compute(linear)(x, local(linear.weight), bias)


def _row_wise(linear: Any, x: Tensor) -> Tensor:
    total = linear.region.leave(_compute(linear)(x, local(linear.weight), None))
    # Every linear layer of a region has a bias, and it is added once, to the sum.
    bias = local(linear.bias)
    # Summed over tokens that are not all here, its gradient is a part like any other.
    if isinstance(linear.region, TokenRegion):
        bias = collectives.enter_parts(bias, linear.region.group)
    return total + bias.to(total.dtype)


def _gathered(linear: Any, x: Tensor) -> Tensor:
    return collectives.gather(_linear(linear, collectives.enter_parts(x, linear.group)), -1, linear.group)


def _shared_rms_norm(norm: Any, x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    squares = collectives.sum_statistics(wide.square().sum(-1, keepdim=True), norm.group)
    inverse = torch.rsqrt(squares / (x.shape[-1] * norm.group.size()) + norm.eps)
    return (wide * inverse).to(x.dtype) * local(norm.weight)


def check_async_communication(device: torch.device) -> None:
    """Raises ValueError without CUDA's symmetric memory, which communication that overlaps with matrix products
    needs."""
    if device.type != "cuda":
        raise ValueError(
            f"parallelism.async_tensor = true needs CUDA and symmetric memory, but this run is on {device.type}; "
            "set it to false"
        )


def enable_async_communication(mesh: DeviceMesh) -> None:
    """Lets the compiler split the collectives of regions and overlap them with neighbouring matrix products.

    The setting holds for the whole process.
    """
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    with warnings.catch_warnings():
        # torch 2.11 to 2.13 say that nobody need call it any more, but their compiler still asks whether it was called
        # (is_symm_mem_enabled_for_group), and else leaves the collectives as they are.
        warnings.filterwarnings("ignore", message="`enable_symm_mem_for_group` is deprecated", category=FutureWarning)
        enable_symm_mem_for_group(mesh.get_group().group_name)
