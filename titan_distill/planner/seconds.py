"""Seconds that a rank computes, by part of a step.

Linear layers and attention are bound by the tensor cores: their seconds are FLOPs over the FLOP/s of the part. All
other work is bound by memory bandwidth: its seconds are the bytes that it reads and writes. Attention's seconds count
the products that kernels execute: the backward of dense attention computes the scores again, 5 products where the
forward has 2, and that of sparse attention, whose two kernels each do so, 7. A kernel of sparse attention multiplies
whole tiles and masks what is missing in ragged ones, so its seconds grow by the inverse of the useful share.

Pointwise operations between products are fused by the compiler: one kernel reads its inputs once and writes its outputs
once. With `a` bytes per activation at full width, `h` in a rank's heads and `f` of hidden features, a block moves

    forward    13 a + 6 h + 2 f     modulated norms 2 + 4 + 4, gated update 3; q/k norms with rotary phases 3 × 2
    backward   22 a + 13 h + 4 f    the same with their gradients, sums of input gradients 2, those of biases
    again      10 a + 6 h + 2 f     with checkpointing: the forward without the last update

Without the compiler each operator is a kernel, and most compute in fp32: about four times the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from titan_distill.observability.flops import ForwardFlops
from titan_distill.planner.communication import Weights
from titan_distill.planner.hardware import EFFICIENCY, Gpu
from titan_distill.planner.memory import FP32, LocalForward, States

LINEAR, CROSS_ATTENTION, POINTWISE, WEIGHTS, OPTIMIZER = (
    "linear layers", "cross-attention", "pointwise", "FSDP's copies", "optimizer",
)  # fmt: skip
ATTENTION_FORWARD, ATTENTION_BACKWARD = "attention, forward", "attention, backward"
SPARSE_FORWARD, SPARSE_BACKWARD = "sparse attention, forward", "sparse attention, backward"
RATES = {
    LINEAR: EFFICIENCY.linear,
    ATTENTION_FORWARD: EFFICIENCY.attention_forward,
    ATTENTION_BACKWARD: EFFICIENCY.attention_backward,
    SPARSE_FORWARD: EFFICIENCY.sparse_forward,
    SPARSE_BACKWARD: EFFICIENCY.sparse_backward,
    CROSS_ATTENTION: EFFICIENCY.cross_attention,
}
"""Fraction of the peak FLOP/s by part. Parts that are not listed are bound by memory bandwidth."""

DENSE_BACKWARD, SPARSE_BACKWARD_PRODUCTS = 5 / 2, 7 / 2
"""FLOPs that the kernels of an attention's backward execute, over those of its forward."""
EAGER_PASSES = 4
"""Bytes of pointwise operations without the compiler, over those with it."""


@dataclass(frozen=True)
class Part:
    """Work of one kind on one rank: FLOPs that kernels execute or bytes that they move, and the seconds it takes."""

    name: str
    flops: float
    num_bytes: float
    seconds: float

    def repeated(self, times: float) -> Part:
        """Returns this work `times` times."""
        return replace(self, flops=times * self.flops, num_bytes=times * self.num_bytes, seconds=times * self.seconds)


@dataclass(frozen=True)
class Backward:
    """Backward of a forward.

    Attributes:
        of_weights: whether there are gradients of the weights, and not only those of LoRA adapters.
        matmuls: FLOPs of linear layers that are recomputed.
        attention: fraction of the attention that is recomputed.
        checkpointed: fraction of the blocks that recompute their pointwise operations.
    """

    of_weights: bool
    matmuls: float
    attention: float
    checkpointed: float


def products(flops: ForwardFlops, text: float, backward: Backward | None, useful: float | None) -> dict[str, float]:
    """Returns the FLOPs that kernels execute by part, for `flops` of a forward and its backward, if there is one.

    `text` are the FLOPs of the keys and values of the text, which `flops` has in cross-attention. `useful` is the
    useful share of sparse attention, None for dense attention.
    """
    linear, cross = flops.linear + flops.embeddings + text, flops.cross_attention - text
    dense = useful is None
    attention = flops.self_attention if useful is None else flops.self_attention / useful
    selection = 0.0 if useful is None else flops.selection / useful
    found = {LINEAR: linear, ATTENTION_FORWARD if dense else SPARSE_FORWARD: attention, CROSS_ATTENTION: cross}
    if backward is not None:
        found[LINEAR] += (1 + backward.of_weights) * linear - flops.data_layers + backward.matmuls
        found[ATTENTION_FORWARD if dense else SPARSE_FORWARD] += backward.attention * (attention - selection)
        found[CROSS_ATTENTION] += (DENSE_BACKWARD + backward.attention) * cross
        times = DENSE_BACKWARD if dense else SPARSE_BACKWARD_PRODUCTS
        found[ATTENTION_BACKWARD if dense else SPARSE_BACKWARD] = times * (attention - selection)
    return found


def product_parts(found: dict[str, float], gpu: Gpu) -> Iterator[Part]:
    """Yields the parts of `products`."""
    for name, flops in found.items():
        yield Part(name, flops, 0.0, flops / (gpu.peak_flops * RATES[name]))


def pointwise_bytes(forward: LocalForward, backward: Backward | None, *, compiled: bool) -> float:
    """Returns the bytes that pointwise operations of all blocks move in one forward, and in its backward."""
    a, h, f = forward.residual, forward.heads, forward.hidden
    gated = 0 if forward.sparse is None else 3 * h
    moved = 13 * a + 6 * h + 2 * f + gated
    if backward is not None:
        moved += 22 * a + 13 * h + 4 * f + 2 * gated
        moved += backward.checkpointed * (10 * a + 6 * h + 2 * f + gated)
    return forward.architecture.num_layers * moved * (1 if compiled else EAGER_PASSES)


def weights_bytes(weights: Weights, states: States, *, backward: bool) -> float:
    """Returns the bytes that FSDP moves in a rank's memory for one forward and its backward, if there is one: a cast of
    the shard, the gathered weights written, copied out and read; gradients read, cast to fp32 and reduced."""
    gathered = states.parameters + 3 * weights.compute_bytes * weights.total
    gradients = weights.trained_share * weights.total * (weights.compute_bytes + 2 * FP32)
    return gathered + (gathered + gradients if backward else 0.0)


def optimizer_bytes(states: States) -> float:
    """Returns the bytes that an update of a role moves: the norm reads gradients once, clipping reads and writes them,
    fused AdamW reads weights, gradients and two moments and writes all but the gradients, the EMA reads two and writes
    one."""
    return 10 * states.gradients + 3 * states.ema


def memory_part(name: str, num_bytes: float, gpu: Gpu) -> Part:
    """Returns a part that is bound by memory bandwidth."""
    return Part(name, 0.0, num_bytes, num_bytes / (gpu.memory_bytes * EFFICIENCY.memory))


def summed(parts: Iterator[Part] | list[Part]) -> list[Part]:
    """Returns one part for each name."""
    found: dict[str, Part] = {}
    for part in parts:
        had = found.get(part.name, Part(part.name, 0.0, 0.0, 0.0))
        found[part.name] = Part(
            part.name, had.flops + part.flops, had.num_bytes + part.num_bytes, had.seconds + part.seconds
        )
    return list(found.values())
