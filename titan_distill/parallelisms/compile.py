"""torch.compile, one transformer block at a time.

A transformer repeats one block. Compiling the whole model would unroll it (minutes of compilation, a graph that breaks
at every FSDP hook); compiling the block costs one graph that all blocks of a shape share, and FSDP's gathering stays
between graphs, where it overlaps with them. Fusion inside a block (norms, modulation, casts) is all there is to
win: between blocks lies only the residual stream.

The block's `forward` is compiled rather than the block: its hooks stay outside of the graph, its parameters keep
their names, and activation checkpointing, applied before, becomes part of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from titan_distill.config.sections import CompileConfig

NUM_GRAPHS_OF_A_BLOCK = 64
"""All roles' blocks share the code that torch counts graphs by. One role needs a graph with and one without gradients,
both for a single and for a doubled batch and for each form of timesteps; torch's own limit of 8 is soon reached."""

NUM_COMPILED_SEGMENTS = 8
"""Segments that a compiled causal role may make: each number of cached segments takes some six graphs more."""


def check_num_segments(config: CompileConfig, num_segments: int) -> None:
    """Raises ValueError where a causal role makes more segments than there are graphs for."""
    if config.enabled and num_segments > NUM_COMPILED_SEGMENTS:
        raise ValueError(
            f"compile.enabled = true does not go with {num_segments} segments of a causal role: every number of "
            f"segments in its KV cache takes graphs of its own, {NUM_COMPILED_SEGMENTS} at most; make segments longer, "
            "or set it to false"
        )


def compile_blocks(
    blocks: Iterable[nn.Module], config: CompileConfig, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compiles every block as one graph; does nothing unless `config.enabled`. A graph break is an error."""
    if not config.enabled:
        return
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, NUM_GRAPHS_OF_A_BLOCK)
    mode = config.mode if backend == "inductor" else None
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, mode=mode, backend=backend)


def describe(config: CompileConfig) -> str:
    """One phrase for the banner."""
    if not config.enabled:
        return "not compiled"
    return "blocks compiled" if config.mode == "default" else f"blocks compiled ({config.mode})"
