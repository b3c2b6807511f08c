"""Size of an optimizer step in units of the weights' last place.

A stored number has a last place: its smallest change is about its size times the epsilon of its type, 6e-8 to 1e-7 of
it in float32, but 0.4 to 0.8 % in bfloat16. An update that is smaller than half of that is rounded away, and the weight
stays where it is, however long the run. So a role's update is measured as

    ‖w_after − w_before‖ / ‖w_before‖ / epsilon

of the weights as they are stored, with what rounding has left of the update. It is 0 for a role that does not train for
any reason: a learning rate below the last place, no gradient, no optimizer.

Roles of up to `MAX_WEIGHTS` weights are measured whole, and larger ones by evenly spaced weights of each shard, so the
copy from before the step is small. Sums run over the shards of all ranks, and a replicated weight counts once. They
travel with the sums of the next update, so the host waits for nothing of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_distill.parallelisms.tensor import local

MAX_WEIGHTS = 2**21
"""Largest number of weights of a role, over all ranks, that are copied and compared."""

Groups = dict[int, Tensor]
"""Flat weights of this rank by the number of ranks that hold the same ones."""


@torch.no_grad()
def stored_weights(parameters: list[nn.Parameter], num_ranks: int) -> Groups:
    """Returns copies of this rank's measured weights, in float32."""
    stride = -(-sum(parameter.numel() for parameter in parameters) // MAX_WEIGHTS)
    groups: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(_num_copies(parameter, num_ranks), []).append(local(parameter).detach().flatten()[::stride])
    return {copies: torch.cat(parts).float() for copies, parts in groups.items()}


def _num_copies(parameter: Tensor, num_ranks: int) -> int:
    if not isinstance(parameter, DTensor):
        return num_ranks
    mesh = parameter.device_mesh
    axes = [axis for axis, placement in enumerate(parameter.placements) if placement.is_replicate()]
    return num_ranks // mesh.size() * math.prod(mesh.size(axis) for axis in axes)


@torch.no_grad()
def squares(before: Groups, after: Groups) -> Tensor:
    """Returns this rank's part of the sums over all ranks of (after − before)² and before², float64 [2]."""
    parts = [
        torch.stack([_square(after[copies] - weights), _square(weights)]) / copies for copies, weights in before.items()
    ]
    return torch.stack(parts).sum(0)


def _square(values_N: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values_N, dtype=torch.float64).square()  # sums in float64 without a copy in it


def update_size(moved: float, weights: float, dtype: torch.dtype) -> float:
    """Returns the size of an update in units of the last place, from the sums of `squares` over all ranks. Weights that
    are all zero move by infinitely many."""
    if not weights:
        return math.inf if moved else 0.0
    return math.sqrt(moved / weights) / torch.finfo(dtype).eps
