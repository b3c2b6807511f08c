"""Blocks compile to one graph for each shape of block, without breaks, and compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

from titan_distill.attention.sparse import SparseAttention
from titan_distill.config.sections import ActivationCheckpointConfig, CompileConfig, Float8Config, SparseAttentionConfig
from titan_distill.models.wan.config import FLAVORS, WanConfig
from titan_distill.models.wan.parallelize import HIGH_PRECISION
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.parallelisms.activation_checkpoint import apply_activation_checkpointing
from titan_distill.parallelisms.compile import compile_blocks
from titan_distill.parallelisms.float8 import apply_float8
from titan_distill.parallelisms.fsdp import FsdpOptions, apply_fsdp

CPU = torch.device("cpu")
ENABLED = CompileConfig(enabled=True)
FULL = ActivationCheckpointConfig(mode="full")
SCALAR, PER_TOKEN = torch.tensor([900.0]), torch.tensor([[900.0, 0.0]]).repeat(1, 16)


class Counting:
    """A compiler that counts graphs and runs them as they are."""

    num_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.num_graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def transformer(
    checkpointing: ActivationCheckpointConfig,
    compiling: CompileConfig,
    backend: Any,
    *,
    config: WanConfig | None = None,
    sparse: SparseAttentionConfig | None = None,
) -> WanTransformer:
    torch.manual_seed(0)
    config = replace(config or FLAVORS["tiny"], sparse_attention=sparse is not None)
    with torch.device("meta"):
        model = WanTransformer(config, None if sparse is None else SparseAttention(sparse))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    apply_activation_checkpointing(model.blocks, checkpointing, selects=sparse is not None)
    compile_blocks(model.blocks, compiling, backend)
    return model


def backward(
    model: WanTransformer, timestep: Tensor, batch_size: int = 1, size: tuple[int, int, int] = (2, 8, 8)
) -> None:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch_size, 16, *size, generator=generator)
    text = torch.randn(batch_size, 7, 64, generator=generator)
    model(latents, timestep.repeat_interleave(batch_size, 0), text).square().mean().backward()


@pytest.mark.parametrize(
    ("checkpointing", "num_shapes"),
    [
        (ActivationCheckpointConfig(), 1),
        (FULL, 1),
        (ActivationCheckpointConfig(mode="selective"), 1),
        # A block that is skipped has no recomputation in its graph, which makes it another one.
        (ActivationCheckpointConfig(mode="full", skip_interval=2), 2),
    ],
    ids=["none", "full", "selective", "skip"],
)
def test_six_blocks_share_one_graph_for_each_form_of_timesteps(
    checkpointing: ActivationCheckpointConfig, num_shapes: int
) -> None:
    counting = Counting()
    model = transformer(checkpointing, ENABLED, counting)
    names = list(transformer(checkpointing, CompileConfig(), counting).state_dict())
    for num_forms, timestep in enumerate((SCALAR, PER_TOKEN), start=1):
        for _ in range(2):
            backward(model, timestep)
        assert counting.num_graphs == num_forms * num_shapes
    assert not counters["graph_break"]
    assert list(model.state_dict()) == names


def test_batch_sizes_soon_cost_no_more_graphs() -> None:
    counting = Counting()
    model = transformer(FULL, ENABLED, counting)
    for batch_size in (2, 3, 4):  # one graph for the first size, at most two on the way to one for all sizes
        backward(model, SCALAR, batch_size)
    num_graphs = counting.num_graphs
    assert num_graphs <= 3
    for batch_size in (5, 6):
        backward(model, SCALAR, batch_size)
    assert counting.num_graphs == num_graphs


@pytest.mark.parametrize(
    "checkpointing",
    [ActivationCheckpointConfig(), FULL, ActivationCheckpointConfig(mode="selective")],
    ids=["none", "full", "selective"],
)
def test_a_schedule_of_thirty_sparsities_costs_a_handful_of_graphs(checkpointing: ActivationCheckpointConfig) -> None:
    """One while attention is dense, at most one for the first sparsity, one for all others, one for a single tile."""
    counting = Counting()
    schedule = SparseAttentionConfig(sparsity=0.99, schedule_rate=0.033, crossover=0.05)
    model = transformer(
        checkpointing, ENABLED, counting, config=replace(FLAVORS["tiny"], num_layers=2), sparse=schedule
    )
    assert model.sparse_attention is not None
    selected = []
    for step in range(31):
        model.sparse_attention.start_step(step)
        backward(model, SCALAR, size=(1, 2, 2 * 127))  # 32 tiles of 4 tokens
        selected.append(model.sparse_attention.num_selected(32))
    assert len(set(selected)) >= 30 and selected[:3] == [32, 32, 30] and selected[-1] == 1
    assert counting.num_graphs <= 4
    assert not counters["graph_break"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_compiled_blocks_follow_a_schedule(backend: str) -> None:
    config, schedule = replace(FLAVORS["tiny"], num_layers=1), SparseAttentionConfig(sparsity=0.6, schedule_rate=0.15)
    schedule = replace(schedule, crossover=0.1)
    plain = transformer(ActivationCheckpointConfig(), CompileConfig(), None, config=config, sparse=schedule)
    compiled = transformer(FULL, ENABLED, backend, config=config, sparse=schedule)
    for step in range(5):
        for model in (plain, compiled):
            assert model.sparse_attention is not None
            model.sparse_attention.start_step(step)
            model.zero_grad()
            backward(model, SCALAR, size=(5, 10, 14))
        for (name, expected), found in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            assert expected.grad is not None and found.grad is not None
            assert (found.grad - expected.grad).norm() <= 1e-5 * expected.grad.norm(), name
    assert 2 <= counters["stats"]["unique_graphs"] <= 3


def test_blocks_of_another_shape_get_a_graph_of_their_own() -> None:
    counting = Counting()
    for config in (FLAVORS["tiny"], replace(FLAVORS["tiny"], ffn_dim=256)):
        backward(transformer(FULL, ENABLED, counting, config=config), SCALAR)
    assert counting.num_graphs == 2


@pytest.mark.parametrize("all_gather", [False, True])
def test_float8_under_fsdp_shares_one_graph(all_gather: bool) -> None:
    counting = Counting()
    with torch.device("meta"):
        model = WanTransformer(FLAVORS["tiny"])
    float8 = Float8Config(enabled=True, emulate=True, min_features=16, all_gather=all_gather)
    apply_float8(model, float8, high_precision=HIGH_PRECISION, device=CPU)
    apply_activation_checkpointing(model.blocks, FULL)
    compile_blocks(model.blocks, ENABLED, counting)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
    apply_fsdp(model, list(model.blocks), mesh, FsdpOptions(torch.float32))
    model.to_empty(device="cpu")
    model.reset_parameters()
    backward(model, SCALAR)
    dist.destroy_process_group()
    assert counting.num_graphs == 1
    assert not counters["graph_break"]


def test_a_graph_break_is_an_error() -> None:
    class Breaking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            print(x.sum().item())
            torch._dynamo.graph_break()
            return x

    block = Breaking()
    compile_blocks([block], ENABLED, Counting())
    with pytest.raises(torch._dynamo.exc.Unsupported):
        block(torch.ones(1))


@pytest.mark.parametrize(
    "checkpointing",
    [pytest.param(FULL, marks=pytest.mark.nightly), ActivationCheckpointConfig(mode="selective")],
    ids=["full", "selective"],
)
def test_inductor_computes_the_same_gradients(checkpointing: ActivationCheckpointConfig) -> None:
    config = replace(FLAVORS["tiny"], num_layers=2)
    plain = transformer(ActivationCheckpointConfig(), CompileConfig(), None, config=config)
    compiled = transformer(checkpointing, ENABLED, "inductor", config=config)
    for model in (plain, compiled):
        backward(model, SCALAR)
    for (name, expected), found in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert expected.grad is not None and found.grad is not None
        assert (found.grad - expected.grad).norm() <= 1e-5 * expected.grad.norm(), name


def test_mode_without_compilation_is_refused() -> None:
    with pytest.raises(ValueError, match='mode = "max-autotune-no-cudagraphs" has no effect with enabled = false'):
        CompileConfig(mode="max-autotune-no-cudagraphs")
