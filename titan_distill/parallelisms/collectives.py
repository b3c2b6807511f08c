"""Differentiable collectives, each with a forward and a backward.

The correct backward of a collective depends on the use of its result. A wrong backward multiplies gradients by the
number of ranks or loses parts of them. There are two cases. A tensor is *replicated* if all ranks of the group hold it
and compute the same from it; its gradient is then complete and equal on all ranks. A tensor is used *differently* if
each rank computes its own part from it (its heads, its queries); the gradient on each rank is then a part, and the
parts must be summed.

    forward                          backward                     where
    shard: take own slice            all-gather                   a replicated tensor is cut up
    gather: all-gather               take own slice               ... and becomes replicated again
    gather_for_parts: all-gather     reduce-scatter               the result is used differently
    reduce_scatter                   all-gather                   parts are summed and cut up
    enter_parts: nothing             all-reduce                   a replicated tensor is used differently
    sum_parts: all-reduce            nothing                      ... and parts are summed to a replicated one
    sum_statistics: all-reduce       all-reduce                   a sum of parts that every rank uses differently
    all_to_all                       all_to_all                   slices change places
    receive: broadcast               the source's own, or zero    one rank's tensor becomes replicated

All of them are linear, so forward-mode differentiation has only one case: the tangent goes through the same collective
as the tensor, in a second message.

Every function takes and returns plain tensors. Slices must have equal sizes; callers pad.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

Group = dist.ProcessGroup


def _own_slice(x: Tensor, group: Group, dim: int) -> Tensor:
    return x.chunk(group.size(), dim=dim)[group.rank()].contiguous()


def _all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    parts = x.new_empty((group.size(), *x.shape))
    dist.all_gather_into_tensor(parts.flatten(0, 1), x.contiguous(), group=group)
    return torch.cat(parts.unbind(0), dim=dim)


def _reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    parts = torch.stack(x.chunk(group.size(), dim=dim))
    own = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(own, parts.flatten(0, 1), group=group)
    return own


def _all_reduce(x: Tensor, group: Group, dim: int) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _exchange_slices(x: Tensor, group: Group, dim: int) -> Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received


def _nothing(x: Tensor, group: Group, dim: int) -> Tensor:
    return x.view_as(x)


def _broadcast(x: Tensor, group: Group, source: int) -> Tensor:
    received = x.clone(memory_format=torch.contiguous_format)
    dist.broadcast(received, group=group, group_src=source)
    return received


def _of_source(x: Tensor, group: Group, source: int) -> Tensor:
    return x if group.rank() == source else torch.zeros_like(x)


PAIRS: dict[str, tuple[Callable[[Tensor, Group, int], Tensor], Callable[[Tensor, Group, int], Tensor]]] = {
    "shard": (_own_slice, _all_gather),
    "gather": (_all_gather, _own_slice),
    "gather_for_parts": (_all_gather, _reduce_scatter),
    "reduce_scatter": (_reduce_scatter, _all_gather),
    "enter_parts": (_nothing, _all_reduce),
    "sum_parts": (_all_reduce, _nothing),
    "sum_statistics": (_all_reduce, _all_reduce),
    "all_to_all": (_exchange_slices, _exchange_slices),
    "receive": (_broadcast, _of_source),
}
"""The forward and the backward of each collective below. The integer is a dim; for `receive` it is a rank."""


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, group: Group, dim: int) -> Tensor:
        ctx.name, ctx.group, ctx.dim = name, group, dim
        return PAIRS[name][0](x, group, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return PAIRS[ctx.name][1](gradients[0], ctx.group, ctx.dim), None, None, None


def _apply(name: str, x: Tensor, group: Group, dim: int = 0) -> Tensor:
    """Runs a collective of `PAIRS` on `x`, and on the tangent of `x` if it has one.

    The autograd function itself does not define a forward-mode derivative, because torch.compile refuses functions that
    do.
    """
    if not torch.compiler.is_compiling():
        value, tangent = forward_ad.unpack_dual(x)
        if tangent is not None:
            parts = (_Collective.apply(part, name, group, dim) for part in (value, tangent))
            return forward_ad.make_dual(*parts)
    return _Collective.apply(x, name, group, dim)


def shard(x: Tensor, dim: int, group: Group) -> Tensor:
    """Returns this rank's slice of a replicated tensor."""
    return _apply("shard", x, group, dim)


def gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """Returns the slices of all ranks as one replicated tensor."""
    return _apply("gather", x, group, dim)


def gather_for_parts(x: Tensor, dim: int, group: Group) -> Tensor:
    """Returns the slices of all ranks, for ranks that use the result differently."""
    return _apply("gather_for_parts", x, group, dim)


def reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """Returns this rank's slice of the sum of all ranks' tensors."""
    return _apply("reduce_scatter", x, group, dim)


def enter_parts(x: Tensor, group: Group) -> Tensor:
    """Returns a replicated tensor unchanged, for ranks that use it differently."""
    return _apply("enter_parts", x, group)


def sum_parts(x: Tensor, group: Group) -> Tensor:
    """Returns the sum of all ranks' tensors, replicated."""
    return _apply("sum_parts", x, group)


def sum_statistics(x: Tensor, group: Group) -> Tensor:
    """Returns the sum of all ranks' tensors, for ranks that use it differently."""
    return _apply("sum_statistics", x, group)


def all_to_all(x: Tensor, group: Group) -> Tensor:
    """Sends slice i of dim 0 to rank i. Slice i of the result comes from rank i."""
    return _apply("all_to_all", x, group)


def receive(x: Tensor, source: int, group: Group) -> Tensor:
    """Returns the tensor of rank `source` of the group as a replicated one. All ranks give tensors of its shape."""
    return _apply("receive", x, group, source)
