"""torch.compile, one transformer block at a time.

A transformer repeats one block. Compiling the whole model would unroll all blocks, take minutes, and break the graph at
every FSDP hook. Compiling one block gives a single graph that all blocks of the same shape share. FSDP gathers weights
between graphs, so gathering overlaps with computation. The gain is fusion inside a block (norms, modulation, casts);
between blocks there is only the residual stream, so nothing to fuse.

The block's `forward` is compiled, not the block. So its hooks run outside of the graph and its parameters keep their
names. Activation checkpointing is applied before and becomes part of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from titan_distill.config.sections import CompileConfig

NUM_GRAPHS_OF_A_BLOCK = 64
"""Limit of graphs per block. torch counts graphs per code object, which the blocks of all roles share. One role alone
needs a graph with and one without gradients, each for a single and a doubled batch and for each form of timesteps, so
torch's default limit of 8 is too low."""

NUM_COMPILED_SEGMENTS = 8
"""Largest number of segments that a compiled causal role may generate. Each number of cached segments takes about six
more graphs."""


def check_num_segments(config: CompileConfig, num_segments: int) -> None:
    """Raises ValueError if a causal role generates more than `NUM_COMPILED_SEGMENTS` segments."""
    if config.enabled and num_segments > NUM_COMPILED_SEGMENTS:
        raise ValueError(
            f"compile.enabled = true does not go with {num_segments} segments of a causal role: every number of "
            f"segments in its KV cache takes graphs of its own, {NUM_COMPILED_SEGMENTS} at most; make segments longer, "
            "or set it to false"
        )


def compile_blocks(
    blocks: Iterable[nn.Module], config: CompileConfig, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compiles every block as one graph; a graph break is an error. Does nothing unless `config.enabled`."""
    if not config.enabled:
        return
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, NUM_GRAPHS_OF_A_BLOCK)
    mode = config.mode if backend == "inductor" else None
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, mode=mode, backend=backend)


def describe(config: CompileConfig) -> str:
    """Returns a phrase for the banner."""
    if not config.enabled:
        return "not compiled"
    return "blocks compiled" if config.mode == "default" else f"blocks compiled ({config.mode})"
