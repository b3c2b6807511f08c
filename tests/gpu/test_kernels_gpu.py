"""The Triton kernels on a GPU: the definition in fp64, twins, dense attention at full size, bits and compilations.

Needs torch, triton and pytest only. Kernels run with their first candidate, so that a sweep compiles each once; that
all candidates agree is a test of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

# Before CUDA starts: deterministic mode refuses matrix products without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import jvp_oracle
import pytest
import torch
import torch.nn.functional as F
from titan_kernels import (
    add_coarse,
    attention_jvp,
    branches,
    coarse_branch,
    ops,
    reference,
    tile_layout,
    video_sparse_attention,
)
from vsa_oracle import GRIDS, NAMES, Oracle, error, random_inputs, run

triton = pytest.importorskip("triton")
from titan_kernels import tuning  # noqa: E402
from titan_kernels.transpose_lists import transpose_lists  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
WAN_480P = (21, 30, 52)
WAN_720P = (21, 45, 80)


@pytest.fixture(autouse=True)
def first_candidates() -> Iterator[None]:
    with tuning.untimed():
        yield


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New buffers hold NaN or the largest integer, and operators that are not deterministic raise."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1, device="cuda").isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(grid, topk, dtype, *, heads, head_dim, scale=1.0, batch=1, join=1):
    def attention(q, k, v, layout, topk, gate):
        fine, coarse = branches(q, k, v, layout, topk, tiles_per_list=join)
        return add_coarse(fine, coarse, gate, layout.tiles())

    inputs, grad = random_inputs(grid, heads, head_dim, dtype, scale, batch, "cuda")
    oracle, layout = Oracle(grid, tiles_per_list=join, device="cuda"), tile_layout(grid, device="cuda")
    with poisoned_memory():
        actual = run(attention if join > 1 else video_sparse_attention, layout, inputs, grad, topk)
    expected = oracle(inputs, grad, topk)
    tolerance = 5e-3 if scale == 50 and dtype == torch.float32 else TOLERANCE[dtype]
    limit = oracle.limit(inputs, grad, topk, tolerance) if scale > 1 else tolerance
    errors = dict(zip(NAMES, map(error, actual, expected)))
    assert all(x <= limit for x in errors.values()), (topk, heads, head_dim, errors, limit)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [0.1, 1, 7, 50])
@pytest.mark.parametrize("name", GRIDS)
def test_definition_for_every_shape_scale_and_dtype(name, scale, dtype):
    num_tiles = tile_layout(GRIDS[name]).num_tiles
    check(GRIDS[name], num_tiles, dtype, heads=1, head_dim=64, scale=scale)
    check(GRIDS[name], 1 + num_tiles // 2, dtype, heads=2, head_dim=16, scale=scale, batch=2)
    check(GRIDS[name], 1, dtype, heads=12, head_dim=128, scale=scale)


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.8, 0.9, 0.97])
@pytest.mark.parametrize("join", [1, 2])
def test_definition_for_every_sparsity(join, sparsity):
    topk = max(1, round((1 - sparsity) * tile_layout((9, 9, 15)).num_tiles))
    check((9, 9, 15), topk, torch.bfloat16, heads=3, head_dim=128, join=join)


def test_definition_for_a_head_dim_that_is_no_power_of_two():
    check(GRIDS["three axes ragged"], 3, torch.bfloat16, heads=3, head_dim=80)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("join", [1, 2])
@pytest.mark.parametrize("index", [0, 1])
def test_all_candidates_agree(index, join, dtype, monkeypatch):
    kept = tuning.candidates

    def only_one(*arguments, **others):
        candidates = kept(*arguments, **others)
        return [candidates[min(index, len(candidates) - 1)]]

    monkeypatch.setattr(tuning, "candidates", only_one)
    check((9, 9, 15), 7, dtype, heads=3, head_dim=128, join=join)


@pytest.mark.parametrize("join", [1, 2])
def test_two_runs_give_the_same_bits(join):
    layout = tile_layout((13, 18, 30), device="cuda")
    inputs, grad = random_inputs(layout.grid, 4, 128, torch.bfloat16, device="cuda")

    def attention(q, k, v, layout, topk, gate):
        fine, coarse = branches(q, k, v, layout, topk, tiles_per_list=join)
        return add_coarse(fine, coarse, gate, layout.tiles())

    first, second = (run(attention, layout, inputs, grad, 16) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("num_tiles", [1, 33, 624, 1440, 4000, 16384])
def test_lists_equal_the_twins_index_for_index(num_tiles):
    scores = torch.randn(1, 3, 64, num_tiles, device="cuda")
    few_values = torch.randint(-3, 4, (1, 3, 64, num_tiles), device="cuda").float()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-45, -1e-45], device="cuda")
    for rows in (scores, few_values, special[torch.randint(8, (1, 3, 64, num_tiles), device="cuda")]):
        for topk in sorted({1, -(-num_tiles // 10), -(-num_tiles // 2), num_tiles}):
            with poisoned_memory():
                actual = ops.block_topk(rows, topk)
            assert torch.equal(actual, reference.block_topk(rows, topk)), topk


@pytest.mark.parametrize("num_tiles, topk", [(1, 1), (33, 33), (455, 46), (1260, 126), (1260, 1)])
def test_transposed_lists_equal_a_stable_sort(num_tiles, topk):
    lists = reference.block_topk(torch.randn(2, 12, num_tiles, num_tiles, device="cuda"), topk)
    with poisoned_memory():
        actual = transpose_lists(lists, num_tiles)
    assert all(map(torch.equal, actual, reference.transpose_lists(lists, num_tiles)))


def test_transposed_lists_can_be_captured_in_a_graph():
    lists = reference.block_topk(torch.randn(1, 2, 60, 60, device="cuda"), 6)
    transpose_lists(lists, 60)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = transpose_lists(lists, 60)
    lists.copy_(reference.block_topk(torch.randn(1, 2, 60, 60, device="cuda"), 6))
    graph.replay()
    assert all(map(torch.equal, captured, reference.transpose_lists(lists, 60)))


@pytest.mark.parametrize("scale, limit", [(0.1, 2e-5), (1, 2e-5), (7, 1e-4), (50, 1e-3)])
def test_the_coarse_branch_of_16_bit_models_is_all_but_exact(scale, limit):
    """The limits are five times what emulated products of bf16 parts give (docs/kernels.md)."""
    layout = tile_layout((9, 13, 18), device="cuda")
    (q, k, v, _), _ = random_inputs(layout.grid, 3, 128, torch.bfloat16, scale, device="cuda")
    tiles = layout.tiles()
    pooled = ops.tile_pool(q, k, v, tiles, tiles)
    by_head = (x.transpose(1, 2).double() for x in pooled)
    expected = F.scaled_dot_product_attention(*by_head).transpose(1, 2)
    assert error(coarse_branch(q, k, v, layout), expected) < limit


@pytest.mark.parametrize("head_dim, dtype", [(128, torch.bfloat16), (64, torch.float16)])
def test_all_tiles_are_dense_attention_at_full_size(head_dim, dtype):
    layout = tile_layout(WAN_480P, device="cuda")
    inputs, grad = random_inputs(layout.grid, 2, head_dim, dtype, device="cuda")
    inputs = inputs[:3]

    def dense(q, k, v, layout, topk):
        by_head = (x.float().transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*by_head).transpose(1, 2)

    with poisoned_memory():
        actual = run(video_sparse_attention, layout, inputs, grad, layout.num_tiles)
    expected = run(dense, layout, inputs, grad.float(), 0)
    errors = [error(one, other.double()) for one, other in zip(actual, expected)]
    assert max(errors) < TOLERANCE[dtype], errors


def test_offsets_beyond_31_bits():
    """The last tiles of the last batch of tensors with more than 2**31 elements, against their rows of the masks."""
    heads, batch, head_dim = 40, 6, 128
    layout = tile_layout(WAN_720P, device="cuda")
    num_elements = batch * layout.num_tokens * heads * head_dim
    if num_elements * 2 * 10 > torch.cuda.get_device_properties("cuda").total_memory:
        pytest.skip("needs 46 GB of GPU memory")
    assert num_elements > 2**31
    q, k, v = (torch.randn(batch, layout.num_tokens, heads, head_dim, device="cuda").bfloat16() for _ in range(3))
    tiles = layout.tiles()
    pooled_q, pooled_k, _ = ops.tile_pool(q, k, v, tiles, tiles)
    scores = torch.einsum("nhd,thd->hnt", pooled_q[-1, -2:], pooled_k[-1]) / head_dim**0.5
    lists = ops.block_topk(torch.rand(batch, heads, layout.num_tiles, layout.num_tiles, device="cuda"), 4)
    lists[-1, :, -2:] = reference.block_topk(scores, 4)
    out, _ = ops.vsa_forward(q, k, v, lists, tiles, tiles)
    first = layout.start[-2].item()
    chosen = torch.zeros(heads, 2, layout.num_tiles, dtype=torch.bool, device="cuda")
    chosen.scatter_(-1, lists[-1, :, -2:].long(), True)
    mask = chosen.repeat_interleave(layout.length[-2:].long(), 1).repeat_interleave(layout.length.long(), 2)
    for head in (0, heads - 1):
        one = (x[-1, :, head].double() for x in (q[:, first:], k, v))
        expected = F.scaled_dot_product_attention(*(x[None] for x in one), attn_mask=mask[head])[0]
        assert error(out[-1, first:, head], expected) < TOLERANCE[q.dtype]
    mean = v[-1, first:][-layout.length[-1].item() :, -1].double().mean(0)
    assert error(ops.tile_pool(q, k, v, tiles, tiles)[2][-1, -1, -1], mean) < 1e-5


def test_a_schedule_compiles_once(monkeypatch):
    """30 sparsities: whatever compiles at the first of them serves the others."""
    layout = tile_layout((13, 18, 30), device="cuda")
    inputs, grad = random_inputs(layout.grid, 2, 128, torch.bfloat16, device="cuda")
    compiled: list[str] = []

    def note(*, repr: str, **others: object) -> None:
        compiled.append(repr)

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    for step in range(30):
        run(video_sparse_attention, layout, inputs, grad, layout.num_tiles - step * (layout.num_tiles - 1) // 29)
        if step == 0:
            assert len(compiled) == len(set(compiled))
            compiled.clear()
    assert not compiled


def test_the_timed_choice_of_candidates_gives_the_same_result():
    inputs, grad = random_inputs((9, 9, 15), 4, 128, torch.bfloat16, device="cuda")
    layout = tile_layout((9, 9, 15), device="cuda")
    with tuning.timing(True):
        timed = run(video_sparse_attention, layout, inputs, grad, 4)
    untimed = run(video_sparse_attention, layout, inputs, grad, 4)
    errors = [error(one, other.double()) for one, other in zip(timed, untimed)]
    assert max(errors) < TOLERANCE[torch.bfloat16], errors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [0.1, 1, 50])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_the_derivative_of_dense_attention(head_dim, scale, dtype):
    tensors = jvp_oracle.random_inputs(300, 500, 2, head_dim, dtype, scale, device="cuda")
    with poisoned_memory():
        jvp_oracle.check(attention_jvp, tensors, scale)
        jvp_oracle.check(attention_jvp, tensors, scale, still=True)


@pytest.mark.parametrize("index", range(len(tuning.KEPT["jvp", 128, 16])))
def test_the_derivative_by_every_candidate(index, monkeypatch):
    kept = tuning.candidates
    monkeypatch.setattr(tuning, "candidates", lambda *arguments, **others: [kept(*arguments, **others)[index]])
    jvp_oracle.check(attention_jvp, jvp_oracle.random_inputs(300, 500, 2, 128, torch.bfloat16, device="cuda"), 1)
