"""Activation checkpointing: recompute activations in the backward to save memory.

*full* saves a block's input only: least memory, a third more FLOPs. *selective* saves in addition activations that are
expensive to compute and cheap to store: attention outputs, whose FLOPs grow with the square of the tokens and whose
size does not, and every n-th matrix product. *Block skip* leaves every n-th block alone: the coarse knob for memory
that is left over.

A block that *selects*, as sparse attention does, must not select again: a recomputed score may differ in its last bit,
turn a tie around, and give the backward other tiles than the forward had. Every mode saves selections; they are small.

Saved products are chosen by order, not by name: a counter runs over the products of one block's forward and
starts anew with each block. PyTorch up to 2.12 asks the policy a second time, in the recomputation, later ones look the
first answer up; forward and recomputation are therefore counted apart.

The block's `forward` is replaced rather than the block wrapped: parameter names stay what checkpoints and exports
expect, and FSDP's hooks, which sit around `forward`, run once and outside of the recomputation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from titan_distill.config.sections import ActivationCheckpointConfig

Operation = torch._ops.OpOverload | torch._ops.HigherOrderOperator


def _existing(*names: str) -> set[Operation]:
    """The ATen operations of these names that the torch at hand has."""
    packets = [getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name)]
    return {packet.default for packet in packets}


MATMULS = frozenset(_existing("mm", "addmm", "_scaled_mm", "_scaled_mm_v2"))
"""Operations of a linear layer, in high precision or in float8."""

_ATTENTION = {
    *_existing(
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    torch.ops.higher_order.flex_attention,
}


_SELECTIONS: set[Operation] = set()


def register_attention(operation: Operation) -> None:
    """Lets `selective` save the outputs of one more attention operation; its module calls this at import."""
    _ATTENTION.add(operation)


def register_selection(operation: Operation) -> None:
    """Lets every mode save the outputs of an operation that selects; its module calls this at import."""
    _SELECTIONS.add(operation)


def is_checkpointed(index: int, config: ActivationCheckpointConfig) -> bool:
    """True where block `index` recomputes anything: every `skip_interval`-th does not."""
    return config.mode != "none" and not (config.skip_interval and (index + 1) % config.skip_interval == 0)


def is_kept(matmul: int, config: ActivationCheckpointConfig) -> bool:
    """True where a checkpointed block saves the output of its `matmul`-th matrix product, counted from 0."""
    return config.mode == "selective" and (matmul + 1) % config.interval == 0


def describe(config: ActivationCheckpointConfig) -> str:
    """The activations that are saved for the backward, in one phrase."""
    if config.mode == "none":
        return "no activation recomputed"
    text = "full: saves each block's input"
    if config.mode == "selective":
        matmuls = "every matmul" if config.interval == 1 else f"1 of {config.interval} matmuls"
        text = f"selective: saves attention outputs and {matmuls}"
    return text + (f", all of 1 of {config.skip_interval} blocks" if config.skip_interval else "")


def apply_activation_checkpointing(
    blocks: Iterable[nn.Module], config: ActivationCheckpointConfig, *, selects: bool = False
) -> None:
    """Makes the blocks recompute themselves in backward as `config` says.

    `selects`: they have selections to save. Without them *full* need not look at every operation.
    """
    # No block draws random numbers, so there is no generator state to keep.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if config.mode == "selective" or selects:
        options["context_fn"] = functools.partial(_selective_contexts, config)
    for index, block in enumerate(blocks):
        if is_checkpointed(index, config):
            block.forward = functools.partial(_run, block.forward, options)


def _run(forward: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a block's `forward`, to be recomputed in the backward if there will be one."""
    # Without a graph nothing is saved anyway, and the checkpoint of PyTorch up to 2.11 has no forward mode.
    return checkpoint(forward, *args, **options, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)


def _selective_contexts(
    config: ActivationCheckpointConfig,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """One forward's and its recomputation's contexts, with counters of their own."""
    return create_selective_checkpoint_contexts(_Policy(config))


class _Policy:
    """Decides for each operation in a block whether its output is saved."""

    def __init__(self, config: ActivationCheckpointConfig) -> None:
        self.config = config
        self.num_matmuls = {False: 0, True: 0}

    def __call__(
        self, context: SelectiveCheckpointContext, operation: Operation, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        kept = operation in _SELECTIONS or (operation in _ATTENTION and self.config.mode == "selective")
        if operation in MATMULS:
            kept = is_kept(self.num_matmuls[context.is_recompute], self.config)
            self.num_matmuls[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
