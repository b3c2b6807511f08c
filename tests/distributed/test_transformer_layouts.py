"""What the layout matrix has no data for: timesteps per frame and per token, and image tokens, on shared tokens and
shared weights. One forward and backward of the transformer, against the same on one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_distill.config_sections import (
    ActivationCheckpointConfig,
    CompileConfig,
    Float8Config,
    ParallelismConfig,
)
from titan_distill.models.wan.config import FLAVORS, WanConfig
from titan_distill.models.wan.parallelize import Layout, apply_sequence_parallel, build_transformer
from titan_distill.models.wan.state_dict import copy_full_tensor
from titan_distill.models.wan.tensor_plan import apply_tensor_parallel
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.parallelisms.compile import compile_blocks
from titan_distill.parallelisms.degrees import Degrees
from titan_distill.parallelisms.mesh import RoleMesh

TEXT_TO_VIDEO = replace(FLAVORS["tiny"], num_layers=2)
IMAGE_TO_VIDEO = replace(TEXT_TO_VIDEO, in_channels=36, image_dim=32, added_kv_proj_dim=128)
LAYOUTS = {
    "Ulysses": ParallelismConfig(sequence=2),
    "gathered keys and values": ParallelismConfig(sequence=2, sequence_method="all_gather"),
    "tensor": ParallelismConfig(tensor=2),
    "tensor, token region": ParallelismConfig(tensor=2, token_region=True),
}
FRAMES, HEIGHT, WIDTH = 5, 6, 7
"""Tokens: 210 in 8 ragged tiles."""
CPU = torch.device("cpu")


def inputs(config: WanConfig) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Two samples with one timestep each, then with one a frame, then with one a token."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, config.in_channels, FRAMES, 2 * HEIGHT, 2 * WIDTH, generator=generator)
    text = torch.randn(2, 9, config.text_dim, generator=generator)
    image = None if config.image_dim is None else torch.randn(2, 5, config.image_dim, generator=generator)
    for shape in ((2,), (2, FRAMES), (2, FRAMES * HEIGHT * WIDTH)):
        yield latents, 1000 * torch.rand(shape, generator=generator), text, image


def whole_model(config: WanConfig) -> WanTransformer:
    model = WanTransformer.from_config(config)
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


def check(rank: int, store: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    parallelism = LAYOUTS[name]
    mesh = RoleMesh(Degrees(sequence=parallelism.sequence, tensor=parallelism.tensor), 2, "cpu")
    layout = Layout(
        mesh, parallelism, CPU, True, torch.float32, torch.float32,
        ActivationCheckpointConfig(), CompileConfig(), Float8Config(),
    )  # fmt: skip
    for config in (TEXT_TO_VIDEO, IMAGE_TO_VIDEO):
        whole, shared = whole_model(config), build_transformer(config, None, layout, seed=0)
        for parameter, value in zip(shared.parameters(), whole.parameters(), strict=True):
            copy_full_tensor(parameter, value.detach())
        for arguments in inputs(config):
            velocity, expected = gradients(whole, *arguments)
            found_velocity, found = gradients(shared, *arguments)
            torch.testing.assert_close(found_velocity, velocity, rtol=1e-5, atol=1e-5)
            for key, gradient in expected.items():
                difference = (found[key] - gradient).norm() / gradient.norm().clamp(min=1e-6)
                assert difference < 1e-5, f"{key}, timesteps {tuple(arguments[1].shape)}: {difference:.1e}"
    dist.barrier()
    dist.destroy_process_group()


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

    with torch.device("meta"):
        model = WanTransformer.from_config(TEXT_TO_VIDEO)
    mesh = RoleMesh(Degrees(tensor=2), 2, "cpu")
    assert mesh.tensor is not None
    apply_tensor_parallel(model, mesh.tensor, by_tokens=by_tokens)
    apply_sequence_parallel(model, mesh, ParallelismConfig(tensor=2, token_region=by_tokens))
    compile_blocks(model.blocks, CompileConfig(enabled=True), backend=count)
    model.to_empty(device="cpu").reset_parameters(seed=0)
    gradients(model, *next(inputs(TEXT_TO_VIDEO)))
    assert len(graphs) == 1
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("by_tokens", [False, True])
def test_compiled_blocks_share_one_graph_under_tensor_parallelism(by_tokens: bool, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(check_one_graph, args=(str(tmp_path / "store"), by_tokens), nprocs=2)
