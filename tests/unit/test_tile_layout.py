"""Tile order: a permutation, whole tiles in runs, ragged edges, and a cache that training and planning can share."""

import itertools
import re

import pytest
import torch
from runs import REPOSITORY
from titan_kernels import tile_layout
from titan_kernels.layout import DEFAULT_TILE, best_tile, useful_share
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

GRIDS = [(1, 1, 1), (4, 4, 4), (8, 4, 12), (5, 6, 6), (3, 5, 7), (9, 2, 11)]


def tokens_by_tile(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> list[list[int]]:
    """The definition, literally: for each tile in raster order, its valid tokens in raster order."""
    _, height, width = grid
    tiles = []
    for origin in itertools.product(*(range(0, size, step) for size, step in zip(grid, tile))):
        spans = [range(first, min(first + step, size)) for first, step, size in zip(origin, tile, grid)]
        tiles.append([(t * height + h) * width + w for t, h, w in itertools.product(*spans)])
    return tiles


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tile", [(4, 4, 4), (2, 3, 4)])
def test_layout_follows_the_definition(grid, tile):
    layout = tile_layout(grid, tile)
    expected = tokens_by_tile(grid, tile)
    assert layout.permutation.tolist() == list(itertools.chain.from_iterable(expected))
    assert layout.length.tolist() == [len(tokens) for tokens in expected]
    assert layout.start.tolist() == [0, *itertools.accumulate(len(tokens) for tokens in expected[:-1])]
    assert (layout.num_tiles, layout.num_tokens) == (len(expected), sum(map(len, expected)))


@pytest.mark.parametrize("grid", GRIDS)
def test_inverse_restores_raster_order(grid):
    layout = tile_layout(grid)
    raster = torch.randn(2, layout.num_tokens, 3)
    assert torch.equal(raster[:, layout.permutation][:, layout.inverse], raster)


def test_dtypes_are_the_kernels():
    layout = tile_layout((5, 6, 6))
    assert layout.permutation.dtype == layout.inverse.dtype == torch.int64
    assert layout.start.dtype == layout.length.dtype == torch.int32


def test_same_arguments_share_one_layout_per_device():
    assert tile_layout((5, 6, 6)) is tile_layout([5, 6, 6], tile=(4, 4, 4), device=torch.device("cpu"))
    meta = tile_layout((5, 6, 6), device="meta")
    assert meta.permutation.is_meta and not tile_layout((5, 6, 6)).permutation.is_meta


def test_a_layout_from_inference_mode_serves_training():
    with torch.inference_mode():
        layout = tile_layout((2, 3, 17))
    x = torch.randn(1, layout.num_tokens, 2, requires_grad=True)
    x.index_select(1, layout.permutation).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_fake_tensors_stay_out_of_the_cache():
    with FakeTensorMode():
        assert isinstance(tile_layout((2, 3, 19)).permutation, FakeTensor)
    assert not isinstance(tile_layout((2, 3, 19)).permutation, FakeTensor)


@pytest.mark.parametrize("grid, tile", [((0, 4, 4), (4, 4, 4)), ((4, 4), (4, 4, 4)), ((4, 4, 4), (4, -1, 4))])
def test_impossible_sizes_are_refused(grid, tile):
    with pytest.raises(ValueError, match="must be three positive sizes"):
        tile_layout(grid, tile)


@pytest.mark.parametrize("join", [1, 2, 3, 9])
@pytest.mark.parametrize("run", [None, range(8), range(1, 6), range(7, 8)])
def test_tiles_of_a_run_joined(run, join):
    layout = tile_layout((5, 6, 6))
    tiles = list(run or range(8))
    groups = [tiles[first : first + join] for first in range(0, len(tiles), join)]
    lengths = [sum(layout.length[tile].item() for tile in group) for group in groups]
    start, length, longest = layout.tiles(run, join)
    assert length.tolist() == lengths
    assert start.tolist() == [0, *itertools.accumulate(lengths[:-1])]
    assert start.dtype == length.dtype == torch.int32
    assert longest == join * 64 >= max(lengths)


@pytest.mark.parametrize(
    "run, join", [(range(0), 1), (range(0, 8, 2), 1), (range(5, 9), 1), (range(-1, 3), 1), (None, 0)]
)
def test_impossible_runs_of_tiles_are_refused(run, join):
    with pytest.raises(ValueError, match="contiguous part of the layout's 8 tiles"):
        tile_layout((5, 6, 6)).tiles(run, join)


def valid_share(grid, tile, rows):
    """From the lengths of the tiles: pairs of valid tokens over pairs of whole blocks, all tiles listed."""
    length = tile_layout(grid, tile).length.double()
    return (length.sum() ** 2 / (rows * len(length)) ** 2).item()


def test_the_page_has_the_useful_shares():
    page = (REPOSITORY / "docs" / "kernels.md").read_text(encoding="utf-8").split("## The tile")[1].split("\n## ")[0]
    header, _, *rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    numbers = [tuple(map(int, re.findall(r"\d+", cell)))[:3] for cell in header[1:]]
    assert numbers == [(4, 4, 4), (3, 5, 4), (7, 3, 3), (2, 8, 8)]
    assert [row[0].split(" (")[0] for row in rows] == ["21 × 30 × 52", "21 × 45 × 80", "31 × 22 × 40"]
    for name, *cells in rows:
        grid = tuple(map(int, re.findall(r"\d+", name)))[:3]
        for tile, cell in zip(numbers, cells, strict=True):
            share = valid_share(grid, tile, 128 if tile == (2, 8, 8) else 64)
            assert useful_share(grid, tile) == pytest.approx(share, rel=1e-12) == pytest.approx(float(cell), abs=5e-4)


@pytest.mark.parametrize(
    ("grid", "tile"),
    [
        ((21, 30, 52), (3, 5, 4)),
        ((21, 45, 80), (3, 5, 4)),
        ((31, 22, 40), (4, 4, 4)),
        ((16, 28, 52), (4, 4, 4)),
        ((3, 10, 4), (3, 5, 4)),
        ((5, 6, 6), (4, 4, 4)),  # both have 8 tiles
        ((1, 1, 1), (4, 4, 4)),
    ],
)
def test_the_better_tile_of_two(grid, tile):
    assert best_tile(grid) == tile
    assert useful_share(grid, tile) >= max(useful_share(grid, other) for other in (DEFAULT_TILE, (3, 5, 4)))
