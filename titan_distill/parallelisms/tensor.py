"""Tensor parallelism: the ranks of an axis share each weight matrix.

A *region* is a stretch of a network in which every rank does its own part of the arithmetic: it begins with column-wise
linear layers (each rank some of the outputs, so some heads or some hidden features) and ends with a row-wise one (each
rank some of the inputs), whose partial results are summed. Between regions activations are replicated, or, with
`TokenRegion`, each rank holds a run of the tokens, so that norms and residuals are neither computed nor stored twice.

    region         enter                    leave
    Region         nothing  / all-reduce    all-reduce     / nothing        (forward / backward)
    TokenRegion    all-gather / reduce-sc.  reduce-scatter / all-gather

Both move the same bytes. Weights are DTensors on the tensor axis, so FSDP and checkpoints know what they hold; the
computation is written in local tensors and named collectives, which a profile shows by the same names.

A weight that is replicated and used inside a region must *enter* it too, or its gradient is only this rank's part.

Layers get their new `forward` as a method and what it needs as an attribute: code and objects that all blocks share
are what lets the compiler make one graph for all of them.
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
    """A parameter's values on this rank: its tensor-parallel shard, or the parameter itself."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@dataclass(frozen=True)
class Region:
    """A stretch of the network in which ranks compute on parts of replicated activations."""

    group: dist.ProcessGroup

    def enter(self, x: Tensor) -> Tensor:
        """A replicated activation, to be used differently by each rank."""
        return collectives.enter_parts(x, self.group)

    def hook(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`enter` as a forward pre-hook of a module's first argument."""
        return self.enter(args[0]), *args[1:]

    def leave(self, x: Tensor) -> Tensor:
        """The sum of the ranks' partial results."""
        return collectives.sum_parts(x, self.group)


@dataclass(frozen=True)
class TokenRegion(Region):
    """The same between stretches where each rank holds its own tokens [B, L / ranks, ...]."""

    def enter(self, x: Tensor) -> Tensor:
        return collectives.gather_for_parts(x, TOKEN_DIM, self.group)

    def leave(self, x: Tensor) -> Tensor:
        return collectives.reduce_scatter(x, TOKEN_DIM, self.group)

    def share(self, x: Tensor) -> Tensor:
        """A replicated tensor, to be applied by each rank to its own tokens."""
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
    """Lets a linear layer compute with its own shard: some of the outputs (column-wise), or all where it is
    replicated."""
    _replace_forward(linear, _linear)


def make_row_wise(linear: nn.Module, region: Region) -> None:
    """Lets a linear layer compute with its inputs' shard, sum over ranks and then add its bias."""
    _replace_forward(linear, _row_wise, region=region)


def gather_outputs(linear: nn.Module, group: dist.ProcessGroup) -> None:
    """Lets a column-wise layer return all outputs, for small results that everything else needs whole."""
    _replace_forward(linear, _gathered, group=group)


def share_norm(norm: nn.Module, group: dist.ProcessGroup) -> None:
    """Lets an RMS norm over features that are spread over ranks take its mean square over all of them."""
    _replace_forward(norm, _shared_rms_norm, group=group)


def _replace_forward(layer: nn.Module, forward: Callable[..., Tensor], **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(layer, name, value)
    layer.forward = MethodType(forward, layer)


def enter_region(module: nn.Module, region: Region) -> None:
    """The module's first argument enters `region`; its last layer, a row-wise one, leaves it."""
    module.register_forward_pre_hook(region.hook)


def _compute(linear: nn.Linear) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The product of a layer; layers with a precision of their own bring one."""
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
    """Raises ValueError where regions' communication can't overlap with products: without CUDA's symmetric memory."""
    if device.type != "cuda":
        raise ValueError(
            f"parallelism.async_tensor = true needs CUDA and symmetric memory, but this run is on {device.type}; "
            "set it to false"
        )


def enable_async_communication(mesh: DeviceMesh) -> None:
    """Lets the compiler split regions' collectives and overlap them with the matrix products next to them.

    Process-wide, as PyTorch has it.
    """
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    with warnings.catch_warnings():
        # torch 2.11 to 2.13 say that nobody need call it any more, but their compiler still asks whether it was called
        # (is_symm_mem_enabled_for_group), and else leaves the collectives as they are.
        warnings.filterwarnings("ignore", message="`enable_symm_mem_for_group` is deprecated", category=FutureWarning)
        enable_symm_mem_for_group(mesh.get_group().group_name)
