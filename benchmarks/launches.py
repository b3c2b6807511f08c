"""The sizes of attention that are timed on a GPU, in order of importance: what the suite measures and what
`compiled_cache` compiles ahead of time read the same list, so that they cannot drift apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Size:
    """One layer's attention on a grid of tokens, as (frames, height, width), cut into tiles."""

    grid: Grid
    heads: int
    tile: Grid = (4, 4, 4)
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    tiles_per_list: tuple[int, ...] = (2, 1)

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


WAN_720P: Grid = (21, 45, 80)
WAN_480P: Grid = (21, 30, 52)
WAN_5B: Grid = (31, 22, 40)
WHOLE_TILES: Grid = (28, 28, 52)
"""40,768 tokens, a size that public kernels state times for."""

SHORT_TILE: Grid = (3, 5, 4)

SIZES: list[Size] = [
    Size(WAN_720P, 12),
    Size(WAN_720P, 12, SHORT_TILE),
    Size(WAN_480P, 12),
    Size(WAN_480P, 12, SHORT_TILE),
    Size(WHOLE_TILES, 16),
    *(Size(grid, heads) for heads in (40, 24) for grid in (WAN_720P, WAN_480P, WAN_5B)),
    *(Size(grid, 40, SHORT_TILE) for grid in (WAN_720P, WAN_480P)),
    Size(WAN_5B, 12),
]

JVP = Size(WAN_480P, 12)
"""Dense attention with its forward-mode derivative, of a 1.3B student's rCM."""

GOLDEN = Size((5, 6, 6), 4, head_dim=32, dtype=torch.float32, tiles_per_list=(1,))
"""Attention of the golden job with a sparse student (`tests/golden/sparse.toml`), which is not timed."""
