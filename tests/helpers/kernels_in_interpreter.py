"""The Triton kernels in Triton's interpreter, against their twins and the definition; see test_sparse_kernels_small.

Every output buffer starts as NaN, or the largest integer, so an element that no program writes shows.
The interpreter multiplies bfloat16 as if it were integers; fp32 and fp16 are what it can check.
"""

from __future__ import annotations

import os
from dataclasses import replace

import jvp_oracle
import pytest
import torch
from philox_kernel import KEYS, check_bits, check_published_words
from titan_kernels import (
    add_coarse,
    branches,
    jvp,
    reference,
    tile_layout,
    triton_kernels,
    tuning,
    video_sparse_attention,
)
from titan_kernels.layout import Tiles
from torch import Tensor
from vsa_oracle import NAMES, Oracle, error, random_inputs, run

RAGGED = (3, 6, 5)
LONG_TILE = (8, 4, 4)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}


@pytest.fixture(autouse=True)
def poisoned_memory():
    assert os.environ.get("TRITON_INTERPRET") == "1", "start these with TRITON_INTERPRET=1"
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan() and torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def strided(x: Tensor) -> Tensor:
    """The same numbers, with heads outside tokens in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def tokens_and_tiles(grid, tile, head_dim, dtype, heads=2) -> tuple[list[Tensor], Tensor, Tiles, Tiles]:
    """q of the second tile on, k, v, gate and a gradient like q, with the tiles of q and of k."""
    layout = tile_layout(grid, tile)
    (q, k, v, gate), grad = random_inputs(grid, heads, head_dim, dtype, batch=2)
    first = layout.start[1]
    queries = range(1, layout.num_tiles)
    return (
        [strided(q)[:, first:], k, strided(v), gate[:, first:]],
        grad[:, first:],
        layout.tiles(queries),
        layout.tiles(),
    )


@pytest.mark.parametrize(
    "tile, head_dim, dtype",
    [((4, 4, 4), 16, torch.float32), ((2, 3, 4), 80, torch.float16), (LONG_TILE, 128, torch.float16)],
)
def test_pooling_and_gating(tile, head_dim, dtype):
    grid = (9, 5, 4) if tile == LONG_TILE else RAGGED
    (q, k, v, gate), grad, q_tiles, kv_tiles = tokens_and_tiles(grid, tile, head_dim, dtype)
    means = reference.tile_pool(q, k, v, q_tiles, kv_tiles)
    calls = {
        "tile_pool": (q, k, v, q_tiles, kv_tiles),
        "tile_pool_backward": (*means, q_tiles, kv_tiles, q.shape[1], k.shape[1], dtype),
        "gated_add": (q, means[0], gate, q_tiles),
        "gated_add_backward": (grad, means[0], gate, q_tiles),
    }
    for name, arguments in calls.items():
        actual, expected = (getattr(kernels, name)(*arguments) for kernels in (triton_kernels, reference))
        torch.testing.assert_close({name: actual}, {name: expected})


@pytest.mark.parametrize("num_tiles", [1, 8, 33, 2100])
def test_lists_equal_the_twins_index_for_index(num_tiles):
    few_values = torch.randint(-2, 3, (1, 1, 1, num_tiles)).float()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-45, -1e-45])
    scores = torch.cat(
        (
            torch.randn(1, 1, 1, num_tiles) * 1e3,
            few_values,
            few_values * torch.inf,  # NaN where it was 0
            special[torch.randint(8, (1, 1, 2, num_tiles))],
        ),
        dim=2,
    )
    for topk in {1, -(-num_tiles // 2), max(1, num_tiles - 1), num_tiles}:
        actual = triton_kernels.block_topk(scores, topk)
        assert torch.equal(actual, reference.block_topk(scores, topk)), topk


@pytest.mark.parametrize(
    "queries, tiles, topk, chunk", [(1, 1, 1, 256), (3, 9, 1, 256), (5, 7, 7, 16), (9, 50, 6, 32), (2, 150, 140, 256)]
)
def test_transposed_lists_equal_a_stable_sort(queries, tiles, topk, chunk, monkeypatch):
    """With lists that leave out the first tile where they can, and crowd others; more than one chunk, in two pieces."""
    from titan_kernels import transpose_lists

    monkeypatch.setattr(transpose_lists, "CHUNK", chunk)
    scores = torch.randn(2, 1, queries, tiles) + 2 * torch.randn(2, 1, 1, tiles)
    if topk < tiles:
        scores[..., 0] = -torch.inf
    lists = reference.block_topk(scores, topk)
    repeated = torch.randint(tiles, lists.shape, dtype=torch.int32)
    for each in (lists, repeated)[: 1 + (topk == 6)]:
        actual, expected = (kernels.transpose_lists(each, tiles) for kernels in (triton_kernels, reference))
        assert [(x.dtype, x.is_contiguous()) for x in actual] == [(torch.int32, True)] * 2
        assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize(
    "head_dim, dtype, topk, join", [(16, torch.float32, 1, 1), (80, torch.float32, 2, 2), (128, torch.float16, 2, 1)]
)
def test_attention_and_its_gradients(head_dim, dtype, topk, join):
    """On a run of query tiles, possibly joined, with strided inputs, and key tiles in no list."""
    (q, k, v, _), grad, _, kv_tiles = tokens_and_tiles(RAGGED, (4, 4, 4), head_dim, dtype)
    layout = tile_layout(RAGGED)
    q_tiles = layout.tiles(range(1, layout.num_tiles), join)
    scores = torch.rand(2, 2, len(q_tiles.start), layout.num_tiles)
    scores[..., 0] = -1  # the first key tile is never chosen
    lists = reference.block_topk(scores, topk)
    forward = (q, k, v, lists, q_tiles, kv_tiles)
    out, lse = reference.vsa_forward(*forward)
    backward = (grad, q, k, v, out, lse, lists, q_tiles, kv_tiles)
    actual = (*triton_kernels.vsa_forward(*forward), *triton_kernels.vsa_backward(*backward))
    expected = (out, lse, *reference.vsa_backward(*backward))
    for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), actual, expected):
        assert one.dtype == other.dtype and error(one, other.double()) < TOLERANCE[dtype], name
    unlisted = layout.length[0]
    assert not actual[3][:, :unlisted].any() and not actual[4][:, :unlisted].any()


@pytest.mark.parametrize("scale", [0.1, 1, 7, 50])
@pytest.mark.parametrize(
    "grid, heads, head_dim, topk, dtype", [((4, 5, 4), 2, 16, 1, torch.float16), ((3, 5, 6), 1, 64, 2, torch.float32)]
)
def test_definition(grid, heads, head_dim, topk, dtype, scale):
    inputs, grad = random_inputs(grid, heads, head_dim, dtype, scale=scale)
    oracle, layout = Oracle(grid), tile_layout(grid)
    expected = oracle(inputs, grad, topk)
    actual = run(video_sparse_attention, layout, inputs, grad, topk)
    tolerance = 5e-3 if scale == 50 and dtype == torch.float32 else TOLERANCE[dtype]
    limit = oracle.limit(inputs, grad, topk, tolerance) if scale > 1 else tolerance
    errors = dict(zip(NAMES, map(error, actual, expected)))
    assert all(x <= limit for x in errors.values()), (errors, limit)


def test_definition_with_joined_tiles():
    def joined(q, k, v, layout, topk, gate):
        fine, coarse = branches(q, k, v, layout, topk, tiles_per_list=2)
        return add_coarse(fine, coarse, gate, layout.tiles())

    inputs, grad = random_inputs(RAGGED, 1, 32, torch.float32)
    expected = Oracle(RAGGED, tiles_per_list=2)(inputs, grad, 2)
    assert max(map(error, run(joined, tile_layout(RAGGED), inputs, grad, 2), expected)) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [0.1, 1, 50])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_the_derivative_of_dense_attention(head_dim, scale, dtype):
    # Ragged blocks of queries and of keys; the second sample's rows lie behind the first's.
    tensors = [strided(x) for x in jvp_oracle.random_inputs(19, 37, 1, head_dim, dtype, scale)]
    jvp_oracle.check(triton_kernels.attention_jvp, tensors, scale)
    jvp_oracle.check(triton_kernels.attention_jvp, tensors, scale, still=True)


@pytest.mark.parametrize("candidate", tuning.KEPT["jvp", 128, 16], ids=str)
def test_the_derivative_by_every_block_size(candidate, monkeypatch):
    sizes, pointers = jvp.block_sizes(candidate, torch.float16), replace(candidate, tma=False)
    monkeypatch.setattr(jvp, "block_sizes", lambda *_: sizes)
    monkeypatch.setattr(tuning, "candidates", lambda *_: [pointers])
    jvp_oracle.check(triton_kernels.attention_jvp, jvp_oracle.random_inputs(150, 170, 1, 16, torch.float16), 1)


def test_random_words_are_the_published_ones():
    check_published_words("cpu")


def test_normals_equal_the_twins_bit_for_bit():
    for num_elements in (0, 1, 2, 3, 6, 2048, 2051):
        check_bits(num_elements, "cpu")
    check_bits(20_000, "cpu", KEYS[1:2])
