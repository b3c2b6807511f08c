"""Collectives that autograd sees through, in pairs.

What the backward of a collective is depends on what the ranks do with its result, and getting that wrong scales
gradients by the number of ranks or loses parts of them. Two words decide it. A tensor is *replicated* when all ranks of
the group hold it and compute the same with it; its gradient is then whole and equal on all of them. A result is used
*differently* when every rank makes its own of it (its heads, its queries); the gradient on a rank is then only a part,
and the parts must be summed.

    forward                          backward                     where
    shard: take own slice            all-gather                   a replicated tensor is cut up
    gather: all-gather               take own slice               ... and becomes replicated again
    gather_for_parts: all-gather     reduce-scatter               the result is used differently
    reduce_scatter                   all-gather                   parts are summed and cut up
    enter_parts: nothing             all-reduce                   a replicated tensor is used differently
    sum_parts: all-reduce            nothing                      ... and parts are summed to a replicated one
    sum_statistics: all-reduce       all-reduce                   a sum of parts that every rank uses differently
    all_to_all                       all_to_all                   slices change places

All of them are linear, so a forward-mode derivative needs no such choice: the tangent goes through the forward's own
collective, in a second message.

Every function takes and returns plain tensors. Slices are of equal size: callers pad.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

Group = dist.ProcessGroup


def _all_gather(x: Tensor, dim: int, group: Group) -> Tensor:
    parts = x.new_empty((group.size(), *x.shape))
    dist.all_gather_into_tensor(parts.flatten(0, 1), x.contiguous(), group=group)
    return torch.cat(parts.unbind(0), dim=dim)


def _reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    parts = torch.stack(x.chunk(group.size(), dim=dim))
    own = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(own, parts.flatten(0, 1), group=group)
    return own


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _own(x: Tensor, dim: int, group: Group) -> Tensor:
    return x.chunk(group.size(), dim=dim)[group.rank()].contiguous()


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _own(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _all_gather(gradients[0], ctx.dim, ctx.group), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _own(gradients[0], ctx.dim, ctx.group), None, None


class _GatherForParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _reduce_scatter(gradients[0], ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _all_gather(gradients[0], ctx.dim, ctx.group), None, None


class _EnterParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _all_reduce(gradients[0], ctx.group), None


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class _SumStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _all_reduce(gradients[0], ctx.group), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _exchange_slices(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _exchange_slices(gradients[0], ctx.group), None


def _exchange_slices(x: Tensor, group: Group) -> Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received


def _apply(collective: type[torch.autograd.Function], x: Tensor, *arguments: Any) -> Tensor:
    """Not by the functions' own forward mode, because torch.compile refuses functions that have one."""
    if not torch.compiler.is_compiling():
        value, tangent = forward_ad.unpack_dual(x)
        if tangent is not None:
            return forward_ad.make_dual(collective.apply(value, *arguments), collective.apply(tangent, *arguments))
    return collective.apply(x, *arguments)


def shard(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's slice of a replicated tensor."""
    return _apply(_Shard, x, dim, group)


def gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """All ranks' slices, as one replicated tensor."""
    return _apply(_Gather, x, dim, group)


def gather_for_parts(x: Tensor, dim: int, group: Group) -> Tensor:
    """All ranks' slices, for ranks that then do different things."""
    return _apply(_GatherForParts, x, dim, group)


def reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's slice of the sum of all ranks' tensors."""
    return _apply(_ReduceScatter, x, dim, group)


def enter_parts(x: Tensor, group: Group) -> Tensor:
    """A replicated tensor, for ranks that then do different things."""
    return _apply(_EnterParts, x, group)


def sum_parts(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' tensors, replicated."""
    return _apply(_SumParts, x, group)


def sum_statistics(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' tensors, for ranks that then do different things."""
    return _apply(_SumStatistics, x, group)


def all_to_all(x: Tensor, group: Group) -> Tensor:
    """Slice i of dim 0 goes to rank i; slice i of the result came from rank i."""
    return _apply(_AllToAll, x, group)
