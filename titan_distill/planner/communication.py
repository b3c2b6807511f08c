"""The traffic of a step, in bytes per rank, by collective.

A ring moves S (P - 1) / P bytes through each of P ranks to gather or to reduce-scatter a tensor of S bytes, and twice
as many to all-reduce it. An all-to-all sends a rank's whole tensor but its own slice. All-gathers of weights and
reductions of gradients overlap with computation, so only their excess costs time. Exchanges of tokens happen within a
block, where everything waits. Omitted, because each is below a percent: statistics of norms, embedders and head, the
loss and the gradient norm.
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
        compute_bytes: bytes per number in the compute type.
        reshards: whether gathered blocks are freed after their forward.
        num_modules: networks that share the blocks equally.
        trained_share: fraction of the numbers with gradients: 1, or that of the LoRA adapters.
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
        """Bytes that stay gathered between forwards: the last block and the root of each network, or everything."""
        last = self.num_modules * self.blocks[-1]
        return self.compute_bytes * (last + self.root if self.reshards else self.total)

    @property
    def passing(self) -> float:
        """Bytes of a gathered block and of the block gathered ahead."""
        return 2 * self.compute_bytes * max(self.blocks) if self.reshards else 0.0


@dataclass(frozen=True)
class Transfer:
    """The bytes and seconds of one kind of collective of one role."""

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
    """The links between the ranks of one layout, which give a transfer its seconds."""

    degrees: Degrees
    gpu: Gpu

    def transfer(self, collective: str, axis: str, size: float, *, overlaps: bool = False) -> Transfer:
        """A transfer over the ranks of `axis`. `size` is that of the whole tensor for gathers and reductions, and that
        of a rank's own part for an all-to-all. An all-reduce counts twice."""
        num_ranks, stride = self._group(axis)
        sent = size * (num_ranks - 1) / num_ranks * (2 if "all-reduce" in collective else 1)
        return Transfer(collective, sent, sent / self.gpu.bandwidth(num_ranks, stride), overlaps)

    def _group(self, axis: str) -> tuple[int, int]:
        """Number of ranks of an axis, and the distance between their numbers."""
        d = self.degrees
        return {
            "tensor": (d.tensor, 1),
            "sequence": (d.sequence, d.tensor),
            "fsdp": (d.sequence * d.dp_shard, d.tensor),
            "replicas": (d.dp_replicate, d.model_parallel * d.dp_shard),
            "exchange": (d.model_parallel, 1),
        }[axis]


def weight_transfers(weights: Weights, links: Links, *, backward: bool, reduces: float) -> Iterator[Transfer]:
    """Transfers of weights in one forward, and in its backward if it has one. `reduces`: fraction of backwards that
    reduce gradients."""
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
    """Transfers of tokens in the blocks of one forward. `directions`: 1, plus 1 for a backward, plus the fraction of
    forwards that it recomputes."""
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
