"""Traffic of a training step, in bytes sent per rank, by collective.

To all-gather or reduce-scatter a tensor of S bytes over P ranks, each rank sends S (P - 1) / P bytes; an all-reduce
takes twice that. In an all-to-all a rank sends all of its tensor except its own slice. All-gathers of weights and
reductions of gradients overlap with computation, so they cost time only where they last longer than it. Exchanges of
tokens happen inside a block and cannot overlap. Omitted, because each is below 1 %: statistics of norms, embedders and
head, the loss and the gradient norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from titan_distill.config.degrees import Degrees
from titan_distill.planner.hardware import Gpu
from titan_distill.planner.memory import FP32, LocalForward


@dataclass(frozen=True)
class Weights:
    """A role's weights as FSDP gathers them.

    Attributes:
        blocks: parameters of each block on one tensor-parallel rank.
        root: parameters outside of the blocks.
        compute_bytes: bytes per element in the compute dtype.
        reshards: whether gathered blocks are freed after their forward.
        num_modules: networks of the role; each has an equal share of `blocks`.
        trained_share: fraction of the parameters that have gradients: 1, or the fraction in LoRA adapters.
        by_fsdp: whether FSDP gathers copies and reduces gradients. A single fp32 process computes with its parameters.
    """

    blocks: tuple[int, ...]
    root: int
    compute_bytes: int
    reshards: bool
    num_modules: int = 1
    trained_share: float = 1.0
    by_fsdp: bool = True

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.root

    @property
    def gradients(self) -> float:
        """Bytes of whole gradients in fp32, before they are reduced."""
        return FP32 * self.total * self.trained_share

    @property
    def lasting(self) -> float:
        """Bytes of weights that stay gathered between forwards: the last block and the root of each network, or,
        without resharding, all weights."""
        if not self.by_fsdp:
            return 0.0
        last = self.num_modules * self.blocks[-1]
        return self.compute_bytes * (last + self.root if self.reshards else self.total)

    @property
    def passing(self) -> float:
        """Bytes of the weights gathered during a forward in addition to `lasting`: the current block and the next one,
        which is prefetched. A network with fewer than three blocks has fewer that do not last."""
        num_freed = len(self.blocks) // self.num_modules - 1
        return min(2, num_freed) * self.compute_bytes * max(self.blocks) if self.reshards and self.by_fsdp else 0.0

    @property
    def reducing(self) -> float:
        """Peak bytes of gradients on the way to be reduced: those of one unit (a block or the root), in the compute
        dtype and in fp32, and in fp32 those of the unit before it, whose reduction is not waited for."""
        if not self.by_fsdp:
            return 0.0
        num_blocks = len(self.blocks) // self.num_modules
        units = [0, *reversed(self.blocks[:num_blocks]), self.root // self.num_modules]
        most = max((self.compute_bytes + FP32) * unit + FP32 * before for before, unit in pairwise(units))
        return self.trained_share * most


@dataclass(frozen=True)
class Transfer:
    """Bytes and seconds of one kind of collective of one role."""

    collective: str
    bytes_sent: float
    seconds: float
    overlaps: bool
    """Whether the transfer overlaps with computation."""

    def repeated(self, times: float) -> Transfer:
        """Returns this transfer `times` times: bytes and seconds are multiplied."""
        return replace(self, bytes_sent=times * self.bytes_sent, seconds=times * self.seconds)


@dataclass(frozen=True)
class Links:
    """Links between the ranks of one layout. Their bandwidth determines the seconds of a transfer."""

    degrees: Degrees
    gpu: Gpu

    def transfer(self, collective: str, axis: str, size: float, *, overlaps: bool = False) -> Transfer:
        """Returns a transfer over the ranks of `axis`.

        `size` is in bytes: of the whole tensor for gathers and reductions, of one rank's part for an all-to-all. An
        all-reduce counts twice.
        """
        num_ranks, stride = self._group(axis)
        sent = size * (num_ranks - 1) / num_ranks * (2 if "all-reduce" in collective else 1)
        return Transfer(collective, sent, sent / self.gpu.bandwidth(num_ranks, stride), overlaps)

    def _group(self, axis: str) -> tuple[int, int]:
        """Returns the number of ranks of an axis, and the difference between the numbers of neighbouring ranks."""
        d = self.degrees
        return {
            "tensor": (d.tensor, 1),
            "sequence": (d.sequence, d.tensor),
            "fsdp": (d.sequence * d.dp_shard, d.tensor),
            "replicas": (d.dp_replicate, d.model_parallel * d.dp_shard),
            "exchange": (d.model_parallel, 1),
        }[axis]


def weight_transfers(
    weights: Weights, links: Links, *, backward: bool, scatters: float, sums_replicas: float
) -> Iterator[Transfer]:
    """Yields the transfers of weights of one forward, and of its backward if `backward` is true.

    `scatters` and `sums_replicas` are the fractions of backwards that reduce-scatter gradients, and that sum the shards
    of replicas.
    """
    size = weights.compute_bytes
    held = 0 if weights.reshards else weights.total - weights.root
    if not backward:  # what stayed gathered need not be gathered again
        yield links.transfer("weights, all-gather", "fsdp", size * (weights.total - held), overlaps=True)
        return
    again = sum(weights.blocks[:-1]) if weights.reshards else 0
    yield links.transfer("weights, all-gather", "fsdp", size * (weights.total + again), overlaps=True)
    gradients = weights.gradients
    yield links.transfer("gradients, reduce-scatter", "fsdp", scatters * gradients, overlaps=True)
    shard = gradients / (links.degrees.dp_shard * links.degrees.sequence)
    yield links.transfer("gradients, all-reduce of replicas", "replicas", sums_replicas * shard, overlaps=True)


def token_transfers(forward: LocalForward, links: Links, *, directions: float) -> Iterator[Transfer]:
    """Yields the transfers of tokens in the blocks of one forward.

    `directions` counts passes through the blocks: 1 for the forward, 1 for a backward if there is one, and the fraction
    of the forward that the backward recomputes.
    """
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
