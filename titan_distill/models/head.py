"""A head: a small network that reads, position by position, what another network holds inside.

A role need not be a network of the family. A network that judges samples is best built on features that exist already:
those between two parts of a denoiser, which know at every noise level what a sample should look like. Reading costs
three thin layers; making features of its own would cost a second denoiser.

A head makes one number a position, and whoever asks takes the mean over positions. So it may run on whichever
positions a rank has: gradients of its weights are then parts of one sum, as those of every other layer are.

Shape suffixes: B batch, L positions of this rank, W width of the features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from titan_distill.parallelisms.fsdp import FsdpOptions, apply_fsdp
from titan_distill.parallelisms.mesh import RoleMesh

HIDDEN_WIDTH = 128


class FeatureHead(nn.Module):
    """For the features of each depth a norm and two linear layers; the sum over depths is the head's number.

    The last layers start at zero: a head that has learnt nothing says nothing. They have no bias: where as many samples
    pull it up as down, its gradient is rounding alone, which an optimizer that divides by it would make a step of.
    """

    def __init__(self, width: int, num_depths: int) -> None:
        super().__init__()
        self.width = width
        self.readers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, HIDDEN_WIDTH), nn.SiLU(), _zero_linear(HIDDEN_WIDTH))
            for _ in range(num_depths)
        )

    def forward(self, *features_BLW: Tensor) -> Tensor:
        """[B, L], from the features of each depth."""
        numbers = [
            reader(features.to(next(reader.parameters()).dtype))
            for reader, features in zip(self.readers, features_BLW, strict=True)
        ]
        return torch.stack(numbers).sum(0).squeeze(-1)

    def architecture(self) -> dict[str, Any]:
        """The head's architecture as checkpoint manifests record it."""
        return {"_class_name": type(self).__name__, "width": self.width, "num_depths": len(self.readers)}


def _zero_linear(width: int) -> nn.Linear:
    linear = nn.Linear(width, 1, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def build_head(
    width: int, num_depths: int, mesh: RoleMesh | None, device: torch.device, options: FsdpOptions, seed: int
) -> FeatureHead:
    """A head with weights drawn from `seed`, the same in every layout; ranks share them as they share others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = FeatureHead(width, num_depths)
    head.to("cpu" if options.cpu_offload and device.type != "meta" else device)
    if mesh is not None:
        apply_fsdp(head, (), mesh.fsdp, options)
    return head
