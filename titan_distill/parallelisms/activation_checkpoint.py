"""Activation checkpointing: keep each block's input, recompute the rest in backward.

The block's ``forward`` is replaced rather than the block wrapped: parameter names stay what checkpoints and exports
expect, and FSDP's hooks, which sit around ``forward``, run once and outside of the recomputation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import nn
from torch.utils.checkpoint import checkpoint


def apply_activation_checkpointing(blocks: Iterable[nn.Module], mode: str) -> None:
    """Makes every block recompute itself in backward when ``mode`` is ``full``; does nothing for ``none``."""
    assert mode in ("none", "full")
    if mode == "none":
        return
    for block in blocks:
        # No block draws random numbers, so there is no generator state to keep.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
