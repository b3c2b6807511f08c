"""Tile order: the one permutation that makes block-sparse video attention cheap.

A video's tokens form a grid (frames, height, width). In raster order a 4x4x4 neighbourhood is scattered over the whole
sequence; in tile order it is one contiguous run of at most 64 tokens, so a kernel loads it with plain strides and a
sequence shard is a run of whole tiles. Tiles follow each other in raster order of the tile grid, tokens inside a tile
in raster order too.

A grid that the tile does not divide leaves ragged tiles at its far faces. They are simply shorter: `start` and `length`
describe every tile, and no token is padded. Padding would be simpler to index, but costs 22 % of the tokens at 81
frames of 480p or 720p, and about 1.5x the attention work because it hits queries and keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

Grid = tuple[int, int, int]
DEFAULT_TILE: Grid = (4, 4, 4)
"""Tile of published sparse weights."""
TILES: tuple[Grid, ...] = (DEFAULT_TILE, (3, 5, 4))
"""Tiles that `best_tile` chooses from. Both fit a block of 64 tokens; the second divides 21 frames of 480p and 720p."""

# Each entry holds two int64 vectors (1.2 MB at 75,600 tokens). Training, validation and a second resolution are in use
# at once at most, so a short memory is enough and an old grid's tensors go away by themselves.
_NUM_CACHED_LAYOUTS = 8


class Tiles(NamedTuple):
    """Runs of tokens that a kernel treats as blocks.

    Attributes:
        start: int32 [tiles], the first token of each.
        length: int32 [tiles], the tokens of each.
        longest: no tile has more tokens; known without asking the device.
    """

    start: torch.Tensor
    length: torch.Tensor
    longest: int


@dataclass(frozen=True, eq=False)
class TileLayout:
    """The tile order of one grid's tokens, on one device.

    Attributes:
        grid: tokens along (frames, height, width).
        tile: tokens along (frames, height, width) of a full tile.
        permutation: int64 [L]; `x_raster[permutation]` is in tile order.
        inverse: int64 [L]; `x_tile[inverse]` is in raster order.
        start: int32 [tiles], the first token of each tile, in tile order.
        length: int32 [tiles], the tokens of each tile, 1 ... prod(tile).
    """

    grid: Grid
    tile: Grid
    permutation: torch.Tensor
    inverse: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def tile_grid(self) -> Grid:
        """Tiles along (frames, height, width), ragged ones included."""
        return tile_grid(self.grid, self.tile)

    @property
    def num_tiles(self) -> int:
        return math.prod(self.tile_grid)

    def tiles(self, run: range | None = None, join: int = 1) -> Tiles:
        """The tiles of `run` (all by default), with tokens counted from the run's first.

        `join` neighbouring tiles count as one; the last of a run may be made of fewer. Joined tiles are one run of
        tokens because tile order puts them next to each other.

        Raises:
            ValueError: `run` is empty, not contiguous or beyond the last tile, or `join` is not positive.
        """
        run = range(self.num_tiles) if run is None else run
        if not run or run.step != 1 or run.start < 0 or run.stop > self.num_tiles or join < 1:
            raise ValueError(
                f"run {run} joined by {join} must be a contiguous part of the layout's {self.num_tiles} tiles"
            )
        if len(run) == self.num_tiles and join == 1:
            return Tiles(self.start, self.length, math.prod(self.tile))
        start = self.start[run.start : run.stop]
        ends = (start + self.length[run.start : run.stop])[join - 1 :: join]
        if len(run) % join:
            ends = torch.cat((ends, (start[-1:] + self.length[run.stop - 1 : run.stop])))
        first = start[::join]
        return Tiles(first - start[0], ends - first, join * math.prod(self.tile))


def tile_grid(grid: Grid, tile: Grid = DEFAULT_TILE) -> Grid:
    """Return the tiles along (frames, height, width) that cover `grid`, ragged ones included."""
    frames, height, width = (-(-size // step) for size, step in zip(grid, tile, strict=True))
    return frames, height, width


def useful_share(grid: Grid, tile: Grid = DEFAULT_TILE) -> float:
    """Return the share of the fine branch's products that valid token pairs need, if tiles are chosen equally often.

    The kernels multiply whole blocks and mask the rest: a tile takes the rows of the next power of two, at least 16.
    The share is (tokens / (tiles x rows))², for queries and keys.
    """
    rows = max(16, 1 << (math.prod(tile) - 1).bit_length())
    return (math.prod(grid) / (math.prod(tile_grid(grid, tile)) * rows)) ** 2


def best_tile(grid: Grid) -> Grid:
    """Return the tile of `TILES` with the larger useful share on `grid`, of equal ones the first."""
    return max(TILES, key=lambda tile: useful_share(grid, tile))


def tile_layout(
    grid: tuple[int, int, int], tile: tuple[int, int, int] = DEFAULT_TILE, device: torch.device | str = "cpu"
) -> TileLayout:
    """Return the layout of `grid` cut into tiles of `tile`, with its tensors on `device`.

    Layouts are cached per (grid, tile, device): equal arguments give the same object.

    Raises:
        ValueError: `grid` or `tile` is not three positive integers.
    """
    for name, sizes in (("grid", grid), ("tile", tile)):
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"{name} {tuple(sizes)} must be three positive sizes (frames, height, width)")
    frames, height, width = grid
    tile_frames, tile_height, tile_width = tile
    key = ((frames, height, width), (tile_frames, tile_height, tile_width), torch.device(device))
    # Under FakeTensorMode a new tensor is a subclass: it must neither enter the cache nor be mixed with real ones.
    build = _cached_layout if type(torch.empty(0)) is torch.Tensor else _build_layout
    return build(*key)


def _build_layout(grid: Grid, tile: Grid, device: torch.device) -> TileLayout:
    tiles_per_dim = tile_grid(grid, tile)
    tile_of_token = torch.zeros(grid, dtype=torch.int64)
    length = torch.ones(tiles_per_dim, dtype=torch.int32)
    for dim, (size, step, num_tiles) in enumerate(zip(grid, tile, tiles_per_dim, strict=True)):
        shape = [-1 if other == dim else 1 for other in range(3)]
        tile_of_token = tile_of_token * num_tiles + (torch.arange(size) // step).view(shape)
        length = length * (size - torch.arange(num_tiles, dtype=torch.int32) * step).clamp(max=step).view(shape)
    # Stable, so that tokens keep their raster order within a tile.
    permutation = torch.argsort(tile_of_token.flatten(), stable=True)
    length = length.flatten()
    start = length.cumsum(0, dtype=torch.int32) - length
    tensors = (permutation, torch.argsort(permutation), start, length)
    return TileLayout(grid, tile, *(tensor.to(device) for tensor in tensors))


@lru_cache(maxsize=_NUM_CACHED_LAYOUTS)
def _cached_layout(grid: Grid, tile: Grid, device: torch.device) -> TileLayout:
    # A tensor born in inference mode could never be saved for backward by a later training step.
    with torch.inference_mode(False):
        return _build_layout(grid, tile, device)
