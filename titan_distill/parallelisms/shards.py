"""Conversion of whole tensors to the shards that a rank holds, without communication."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from titan_distill.parallelisms.tensor import local


def local_region(tensor: Tensor) -> tuple[slice, ...]:
    """Returns the slices of the whole tensor that this rank holds of `tensor`. For a plain tensor they cover all of it.

    Tensor parallelism cuts a parameter first, and FSDP then cuts the resulting part, whatever the order of the axes in
    the mesh. If both cuts are along one dim, DTensor calls the placement of the second one strided.
    """
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "every rank is part of every role"
    region = [slice(0, size) for size in tensor.shape]
    # A strided shard is a second cut of a dim: it sorts behind the first.
    cuts = [(type(cut) is not Shard, axis, cut.dim) for axis, cut in enumerate(placements) if hasattr(cut, "dim")]
    for _, axis, dim in sorted(cuts):
        region[dim] = _chunk(region[dim], mesh.size(axis), coordinate[axis])
    return tuple(region)


def _chunk(whole: slice, num_chunks: int, index: int) -> slice:
    """Returns the slice of chunk `index` as torch.chunk cuts: sizes are rounded up, so the last chunks may be short or
    empty."""
    length = whole.stop - whole.start
    size = -(-length // num_chunks)
    return slice(whole.start + min(length, index * size), whole.start + min(length, (index + 1) * size))


@torch.no_grad()
def copy_full_tensor(parameter: Tensor, full: Tensor) -> None:
    """Copies a whole tensor into a plain parameter, or this rank's shard of it into a DTensor, without
    communication."""
    fill(parameter, full[local_region(parameter)])


def fill(parameter: Tensor, part: Tensor) -> None:
    """Copies this rank's part of a tensor into its parameter."""
    assert not parameter.is_meta, "materialise the model with to_empty before filling it"
    local(parameter).copy_(part)
