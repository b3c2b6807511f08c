"""Activation checkpointing: recompute activations in the backward to save memory.

*full* saves only a block's input. It needs the least memory and a third more FLOPs. *selective* also saves activations
that are expensive to compute and cheap to store: attention outputs (their FLOPs grow with the square of the number of
tokens, their size only linearly), and the output of every n-th matrix product. With n = 1 nothing that costs FLOPs is
recomputed, only norms, modulation, rotary phases and GELU, which are bound by memory bandwidth. The hidden activations
of the feed-forward are then more than a third of what is stored, and cost no more FLOPs per byte than other products;
`store_hidden = false` recomputes them alone. *Block skip* leaves every n-th block without checkpointing, to use memory
that would otherwise be free.

Sparse attention *selects* tiles, and the selection must not be recomputed: a recomputed score may differ in its last
bit, so the backward could use other tiles than the forward. Every mode therefore saves selections, which are small.

Matrix products are chosen by their order: a counter numbers the products in one block's forward and restarts with each
block. The feed-forward's first product is known by its width, because LoRA adapters add products to the count. PyTorch
up to 2.12 asks the policy again during recomputation, later versions reuse the first answer; forward and recomputation
therefore have separate counters.

The block is not wrapped; its `forward` is replaced. So parameters have the names that checkpoints and exports expect,
and FSDP's hooks, which run around `forward`, run once and outside of the recomputation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from titan_distill.config.sections import ActivationCheckpointConfig

Operation = torch._ops.OpOverload | torch._ops.HigherOrderOperator


def _existing(*names: str) -> set[Operation]:
    """Returns the ATen operations with these names that the installed torch has."""
    packets = [getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name)]
    return {packet.default for packet in packets}


MATMULS = frozenset(_existing("mm", "addmm", "_scaled_mm", "_scaled_mm_v2"))
"""Operations that compute a linear layer's matrix product, in high precision or in float8."""

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
    """Makes `selective` save the outputs of another attention operation. The operation's module calls this at
    import."""
    _ATTENTION.add(operation)


def register_selection(operation: Operation) -> None:
    """Makes every mode save the outputs of an operation that selects tiles. The operation's module calls this at
    import."""
    _SELECTIONS.add(operation)


def is_checkpointed(index: int, config: ActivationCheckpointConfig) -> bool:
    """Returns whether block `index` recomputes anything. Every `skip_interval`-th block does not."""
    return config.mode != "none" and not (config.skip_interval and (index + 1) % config.skip_interval == 0)


def is_kept(matmul: int, config: ActivationCheckpointConfig, *, is_hidden: bool) -> bool:
    """Returns whether a checkpointed block saves the output of its matrix product number `matmul`, counted from 0.
    `is_hidden` says whether that output is the feed-forward's hidden activations."""
    return config.mode == "selective" and (matmul + 1) % config.interval == 0 and (config.store_hidden or not is_hidden)


def describe(config: ActivationCheckpointConfig) -> str:
    """Returns a phrase for the activations that are saved for the backward."""
    if config.mode == "none":
        return "no activation recomputed"
    text = "full: saves each block's input"
    if config.mode == "selective":
        matmuls = "every matmul" if config.interval == 1 else f"1 of {config.interval} matmuls"
        first = "" if config.store_hidden else " but the feed-forward's first"
        text = f"selective: saves attention outputs and {matmuls}{first}"
    return text + (f", all of 1 of {config.skip_interval} blocks" if config.skip_interval else "")


def apply_activation_checkpointing(
    blocks: Iterable[nn.Module],
    config: ActivationCheckpointConfig,
    *,
    selects: bool = False,
    hidden_width: int | None = None,
) -> None:
    """Makes the blocks recompute their activations in the backward, as `config` says.

    `selects` says whether the blocks make selections, which must be saved. Otherwise *full* need not inspect every
    operation. `hidden_width` is the number of hidden features of the feed-forward on this rank, which no other matrix
    product of a block has as outputs; only `store_hidden = false` needs it.
    """
    assert config.store_hidden or hidden_width is not None
    # No block draws random numbers, so there is no generator state to keep.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if config.mode == "selective" or selects:
        options["context_fn"] = functools.partial(_selective_contexts, config, hidden_width)
    for index, block in enumerate(blocks):
        if is_checkpointed(index, config):
            block.forward = functools.partial(_run, block.forward, options)


def _run(forward: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a block's `forward`, and recomputes it in the backward if there is one."""
    # Without a graph nothing is saved anyway, and the checkpoint of PyTorch up to 2.11 has no forward mode.
    return checkpoint(forward, *args, **options, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)


def _selective_contexts(
    config: ActivationCheckpointConfig, hidden_width: int | None
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Returns the contexts of one forward and of its recomputation, each with its own counter."""
    return create_selective_checkpoint_contexts(_Policy(config, hidden_width))


class _Policy:
    """Policy that decides for each operation in a block whether its output is saved."""

    def __init__(self, config: ActivationCheckpointConfig, hidden_width: int | None = None) -> None:
        self.config, self.hidden_width = config, hidden_width
        self.num_matmuls = {False: 0, True: 0}

    def __call__(
        self, context: SelectiveCheckpointContext, operation: Operation, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        kept = operation in _SELECTIONS or (operation in _ATTENTION and self.config.mode == "selective")
        if operation in MATMULS:
            is_hidden = not self.config.store_hidden and _num_outputs(operation, args) == self.hidden_width
            kept = is_kept(self.num_matmuls[context.is_recompute], self.config, is_hidden=is_hidden)
            self.num_matmuls[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _num_outputs(matmul: Operation, args: Any) -> int:
    """Returns the number of output features of a linear layer's product, from its weight."""
    weight: Tensor = args[2 if matmul is torch.ops.aten.addmm.default else 1]
    return weight.shape[-1]
