"""Shards of tokens over sequence ranks: whole tiles, near-even runs, padding that comes and goes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from titan_kernels import tile_layout

from titan_distill.attention.sparse import SparseAttention
from titan_distill.config.degrees import Degrees
from titan_distill.config.sections import SparseAttentionConfig
from titan_distill.models.wan.config import FLAVORS
from titan_distill.models.wan.parallelize import check_degrees
from titan_distill.parallelisms.sequence import TokenShards, choose_method, token_bounds

GRIDS = [(5, 6, 6), (21, 30, 52), (21, 45, 80), (31, 22, 40)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_rank_has_a_run_of_whole_tiles(grid: tuple[int, int, int], num_ranks: int) -> None:
    layout = tile_layout(grid)
    bounds = token_bounds(layout, num_ranks)
    assert bounds[0] == 0 and bounds[-1] == layout.num_tokens and len(bounds) == num_ranks + 1
    assert set(bounds[:-1]) <= set(layout.start.tolist())
    assert all(low < high for low, high in pairwise(bounds))


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("grid", GRIDS[1:])
def test_real_grids_are_padded_by_less_than_a_tile_a_rank(grid: tuple[int, int, int], num_ranks: int) -> None:
    shards = TokenShards.of(tile_layout(grid), num_ranks)
    assert shards.padded_length - sum(shards.lengths) / num_ranks < 64


def test_as_many_ranks_as_tiles_have_one_each() -> None:
    layout = tile_layout((5, 6, 6))
    assert TokenShards.of(layout, 8).lengths == layout.length.tolist()
    with pytest.raises(ValueError, match="8 tiles of tokens can't be shared by 9"):
        token_bounds(layout, 9)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("grid", [(5, 5, 7), *GRIDS])
def test_ranks_do_not_part_tiles_that_share_a_list(grid: tuple[int, int, int], num_ranks: int) -> None:
    layout = tile_layout(grid)
    shards = TokenShards.of(layout, num_ranks, join=2)
    whole, runs = layout.tiles(join=2), [shards.tile_run(rank) for rank in range(num_ranks)]
    starts = [start + shards.bounds[rank] for rank, run in enumerate(runs) for start in layout.tiles(run, 2).start]
    assert starts == whole.start.tolist()
    assert torch.equal(torch.cat([layout.tiles(run, 2).length for run in runs]), whole.length)
    assert [shards.bounds[rank + 1] - shards.bounds[rank] for rank in range(num_ranks)] == [
        layout.length[run.start : run.stop].sum() for run in runs
    ]


def test_pairs_move_a_bound_and_limit_the_ranks() -> None:
    layout = tile_layout((5, 5, 7))
    assert TokenShards.of(layout, 2).tiles.bounds == (0, 1, 8)
    assert TokenShards.of(layout, 2, join=2).tiles.bounds == (0, 2, 8)
    with pytest.raises(ValueError, match="4 groups of 2 tiles of tokens can't be shared by 5 sequence ranks; lower"):
        token_bounds(layout, 5, join=2)


@pytest.mark.parametrize(("num_ranks", "multiple"), [(1, 1), (1, 7), (3, 1), (3, 4)])
def test_padding_comes_and_goes_with_its_gradient(num_ranks: int, multiple: int) -> None:
    layout = tile_layout((5, 6, 6))
    shards = TokenShards.of(layout, num_ranks, multiple)
    x_BLD = torch.randn(2, 180, 3, dtype=torch.float64, requires_grad=True)
    padded = shards.pad(x_BLD, 1)
    assert padded.shape[1] == num_ranks * shards.padded_length and shards.padded_length % multiple == 0
    runs = padded.chunk(num_ranks, dim=1)
    for run, start, length in zip(runs, shards.bounds, shards.lengths, strict=False):
        assert torch.equal(run[:, :length], x_BLD[:, start : start + length])
        assert not run[:, length:].any()
    weights = torch.randn_like(x_BLD)
    (gradient,) = torch.autograd.grad((shards.unpad(padded, 1) * weights).sum(), x_BLD)
    assert torch.equal(gradient, weights)


@pytest.mark.parametrize(
    ("heads", "sequence", "tensor", "method"),
    [(12, 4, 1, "ulysses"), (12, 8, 1, "all_gather"), (40, 8, 1, "ulysses"), (40, 4, 4, "all_gather")],
)
def test_method_follows_the_heads(heads: int, sequence: int, tensor: int, method: str) -> None:
    assert choose_method(heads, sequence, tensor) == method


@pytest.mark.parametrize(
    ("flavor", "degrees", "method", "sentence"),
    [
        ("1.3B", Degrees(tensor=8), "auto", "tensor = 8 does not divide the 12 attention heads; set it to 6 or 12"),
        ("1.3B", Degrees(sequence=8), "ulysses", "divide the 12 attention heads; set sequence to 6 or 12, or sequence"),
        ("14B", Degrees(sequence=512), "auto", "tiles of 5 × 30 × 52 tokens; set it to 208 or less"),
    ],
)
def test_degrees_that_do_not_fit_are_named(flavor: str, degrees: Degrees, method: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_degrees("roles.x", FLAVORS[flavor], degrees, method, (5, 30, 52))
    assert str(caught.value).startswith("roles.x: ") and sentence in str(caught.value)


def test_lists_that_tiles_share_limit_gathering_ranks() -> None:
    core, grid = SparseAttention(SparseAttentionConfig(tiles_per_list=2)), (5, 5, 7)
    check_degrees("roles.x", FLAVORS["14B"], Degrees(sequence=8), "ulysses", grid, core)
    with pytest.raises(ValueError, match=r"8 ranks can't share the 4 groups of 2 tiles .* set it to 4 or less"):
        check_degrees("roles.x", FLAVORS["14B"], Degrees(sequence=8), "all_gather", grid, core)


def test_degrees_that_fit_pass() -> None:
    check_degrees("roles.x", FLAVORS["1.3B"], Degrees(sequence=8), "auto", (21, 30, 52))
    check_degrees("roles.x", FLAVORS["14B"], Degrees(sequence=2, tensor=4), "ulysses", (21, 30, 52))
