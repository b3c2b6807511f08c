"""Layouts of the transformer for inputs that the layout matrix lacks.

Timesteps per frame and per token, image tokens, and lists that two tiles share, on shared tokens and shared weights:
one forward and backward, and one derivative in forward mode, against one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from titan_kernels import tile_layout
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor
from wan_config import wan_config

from titan_distill.attention.sparse import SparseAttention
from titan_distill.config.degrees import Degrees
from titan_distill.config.role_sections import ParallelismConfig
from titan_distill.config.sections import (
    CompileConfig,
    SparseAttentionConfig,
)
from titan_distill.models.wan.config import FLAVORS, WanConfig
from titan_distill.models.wan.parallelize import apply_sequence_parallel, build_transformer
from titan_distill.models.wan.tensor_plan import apply_tensor_parallel
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.parallelisms.compile import compile_blocks
from titan_distill.parallelisms.fsdp import reshard
from titan_distill.parallelisms.mesh import RoleMesh
from titan_distill.parallelisms.shards import copy_full_tensor

TEXT_TO_VIDEO = replace(FLAVORS["tiny"], num_layers=2)
IMAGE_TO_VIDEO = replace(TEXT_TO_VIDEO, in_channels=36, image_dim=32, added_kv_proj_dim=128)
# Step 0 reads all tiles by dense attention, step 1 half of them, step 2 a quarter.
SPARSE = SparseAttentionConfig(sparsity=0.75, schedule_rate=0.5, crossover=0.25)
MODELS: tuple[tuple[WanConfig, SparseAttentionConfig | None], ...] = (
    (TEXT_TO_VIDEO, None),
    (IMAGE_TO_VIDEO, None),
    (replace(TEXT_TO_VIDEO, sparse_attention=True), SPARSE),
    (replace(TEXT_TO_VIDEO, sparse_attention=True), replace(SPARSE, tiles_per_list=2)),
)
LAYOUTS = {
    "Ulysses": ParallelismConfig(sequence=2),
    "gathered keys and values": ParallelismConfig(sequence=2, sequence_method="all_gather"),
    "tensor": ParallelismConfig(tensor=2),
    "tensor, token region": ParallelismConfig(tensor=2, token_region=True),
}
FRAMES, HEIGHT, WIDTH = 5, 5, 7
"""Tokens: 175 in 8 tiles, 7 of them ragged. Two ranks share them evenly after the first tile, or after the first pair.
"""
CPU = torch.device("cpu")


def inputs(config: WanConfig) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Two samples with one timestep each, then with one a frame, then with one a token."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, config.in_channels, FRAMES, 2 * HEIGHT, 2 * WIDTH, generator=generator)
    text = torch.randn(2, 9, config.text_dim, generator=generator)
    image = None if config.image_dim is None else torch.randn(2, 5, config.image_dim, generator=generator)
    for shape in ((2,), (2, FRAMES), (2, FRAMES * HEIGHT * WIDTH)):
        yield latents, 1000 * torch.rand(shape, generator=generator), text, image


def whole_model(config: WanConfig, sparse: SparseAttentionConfig | None) -> WanTransformer:
    model = WanTransformer(config, None if sparse is None else SparseAttention(sparse))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # gates start at zero and would hide everything behind them
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: WanTransformer, *arguments: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    velocity = model(*arguments)
    weights = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(2))
    (velocity * weights).mean().backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return velocity.detach(), found


@torch.no_grad()
def tangent(model: WanTransformer, latents: Tensor, timestep: Tensor, *conditions: Tensor | None) -> Tensor:
    """The velocity's derivative along noise in the latents and -1.5 in the timestep."""
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    with forward_ad.dual_level():
        dual = (
            forward_ad.make_dual(latents, direction),
            forward_ad.make_dual(timestep, torch.full_like(timestep, -1.5)),
        )
        found = forward_ad.unpack_dual(model(*dual, *conditions)).tangent
    assert found is not None
    reshard(model)  # FSDP would leave the root gathered, as no backward follows
    return found


