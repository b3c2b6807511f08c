"""Building a Wan transformer: parallel layout, wrappers and weights. The body of `build_transformer` is the order of
operations."""

from __future__ import annotations

import math
from typing import Literal

import torch
from titan_kernels.layout import tile_grid

from titan_distill.attention.causal import Segmentation
from titan_distill.attention.sharded import ShardedAttention
from titan_distill.attention.sparse import SparseAttention
from titan_distill.config.config import Config
from titan_distill.config.degrees import Degrees
from titan_distill.config.dtypes import DTYPES
from titan_distill.config.parsing import nearest_divisors
from titan_distill.config.role_sections import ParallelismConfig
from titan_distill.config.sections import SparseAttentionConfig
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.stored import WeightLoader
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

HIGH_PRECISION = ("condition_embedder", "patch_embedding", "proj_out")
"""Submodules that never compute in float8 and get no LoRA adapter: the conditions, with timesteps and modulation, the
first layer and the last."""


def empty_transformer(config: WanConfig, sparse: SparseAttentionConfig, segmentation: Segmentation) -> WanTransformer:
    """Builds a transformer on the meta device. Sparse models need `sparse`, causal models `segmentation`."""
    core = SparseAttention(sparse) if config.sparse_attention else None
    with torch.device("meta"):
        return WanTransformer(config, core, segmentation if config.causal_attention else None)


def build_transformer(
    config: Config,
    name: str,
    architecture: WanConfig,
    load: WeightLoader | None,
    mesh: RoleMesh | None,
    device: torch.device,
    seed: int,
) -> WanTransformer:
    """Builds, lays out and fills one transformer of the role `name`.

    Args:
        config: configuration of the run.
        architecture: configuration of the transformer, with the role's kind of attention.
        load: fills the transformer once it has storage; None draws random weights from `seed`.
        mesh: None for one process without a process group.
        device: on `meta` the result has shapes and no storage.
        seed: seed of random weights.

    Raises:
        ValueError: weights or degrees that do not fit.
    """
    role, parallelism = config.roles[name], config.roles[name].parallelism
    compute_dtype, float8 = DTYPES[config.training.dtype], config.float8.for_role(name)
    auto_dtype = torch.float32 if role.trainable and not role.lora.enabled else compute_dtype
    model = empty_transformer(architecture, config.sparse_attention, config.pipeline_config.segmentation)
    model.to(auto_dtype if role.dtype == "auto" else DTYPES[role.dtype]).requires_grad_(role.trainable)
    apply_float8(model, float8, high_precision=HIGH_PRECISION, device=device)
    apply_lora(model, role.lora, excluded=HIGH_PRECISION)
    if mesh is not None and mesh.tensor is not None:
        apply_tensor_parallel(model, mesh.tensor, by_tokens=parallelism.token_region)
        if parallelism.async_tensor:
            enable_async_communication(mesh.tensor)
    if mesh is not None:
        apply_sequence_parallel(model, mesh, parallelism)
    if role.trainable:
        selects = model.sparse_attention is not None
        apply_activation_checkpointing(model.blocks, config.activation_checkpoint, selects=selects)
    compile_blocks(model.blocks, config.compile)
    if mesh is not None:
        options = FsdpOptions(compute_dtype, parallelism.reshard_after_forward, parallelism.cpu_offload)
        apply_fsdp(model, list(model.blocks), mesh.fsdp, options)
    if device.type == "meta":
        return model
    if parallelism.cpu_offload:
        assert mesh is not None, "config.degrees.needs_group asks for a process group"
        materialise_on_host(model, page_locked=device.type == "cuda")
    else:
        model.to_empty(device=device)
    if load is not None:
        load(model)
    else:
        model.reset_parameters(seed, device)
    for parameter, value in initial_adapters(model, seed, device):
        copy_full_tensor(parameter, value)
    finish_float8(model, float8)
    return model


def apply_sequence_parallel(model: WanTransformer, mesh: RoleMesh, parallelism: ParallelismConfig) -> None:
    """Distributes the tokens of a sample over the ranks of the sequence axis.

    If the ranks of the tensor axis cut a rank's tokens further, their number divides the padded number of tokens.
    """
    degrees = mesh.degrees
    multiple = degrees.tensor if parallelism.token_region else 1
    if degrees.sequence == 1 and multiple == 1:
        return
    heads = model.config.num_attention_heads
    method = choose_method(heads, degrees.sequence, degrees.tensor, parallelism.sequence_method)
    join = runs_of_tiles(method, model.sparse_attention)
    model.sequence = SequenceParallel(mesh.sequence_group, method, multiple, join)
    model.set_attention(ShardedAttention(model.attention_core, model.sequence))


def runs_of_tiles(method: Method, core: SparseAttention | None) -> int:
    """Returns the number of neighbouring tiles that must be on one sequence rank, because sparse attention has one list
    of key tiles for them.

    With Ulysses every rank has all tiles of its heads, so the number is 1.
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
    """Checks degrees against a model, its sparse `core` or causal `segmentation` if it has one, and a `grid` of tokens
    along (frames, height, width).

    For a causal role, the sequence ranks must share the heads. Raises ValueError with the nearest valid choices.
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
    method, num_heads = choose_method(heads, sequence, tensor, sequence_method), heads // tensor
    if segmentation is not None and sequence > 1 and method == "all_gather":
        raise ValueError(
            f"{key}: attention = 'causal' with gathered keys would hold a whole KV cache on each of {sequence} "
            f"sequence ranks; leave sequence_method at 'auto' and set sequence to "
            f"{nearest_divisors(sequence, num_heads)}, so that ranks share the heads"
        )
    join, tokens = runs_of_tiles(method, core), " × ".join(map(str, grid))
    num_tiles = math.prod(tile_grid(grid, architecture.vsa_tile))
    if segmentation is not None:
        shortest = 1 if segmentation.single_first else segmentation.length
        # A causal model's tiles are one frame deep: see WanTransformer.tile.
        num_tiles = shortest * math.prod(tile_grid((1, *grid[1:])))
        tokens = f"the shortest block, {shortest} × {grid[1]} × {grid[2]}"
    num_runs = -(-num_tiles // join)
    if sequence > num_runs:
        raise ValueError(
            f"{key}: sequence = {sequence} ranks can't share the {describe_tiles(num_tiles, join)} of {tokens} tokens; "
            f"set it to {num_runs} or less"
        )
