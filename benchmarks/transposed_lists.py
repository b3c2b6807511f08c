"""Transposed lists of one layer by counting (the kernels) and by a stable sort (the twin), on a GPU.

That both are the same, to the last entry, is checked first. CPUs time the sort alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from titan_kernels import reference, tile_layout

from benchmarks.attention import Clock
from benchmarks.launches import SHORT_TILE, Grid


def measure(grid: Grid, heads: int, device: str, sparsity: float = 0.9) -> dict[str, Any]:
    """Milliseconds of both for random lists of a grid in tiles of 3 × 5 × 4.

    Raises:
        RuntimeError: they differ.
    """
    num_tiles = tile_layout(grid, SHORT_TILE).num_tiles
    topk = math.ceil(round((1 - sparsity) * num_tiles, 6))
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.randn(1, heads, num_tiles, num_tiles, generator=generator, device=device)
    lists = scores.topk(topk).indices.sort().values.to(torch.int32)
    clock = Clock.of(device)
    row = {"tiles": num_tiles, "topk": topk, "sorting_ms": clock(lambda: reference.transpose_lists(lists, num_tiles))}
    if device != "cuda":
        return row
    from titan_kernels.transpose_lists import transpose_lists

    if not all(map(torch.equal, transpose_lists(lists, num_tiles), reference.transpose_lists(lists, num_tiles))):
        raise RuntimeError(f"transposed lists of {num_tiles} tiles differ from those of a stable sort")
    counting = clock(lambda: transpose_lists(lists, num_tiles))
    return row | {"counting_ms": counting, "ratio": row["sorting_ms"] / counting}
