"""How a Wan transformer is laid out and brought to life. The body of ``build_transformer`` is the order of
operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from titan_kernels.layout import DEFAULT_TILE, tile_grid

from titan_distill.attention.causal import Segmentation
from titan_distill.attention.shared import place
from titan_distill.attention.sparse import SparseAttention
from titan_distill.config.degrees import Degrees
from titan_distill.config.parsing import nearest_divisors
from titan_distill.config.role_sections import LoraConfig, ParallelismConfig
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.tensor_plan import apply_tensor_parallel
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.parallelisms.activation_checkpoint import apply_activation_checkpointing
from titan_distill.parallelisms.compile import compile_blocks
from titan_distill.parallelisms.float8 import apply_float8, finish_float8
from titan_distill.parallelisms.fsdp import FsdpOptions, apply_fsdp
from titan_distill.parallelisms.lora import apply_lora, initial_adapters
from titan_distill.parallelisms.mesh import RoleMesh
from titan_distill.parallelisms.pinned import materialise_on_host
from titan_distill.parallelisms.sequence import Method, SequenceParallel, choose_method, describe_tiles
from titan_distill.parallelisms.shards import copy_full_tensor
from titan_distill.parallelisms.tensor import enable_async_communication

if TYPE_CHECKING:
    from titan_distill.config.sections import (
        ActivationCheckpointConfig,
        CompileConfig,
        Float8Config,
        SparseAttentionConfig,
    )

WeightLoader = Callable[[WanTransformer], None]
"""Fills a model that has storage, in whatever layout it has."""

HIGH_PRECISION = ("condition_embedder", "patch_embedding", "proj_out")
"""What never computes in float8 and gets no adapter: the conditions, with timesteps and modulation, the first
layer and the last."""


@dataclass(frozen=True)
class Layout:
    """Everything about a role's network but its architecture and weights."""

    mesh: RoleMesh | None
    """None for one process without a process group."""
    parallelism: ParallelismConfig
    device: torch.device
    trainable: bool
    storage_dtype: torch.dtype
    compute_dtype: torch.dtype
    activation_checkpoint: ActivationCheckpointConfig
    compile: CompileConfig
    float8: Float8Config
    sparse_attention: SparseAttentionConfig | None = None
    """None for a dense role; must agree with the architecture."""
    segmentation: Segmentation | None = None
    """None for a role that is not causal; must agree with the architecture."""
    lora: LoraConfig = field(default_factory=LoraConfig)


def build_transformer(architecture: WanConfig, load: WeightLoader | None, layout: Layout, seed: int) -> WanTransformer:
    """Builds one role's transformer. ``load`` fills it once it has storage; None draws random weights from ``seed``.

    With ``layout.device`` = meta the result has shapes and no storage. Raises ValueError for weights or degrees that do
    not fit.
    """
    mesh, parallelism = layout.mesh, layout.parallelism
    core = None if layout.sparse_attention is None else SparseAttention(layout.sparse_attention)
    with torch.device("meta"):
        model = WanTransformer.from_config(architecture, core, layout.segmentation)
    model.to(layout.storage_dtype).requires_grad_(layout.trainable)
    apply_float8(model, layout.float8, high_precision=HIGH_PRECISION, device=layout.device)
    apply_lora(model, layout.lora, excluded=HIGH_PRECISION)
    if mesh is not None and mesh.tensor is not None:
        apply_tensor_parallel(model, mesh.tensor, by_tokens=parallelism.token_region)
        if parallelism.async_tensor:
            enable_async_communication(mesh.tensor)
    if mesh is not None:
        apply_sequence_parallel(model, mesh, parallelism)
    if layout.trainable:
        apply_activation_checkpointing(model.blocks, layout.activation_checkpoint, selects=core is not None)
    compile_blocks(model.blocks, layout.compile)
    if mesh is not None:
        options = FsdpOptions(layout.compute_dtype, parallelism.reshard_after_forward, parallelism.cpu_offload)
        apply_fsdp(model, list(model.blocks), mesh.fsdp, options)
    if layout.device.type == "meta":
        return model
    if parallelism.cpu_offload:
        assert mesh is not None, "config.degrees.needs_group asks for a process group"
        materialise_on_host(model, page_locked=layout.device.type == "cuda")
    else:
        model.to_empty(device=layout.device)
    if load is not None:
        load(model)
    else:
        model.reset_parameters(seed, layout.device)
    for parameter, value in initial_adapters(model, seed, layout.device):
        copy_full_tensor(parameter, value)
    finish_float8(model, layout.float8)
    return model


