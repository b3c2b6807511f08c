"""Video sparse attention on CPUs: twins and operators against the definition, and what PyTorch sees of the latter."""

from __future__ import annotations

import runpy

import pytest
import titan_kernels
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from runs import REPOSITORY
from titan_kernels import branches, ops, reference, tile_layout, video_sparse_attention
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from vsa_oracle import GRIDS, NAMES, Oracle, error, random_inputs, run

PUBLIC = {"operators": video_sparse_attention, "twin": reference.video_sparse_attention}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
RAGGED = (5, 6, 7)
KERNELS = REPOSITORY / "kernels"
OPERATORS = torch.ops.titan_kernels


def check(attention, grid, topk, dtype, *, heads=2, head_dim=16, scale=1.0, batch=1, gated=True, tile=(4, 4, 4)):
    inputs, grad = random_inputs(grid, heads, head_dim, dtype, scale=scale, batch=batch)
    inputs = inputs[: 4 if gated else 3]
    oracle = Oracle(grid, tile)
    expected = oracle(inputs, grad, topk)
    actual = run(attention, tile_layout(grid, tile), inputs, grad, topk)
    tolerance = 5e-3 if scale == 50 and dtype == torch.float32 else TOLERANCE[dtype]
    limit = oracle.limit(inputs, grad, topk, tolerance) if scale > 1 else tolerance
    errors = dict(zip(NAMES, map(error, actual, expected)))
    assert all(x <= limit for x in errors.values()), (topk, heads, head_dim, errors, limit)
    assert [x.dtype for x in actual] == [dtype] * len(actual)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [0.1, 1, 7, 50])
@pytest.mark.parametrize("name", GRIDS)
def test_definition_for_every_shape_scale_and_dtype(name, scale, dtype):
    half = 1 + tile_layout(GRIDS[name]).num_tiles // 2
    check(video_sparse_attention, GRIDS[name], half, dtype, heads=1, head_dim=64, scale=scale, batch=2)
    check(video_sparse_attention, GRIDS[name], 1, dtype, heads=2, head_dim=128, scale=scale)


