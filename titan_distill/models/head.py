"""A head: a small network that reads the hidden states of another network, position by position.

A role may be a head instead of a network of the family. A discriminator is best built on existing features: the hidden
states of a denoiser, which represent samples at every noise level. A head on them needs three thin layers; computing
separate features would need a second denoiser. A head returns one number per position, and the caller takes the mean
over positions. Each rank may therefore run it on its own positions; the gradients of its weights are partial sums, like
those of every other layer.

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
    """Head with a norm and two linear layers for the features of each depth. The sum over depths is the output.

    The last layers start at zero, so an untrained head returns zero. They have no bias: with as many real as generated
    samples its gradient would be only rounding error, which Adam would scale up to a full step.
    """

    def __init__(self, width: int, num_depths: int) -> None:
        super().__init__()
        self.width = width
        self.readers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, HIDDEN_WIDTH), nn.SiLU(), _zero_linear(HIDDEN_WIDTH))
            for _ in range(num_depths)
        )

    def forward(self, *features_BLW: Tensor) -> Tensor:
        """Returns [B, L] from the features of each depth."""
        numbers = [
            reader(features.to(next(reader.parameters()).dtype))
            for reader, features in zip(self.readers, features_BLW, strict=True)
        ]
        return torch.stack(numbers).sum(0).squeeze(-1)

    def architecture(self) -> dict[str, Any]:
        """Architecture of the head as checkpoint manifests record it."""
        # Not the name of its type, which FSDP replaces.
        return {"_class_name": FeatureHead.__name__, "width": self.width, "num_depths": len(self.readers)}


def _zero_linear(width: int) -> nn.Linear:
    linear = nn.Linear(width, 1, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def build_head(
    width: int, num_depths: int, mesh: RoleMesh | None, device: torch.device, options: FsdpOptions, seed: int
) -> FeatureHead:
    """Builds a head with weights drawn from `seed`, equal in every layout, and shards it like other networks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = FeatureHead(width, num_depths)
    head.to("cpu" if options.cpu_offload and device.type != "meta" else device)
    if mesh is not None:
        apply_fsdp(head, (), mesh.fsdp, options)
    return head