def apply_sequence_parallel(model: WanTransformer, mesh: RoleMesh, parallelism: ParallelismConfig) -> None:
    """Shares the tokens of a sample among the ranks of the sequence axis.

    Ranks of the tensor axis may cut a rank's tokens further, which then must come in multiples of their number.
    """
    degrees = mesh.degrees
    multiple = degrees.tensor if parallelism.token_region else 1
    if degrees.sequence == 1 and multiple == 1:
        return
    heads = model.config.num_attention_heads
    method = choose_method(heads, degrees.sequence, degrees.tensor, parallelism.sequence_method)
    join = runs_of_tiles(method, model.sparse_attention)
    model.sequence = SequenceParallel(mesh.sequence_group, method, multiple, join)
    model.set_placement(place(model.sequence, model.attention_core))


def runs_of_tiles(method: Method, core: SparseAttention | None) -> int:
    """The tiles that must not be parted between sequence ranks, because one list serves them.

    With Ulysses every rank sees all tiles of its heads, whatever tokens it holds.
    """
    return 1 if core is None or method == "ulysses" else core.tiles_per_list


def check_degrees(
    key: str,
    architecture: WanConfig,
    degrees: Degrees,
    sequence_method: Literal["auto", "ulysses", "all_gather"],
    grid: tuple[int, int, int],
    core: SparseAttention | None = None,
    segmentation: Segmentation | None = None,
) -> None:
    """Checks degrees against a model, its sparse ``core`` or causal ``segmentation`` if it has one, and a ``grid`` of
    tokens along (frames, height, width).

    Raises ValueError with the nearest valid choices.
    """
    if max(grid) > architecture.rope_max_seq_len:
        raise ValueError(
            f"{key}: {grid[0]} × {grid[1]} × {grid[2]} tokens of a video are more than the model's rotary phases, "
            f"{architecture.rope_max_seq_len} along each dimension; lower pipeline_config.num_frames, height or width"
        )
    heads, tensor, sequence = architecture.num_attention_heads, degrees.tensor, degrees.sequence
    if heads % tensor:
        raise ValueError(
            f"{key}: tensor = {tensor} does not divide the {heads} attention heads; set it to "
            f"{nearest_divisors(tensor, heads)}"
        )
    if sequence_method == "ulysses" and heads % (sequence * tensor):
        raise ValueError(
            f"{key}: Ulysses needs sequence × tensor = {sequence} × {tensor} to divide the {heads} attention heads; "
            f"set sequence to {nearest_divisors(sequence, heads // tensor)}, or sequence_method to 'all_gather'"
        )
    if segmentation is not None:
        check_causal_degrees(key, architecture, degrees, sequence_method, segmentation, grid)
        return
    join = runs_of_tiles(choose_method(heads, sequence, tensor, sequence_method), core)
    num_tiles = math.prod(tile_grid(grid))
    num_runs = -(-num_tiles // join)
    if sequence > num_runs:
        raise ValueError(
            f"{key}: sequence = {sequence} ranks can't share the {describe_tiles(num_tiles, join)} of "
            f"{grid[0]} × {grid[1]} × {grid[2]} tokens; set it to {num_runs} or less"
        )


def check_causal_degrees(
    key: str,
    architecture: WanConfig,
    degrees: Degrees,
    sequence_method: Literal["auto", "ulysses", "all_gather"],
    segmentation: Segmentation,
    grid: tuple[int, int, int],
) -> None:
    """Checks how the ranks of a causal role share tokens: by heads, and in every segment.

    Raises ValueError with the nearest valid choices.
    """
    heads, sequence = architecture.num_attention_heads, degrees.sequence
    if sequence == 1:
        return
    if choose_method(heads, sequence, degrees.tensor, sequence_method) == "all_gather":
        raise ValueError(
            f"{key}: attention = 'causal' with gathered keys would keep a whole cache on each of {sequence} sequence "
            f"ranks; leave sequence_method at 'auto' and set sequence to "
            f"{nearest_divisors(sequence, heads // degrees.tensor)}, so that ranks share the heads"
        )
    shortest = 1 if segmentation.single_first else segmentation.length
    # A causal model's tiles are one frame deep: see WanTransformer.tile.
    num_tiles = shortest * math.prod(-(-size // tile) for size, tile in zip(grid[1:], DEFAULT_TILE[1:], strict=True))
    if sequence > num_tiles:
        raise ValueError(
            f"{key}: sequence = {sequence} ranks can't share the {describe_tiles(num_tiles)} of the shortest block, "
            f"{shortest} × {grid[1]} × {grid[2]} tokens; set it to {num_tiles} or less"
        )