@pytest.mark.parametrize("attention", PUBLIC.values(), ids=PUBLIC)
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.8, 0.9, 0.97])
def test_definition_for_every_sparsity(sparsity, attention):
    num_tiles = tile_layout((9, 9, 11)).num_tiles
    topk = max(1, -(-round(100 * (1 - sparsity)) * num_tiles // 100))
    check(attention, (9, 9, 11), topk, torch.float32, heads=1, gated=sparsity != 0.5)


def test_definition_for_many_heads_other_tiles_and_an_odd_head_dim():
    check(video_sparse_attention, RAGGED, 3, torch.float32, heads=12)
    check(video_sparse_attention, RAGGED, 5, torch.float32, tile=(2, 3, 5))
    check(video_sparse_attention, RAGGED, 2, torch.bfloat16, head_dim=80)


TILES = ((4, 4, 4), (3, 5, 4), (7, 3, 3), (2, 8, 8))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
def test_definition_for_every_tile(tile, ragged):
    grid = tuple(size * (2 - ragged) + 1 * ragged for size in tile)
    check(video_sparse_attention, grid, 3, torch.float32, heads=1, tile=tile)


@pytest.mark.nightly
@pytest.mark.parametrize("attention", PUBLIC.values(), ids=PUBLIC)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [0.1, 1, 7, 50])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_definition_for_every_tile_scale_and_dtype(tile, scale, dtype, attention):
    for more in ((0, 0, 0), (1, 0, 0), (0, 1, -1), (1, 2, 1)):
        grid = tuple(2 * size + extra for size, extra in zip(tile, more))
        num_tiles = tile_layout(grid, tile).num_tiles
        for topk in (1, 1 + num_tiles // 2, num_tiles):
            check(attention, grid, topk, dtype, heads=1, head_dim=64, scale=scale, tile=tile)


@pytest.mark.parametrize("attention", PUBLIC.values(), ids=PUBLIC)
def test_gradients_are_the_derivatives(attention):
    layout = tile_layout((3, 3, 5), (2, 2, 4))
    inputs, _ = random_inputs(layout.grid, 2, 16, torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: attention(*x[:3], layout, 3, x[3]), leaves, fast_mode=True)


@pytest.mark.parametrize("attention", PUBLIC.values(), ids=PUBLIC)
def test_all_tiles_and_a_closed_gate_are_dense_attention(attention):
    layout = tile_layout(RAGGED)
    (q, k, v, _), _ = random_inputs(RAGGED, 3, 64, torch.float32)
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    sparse = attention(q, k, v, layout, layout.num_tiles, torch.zeros_like(q))
    torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-6)


def test_of_equal_scores_the_lower_tile_wins():
    scores = torch.tensor([0.0, -0.0, 1.0, -torch.inf, 1.0, torch.nan, 0.0]).view(1, 1, 1, -1)
    chosen = [ops.block_topk(scores, topk).flatten().tolist() for topk in range(1, 8)]
    order = [5, 2, 4, 0, 1, 6, 3]
    assert chosen == [sorted(order[:topk]) for topk in range(1, 8)]


@pytest.mark.parametrize("topk", [1, 4, 8])
def test_joined_tiles_share_the_choice_of_their_common_mean(topk):
    (q, k, v, gate), grad = random_inputs(RAGGED, 2, 16, torch.float64)
    layout = tile_layout(RAGGED)

    def joined(q, k, v, layout, topk, gate):
        fine, coarse = branches(q, k, v, layout, topk, tiles_per_list=3)
        return titan_kernels.add_coarse(fine, coarse, gate, layout.tiles())

    expected = Oracle(RAGGED, tiles_per_list=3)((q, k, v, gate), grad, topk)
    actual = run(joined, layout, (q, k, v, gate), grad, topk)
    assert max(map(error, actual, expected)) < 1e-12


@pytest.mark.parametrize("tiles_per_list", [1, 2])
def test_a_run_of_query_tiles_gives_its_rows_of_the_whole(tiles_per_list):
    layout, run_of_tiles = tile_layout(RAGGED), range(2, 6)
    first, last = layout.start[run_of_tiles.start], layout.start[run_of_tiles.stop]
    (q, k, v, _), grad = random_inputs(RAGGED, 2, 16, torch.float64)

    def with_gradients(queries: range | None, rows: slice, tiles: slice) -> list[Tensor]:
        leaves = [
            x.requires_grad_() for x in (q[:, first:last].clone() if queries else q.clone(), k.clone(), v.clone())
        ]
        fine, coarse = branches(*leaves, layout, 3, queries=queries, tiles_per_list=tiles_per_list)
        loss = (fine[:, rows] * grad[:, first:last]).sum() + coarse[:, tiles].square().sum()
        dq, dk, dv = torch.autograd.grad(loss, leaves)
        return [fine[:, rows], coarse[:, tiles], dq[:, rows], dk, dv]

    part = with_gradients(run_of_tiles, slice(None), slice(None))
    whole = with_gradients(None, slice(first, last), slice(run_of_tiles.start, run_of_tiles.stop))
    for actual, expected in zip(part, whole):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_two_runs_give_the_same_bits():
    inputs, grad = random_inputs(RAGGED, 3, 32, torch.bfloat16)
    layout = tile_layout(RAGGED)
    first, second = (run(video_sparse_attention, layout, inputs, grad, 3) for _ in range(2))
    assert all(map(torch.equal, first, second))


def operator_arguments(by_head: bool) -> dict[str, tuple]:
    """For each operator; `by_head` makes the tensors of tokens views of [B, H, L, D]."""
    layout = tile_layout((3, 4, 6))
    tiles = layout.tiles()
    inputs, grad = random_inputs((3, 4, 6), 2, 16, torch.float32, batch=2)
    if by_head:
        grad, *inputs = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (grad, *inputs))
    q, k, v, gate = (x.requires_grad_() for x in inputs)
    pooled = [x.detach().requires_grad_() for x in reference.tile_pool(q, k, v, tiles, tiles)]
    lists = reference.block_topk(torch.randn(2, 2, layout.num_tiles, layout.num_tiles), 1)
    out, lse = (x.detach() for x in reference.vsa_forward(q, k, v, lists, tiles, tiles))
    return {
        "tile_pool": (q, k, v, *tiles, *tiles),
        "tile_pool_backward": (*pooled, *tiles, *tiles, q.shape[1], k.shape[1], torch.float32),
        "block_topk": (torch.randn(2, 2, 2, 5), 3),
        "vsa_forward": (q, k, v, lists, *tiles, *tiles),
        "vsa_backward": (grad, q, k, v, out, lse, lists, *tiles, *tiles),
        "gated_add": (q, pooled[0], gate, *tiles),
        "gated_add_backward": (grad, pooled[0], gate, *tiles),
    }


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("name", operator_arguments(False))
def test_operators_keep_what_they_declare(name, by_head):
    arguments = operator_arguments(by_head)[name]
    if name.endswith("backward"):
        arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    torch.library.opcheck(getattr(OPERATORS, name).default, arguments)


