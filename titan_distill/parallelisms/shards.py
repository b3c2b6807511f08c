"""The part of a whole tensor that a rank holds, without communication."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from titan_distill.parallelisms.tensor import local


def local_region(tensor: Tensor) -> tuple[slice, ...]:
    """The slices of the whole tensor that make this rank's values of `tensor`; all of it for a plain tensor.

    Parameters are cut by tensor parallelism first and by FSDP within what that left, whatever the order of the axes in
    the mesh; DTensor calls the second cut strided where both are along one dim.
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
    """Chunk `index` as torch.chunk cuts: equal sizes rounded up, so that the last ones may be short or empty."""
    length = whole.stop - whole.start
    size = -(-length // num_chunks)
    return slice(whole.start + min(length, index * size), whole.start + min(length, (index + 1) * size))


@torch.no_grad()
def copy_full_tensor(parameter: Tensor, full: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this rank's shard of it into a DTensor; no communication."""
    fill(parameter, full[local_region(parameter)])


def fill(parameter: Tensor, part: Tensor) -> None:
    """Copy this rank's part of a tensor into its parameter."""
    assert not parameter.is_meta, "materialise the model with to_empty before filling it"
    local(parameter).copy_(part)