def check(rank: int, store: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    parallelism = LAYOUTS[name]
    mesh = RoleMesh(Degrees(sequence=parallelism.sequence, tensor=parallelism.tensor), 2, "cpu")
    for config, sparse in MODELS:
        run = (
            wan_config(parallelism=parallelism)
            if sparse is None
            else wan_config(parallelism=parallelism, attention="sparse", sparse_attention=sparse)
        )
        whole, shared = whole_model(config, sparse), build_transformer(run, "student", config, None, mesh, CPU, seed=0)
        for parameter, value in zip(shared.parameters(), whole.parameters(), strict=True):
            copy_full_tensor(parameter, value.detach())
        _expect_empty_padding(shared)
        for step, arguments in enumerate(inputs(config)):
            for model in (whole, shared):
                if model.sparse_attention is not None:
                    model.sparse_attention.start_step(step)
            velocity, expected = gradients(whole, *arguments)
            found_velocity, found = gradients(shared, *arguments)
            torch.testing.assert_close(found_velocity, velocity, rtol=1e-5, atol=1e-5)
            assert sparse is None or expected["blocks.1.to_gate_compress.weight"].norm() > 1e-4
            for key, gradient in expected.items():
                difference = (found[key] - gradient).norm() / gradient.norm().clamp(min=1e-6)
                assert difference < 1e-5, f"{key}, timesteps {tuple(arguments[1].shape)}: {difference:.1e}"
            if sparse is None and arguments[1].shape != (
                2,
                FRAMES * HEIGHT * WIDTH,
            ):  # torch.unique has no forward mode
                expected_tangent = tangent(whole, *arguments)
                difference = (tangent(shared, *arguments) - expected_tangent).norm() / expected_tangent.norm()
                assert difference < 1e-5, f"forward mode, timesteps {tuple(arguments[1].shape)}: {difference:.1e}"
    dist.barrier()
    dist.destroy_process_group()


def _expect_empty_padding(model: WanTransformer) -> None:
    """Rows of padding come out of attention as zeros."""
    parallel = model.sequence
    if parallel is None:
        return
    shards = parallel.shards(tile_layout((FRAMES, HEIGHT, WIDTH)))
    assert shards.is_padded
    length = shards.lengths[0 if parallel.group is None else parallel.group.rank()]

    def check_rows(module: torch.nn.Module, args: tuple[Tensor]) -> None:
        assert args[0].shape[1] == shards.padded_length and not args[0][:, length:].any()

    for block in model.blocks:
        block.attn1.to_out[0].register_forward_pre_hook(check_rows)


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_forward_and_backward(name: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(check, args=(str(tmp_path / "store"), name), nprocs=2)


def check_one_graph(rank: int, store: str, by_tokens: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    graphs = []

    def count(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    mesh = RoleMesh(Degrees(tensor=2), 2, "cpu")
    assert mesh.tensor is not None
    for num_models, (config, sparse) in enumerate((MODELS[0], MODELS[2]), start=1):
        with torch.device("meta"):
            model = WanTransformer(config, None if sparse is None else SparseAttention(sparse))
        if model.sparse_attention is not None:
            model.sparse_attention.start_step(1)
        apply_tensor_parallel(model, mesh.tensor, by_tokens=by_tokens)
        apply_sequence_parallel(model, mesh, ParallelismConfig(tensor=2, token_region=by_tokens))
        compile_blocks(model.blocks, CompileConfig(enabled=True), backend=count)
        model.to_empty(device="cpu").reset_parameters(seed=0)
        gradients(model, *next(inputs(config)))
        assert len(graphs) == num_models
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("by_tokens", [False, True])
def test_compiled_blocks_share_one_graph_under_tensor_parallelism(by_tokens: bool, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(check_one_graph, args=(str(tmp_path / "store"), by_tokens), nprocs=2)