def test_flops_are_counted_by_formula():
    layout, heads, head_dim, topk = tile_layout((8, 4, 8)), 3, 16, 2
    inputs, grad = random_inputs(layout.grid, heads, head_dim, torch.float32)
    with FlopCounterMode(display=False) as counter:
        run(video_sparse_attention, layout, inputs, grad, topk)
    product = 2 * heads * layout.num_tokens * (topk * 64) * head_dim
    coarse_product = 2 * heads * layout.num_tiles * layout.num_tiles * head_dim
    counts = counter.get_flop_counts()["Global"]
    assert counts[OPERATORS.vsa_forward] == 2 * (product + coarse_product)
    assert counts[OPERATORS.vsa_backward] == 5 * (product + coarse_product)


def test_a_schedule_of_topk_compiles_few_graphs():
    layout = tile_layout(RAGGED)
    inputs, grad = random_inputs(RAGGED, 2, 16, torch.float32)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(video_sparse_attention, backend=counter, fullgraph=True)
    for topk in (8, 7, 6, 5, 4, 3, 2, 1, 4, 8):
        graphs, eager = (run(f, layout, inputs, grad, topk) for f in (compiled, video_sparse_attention))
        assert all(map(torch.equal, graphs, eager))
    # One for the first number, one for all others, and one for 1, which PyTorch never treats as a symbol.
    assert counter.frame_count == 3


class CallCounter(TorchDispatchMode):
    """Counts the calls that reach an operator's body."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "titan_kernels":
            self.calls[func._opname] = self.calls.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


def test_checkpointing_can_keep_the_selection_and_the_attention():
    layout = tile_layout(RAGGED)
    inputs, grad = random_inputs(RAGGED, 2, 16, torch.float32)
    kept = [OPERATORS.block_topk.default, OPERATORS.vsa_forward.default]

    def checkpointed(q, k, v, layout, topk, gate):
        def attention(q, k, v, gate):
            return video_sparse_attention(q, k, v, layout, topk, gate).sin()

        context = lambda: create_selective_checkpoint_contexts(kept)  # noqa: E731
        return checkpoint(attention, q, k, v, gate, use_reentrant=False, context_fn=context)

    with CallCounter() as counter:
        actual = run(checkpointed, layout, inputs, grad, 3)
    # One forward each of the fine and the coarse branch; pooling alone is computed again.
    assert counter.calls["block_topk"] == 1 and counter.calls["vsa_forward"] == 2 and counter.calls["tile_pool"] == 2
    expected = run(lambda *x: video_sparse_attention(*x).sin(), layout, inputs, grad, 3)
    assert all(map(torch.equal, actual, expected))


def test_nothing_as_large_as_the_scores_is_saved_for_backward():
    # 4096 tokens in 1024 tiles: a score matrix would be many times larger than q.
    layout, topk = tile_layout((16, 16, 16), (1, 2, 2)), 2
    inputs, _ = random_inputs(layout.grid, 1, 16, torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        video_sparse_attention(*leaves[:3], layout, topk, leaves[3])
    # The largest is the coarse branch's own list of blocks, one row for 64 query tiles.
    assert max(x.numel() for x in saved) == inputs[0].numel()
    assert max(x.numel() for x in saved if x.dtype == torch.int32) == layout.num_tiles * topk


BAD_INPUT = {
    "q has 8 tokens": lambda q, layout: (q[:, :8], q[:, :8], q[:, :8], layout, 1),
    "k is torch.float32": lambda q, layout: (q, q[:, :, :1], q, layout, 1),
    "v is torch.float16": lambda q, layout: (q, q, q.half(), layout, 1),
    "gate is torch.float32": lambda q, layout: (q, q, q, layout, 1, q[0]),
    "topk = 0 must be between 1": lambda q, layout: (q, q, q, layout, 0),
    "topk = 3 must be between 1 and the layout's 2 tiles": lambda q, layout: (q, q, q, layout, 3),
    "q has head dim 8": lambda q, layout: (q[..., :8], q[..., :8], q[..., :8], layout, 1),
    "q is torch.int64": lambda q, layout: (q.long(), q.long(), q.long(), layout, 1),
    "layout is on meta": lambda q, layout: (q, q, q, tile_layout(layout.grid, device="meta"), 1),
}


@pytest.mark.parametrize("sentence", BAD_INPUT)
def test_bad_input_is_named(sentence):
    layout = tile_layout((4, 4, 5))
    with pytest.raises(ValueError, match=sentence):
        video_sparse_attention(*BAD_INPUT[sentence](torch.zeros(1, 80, 2, 16), layout))


def test_the_example_runs(capsys):
    runpy.run_path(str(KERNELS / "example.py"), run_name="__main__")
    assert "sparsity 0.9" in capsys.readouterr().out


def test_kernels_know_nothing_of_titan_distill():
    imports = [line for path in KERNELS.rglob("*.py") for line in path.read_text().splitlines() if "import" in line]
    assert imports and not [line for line in imports if "titan_distill" in line]
