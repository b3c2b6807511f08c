"""What a step sends between ranks, in bytes a rank, by collective.

A ring moves S (P - 1) / P bytes through each of P ranks to gather or to reduce-scatter a tensor of S bytes, twice
that to all-reduce it; an all-to-all sends all of a rank's tensor but its own slice. Weights are gathered and gradients
reduced beside the computation, so only what exceeds it costs time. Tokens are exchanged within a block, where
everything waits. Left out, all below a percent: norms' statistics, embedders and head, the loss and the gradient norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from titan_distill.config.degrees import Degrees
from titan_distill.planner.hardware import Gpu
from titan_distill.planner.memory import FP32, LocalForward


@dataclass(frozen=True)
class Weights:
    """A role's weights as FSDP gathers them.

    Attributes:
        blocks: numbers in each block on a tensor-parallel rank.
        root: numbers outside of blocks.
        compute_bytes: of a number in the compute type.
        reshards: whether gathered blocks are freed after their forward.
        num_modules: networks that the blocks belong to, equally many to each.
        trained_share: of the numbers, those that have gradients: all, or adapters.
    """

    blocks: tuple[int, ...]
    root: int
    compute_bytes: int
    reshards: bool
    num_modules: int = 1
    trained_share: float = 1.0

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.root

    @property
    def lasting(self) -> float:
        """Bytes that stay gathered between forwards: each network's last block and root, or everything."""
        last = self.num_modules * self.blocks[-1]
        return self.compute_bytes * (last + self.root if self.reshards else self.total)

    @property
    def passing(self) -> float:
        """Bytes of a block and of the one that is gathered ahead."""
        return 2 * self.compute_bytes * max(self.blocks) if self.reshards else 0.0


@dataclass(frozen=True)
class Transfer:
    """What one kind of collective of one role sends."""

    collective: str
    bytes_sent: float
    seconds: float
    overlaps: bool
    """Whether it overlaps with computation."""

    def repeated(self, times: float) -> Transfer:
        """The transfer, `times` over."""
        return replace(self, bytes_sent=times * self.bytes_sent, seconds=times * self.seconds)


@dataclass(frozen=True)
class Links:
    """Prices collectives on the groups of one layout."""

    degrees: Degrees
    gpu: Gpu

    def transfer(self, collective: str, axis: str, size: float, *, overlaps: bool = False) -> Transfer:
        """``size`` is the whole tensor's for gathers and reductions, a rank's own for all-to-all; an all-reduce counts
        twice."""
        num_ranks, stride = self._group(axis)
        sent = size * (num_ranks - 1) / num_ranks * (2 if "all-reduce" in collective else 1)
        return Transfer(collective, sent, sent / self.gpu.bandwidth(num_ranks, stride), overlaps)

    def _group(self, axis: str) -> tuple[int, int]:
        """Ranks of an axis and how far apart they are."""
        d = self.degrees
        return {
            "tensor": (d.tensor, 1),
            "sequence": (d.sequence, d.tensor),
            "fsdp": (d.sequence * d.dp_shard, d.tensor),
            "replicas": (d.dp_replicate, d.model_parallel * d.dp_shard),
            "exchange": (d.model_parallel, 1),
        }[axis]


def weight_transfers(weights: Weights, links: Links, *, backward: bool, reduces: float) -> Iterator[Transfer]:
    """Of one forward, with its backward if it has one; ``reduces``: share of backwards that reduce gradients."""
    size = weights.compute_bytes
    held = 0 if weights.reshards else weights.total - weights.root
    if not backward:  # what stayed gathered need not be gathered again
        yield links.transfer("weights, all-gather", "fsdp", size * (weights.total - held), overlaps=True)
        return
    again = sum(weights.blocks[:-1]) if weights.reshards else 0
    yield links.transfer("weights, all-gather", "fsdp", size * (weights.total + again), overlaps=True)
    gradients = reduces * FP32 * weights.total * weights.trained_share
    yield links.transfer("gradients, reduce-scatter", "fsdp", gradients, overlaps=True)
    shard = gradients / (links.degrees.dp_shard * links.degrees.sequence)
    yield links.transfer("gradients, all-reduce of replicas", "replicas", shard, overlaps=True)


def token_transfers(forward: LocalForward, links: Links, *, directions: float) -> Iterator[Transfer]:
    """Of one forward's blocks; ``directions``: 1, plus 1 for a backward, plus the share of forwards recomputed."""
    times = directions * forward.architecture.num_layers
    # Self-attention, cross-attention and feed-forward each end (and, backwards, begin) with a sum over tensor ranks.
    if forward.token_region:
        yield links.transfer("tokens, tensor all-gather", "tensor", 3 * times * forward.activation)
        yield links.transfer("tokens, tensor reduce-scatter", "tensor", 3 * times * forward.activation)
    else:
        yield links.transfer("tokens, tensor all-reduce", "tensor", 3 * times * forward.activation)
    if forward.gathers_keys:
        keys_and_values = 2 * times * forward.sequence * forward.heads
        yield links.transfer("tokens, keys and values all-gather", "sequence", keys_and_values)
    else:
        yield links.transfer("tokens, Ulysses all-to-all", "sequence", 4 * times * forward.heads)
