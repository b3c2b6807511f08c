"""The Wan video transformer: velocity of a noisy latent video, given a timestep and text.

A forward has four steps that a parallel layout can wrap one by one: cut latents into tokens in tile order, embed the
conditions, run the blocks, put the tokens back. Inputs, outputs and per-token timesteps are raster; tile order is
internal. Parameter names and values are those of diffusers' `WanTransformer3DModel`, which is the parity oracle.

**Causal models** have the same weights and other attention (`attention.causal`): segments of frames read themselves and
earlier ones. They run over all segments at once, or over one segment given the `KVCache` of those before it.

**Timesteps.** A sample has one timestep, or (TI2V, causal and first-frame training) one per frame, or one per token.
Modulation is computed once per distinct timestep and indexed by tokens: per token it would cost 2 GB at 27,280 tokens
of width 3072. Per-frame timesteps are the cheap form: rows are known from the shapes. Per-token timesteps are searched
for distinct values, which makes the host wait for the GPU once a forward; diffusers speaks only that form.

Shape suffixes: B batch, C channels, F frames, H and W latent height and width, L tokens, S text or image tokens,
M model width, R distinct timesteps (rows of modulation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from titan_kernels.layout import DEFAULT_TILE
from torch import Tensor, nn

from titan_distill.attention.causal import CausalAttention, KVCache, Segmentation
from titan_distill.attention.dense import AttentionCore, DenseAttention
from titan_distill.attention.sharded import ShardedAttention
from titan_distill.attention.sparse import SparseAttention
from titan_distill.diffusion.noise import keyed_normal
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.embeddings import ConditionEmbedding, PatchEmbedding
from titan_distill.models.wan.layers import (
    Float32LayerNorm,
    WanBlock,
    at_least_float32,
    modulate,
    modulation_parts,
)
from titan_distill.models.wan.tokens import TokenContext, patchify, token_context, token_grid, unpatchify
from titan_distill.parallelisms import collectives
from titan_distill.parallelisms.sequence import SequenceParallel
from titan_distill.parallelisms.shards import copy_full_tensor
from titan_distill.parallelisms.tensor import TokenRegion, local


class WanTransformer(nn.Module):
    """Predicts velocity; builds on any device, `meta` included (then `to_empty` and load or `reset_parameters`).

    Raises ValueError for a sparse model without its core, or a causal one without its segments, or the other way round.
    """

    def __init__(
        self,
        config: WanConfig,
        sparse_attention: SparseAttention | None = None,
        segmentation: Segmentation | None = None,
    ) -> None:
        super().__init__()
        for key, given in (("sparse_attention", sparse_attention), ("causal_attention", segmentation)):
            if getattr(config, key) != (given is not None):
                raise ValueError(
                    f"config.{key} = {getattr(config, key)} and {given} contradict each other; give a SparseAttention "
                    "to sparse models and a Segmentation to causal ones, and only to them"
                )
        self.config = config
        self.sparse_attention = sparse_attention
        """The core that all blocks of a sparse model share; None in a dense one."""
        self.segmentation = segmentation
        """The segments of a causal model's videos; None in a bidirectional one."""
        dim, patch_size = config.inner_dim, config.patch_size
        attention = ShardedAttention(self.attention_core)
        self.patch_embedding = PatchEmbedding(config.in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.condition_embedder = ConditionEmbedding(config)
        self.blocks = nn.ModuleList([WanBlock(config, attention) for _ in range(config.num_layers)])
        self.norm_out = Float32LayerNorm(dim, config.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, config.out_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, dim))
        # Set by `parallelize`, where other ranks hold some of the tokens.
        self.sequence: SequenceParallel | None = None
        self.token_region: TokenRegion | None = None
        if not self.scale_shift_table.is_meta:
            self.reset_parameters()

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], sparse: SparseAttention | None = None, segmentation: Segmentation | None = None
    ) -> WanTransformer:
        """Builds from the dict of a diffusers `config.json`. Raises ValueError as the constructor does."""
        return cls(WanConfig.from_diffusers(config), sparse, segmentation)

    @property
    def attention_core(self) -> AttentionCore:
        """The core that mixes the video tokens of every block."""
        return DenseAttention() if self.sparse_attention is None else self.sparse_attention

    def set_attention(self, attention: ShardedAttention) -> None:
        """Make `attention` the self-attention of every block."""
        for block in self.blocks:
            assert isinstance(block, WanBlock)
            block.attn1.attention = attention

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0, device: torch.device | None = None) -> None:
        """Initialise for training from scratch: Xavier weights; modulation, head and coarse gates start at zero.

        Zero gates make every block's self-attention and feed-forward start as the identity (adaLN-Zero, Peebles & Xie,
        2212.09748). Each tensor is drawn whole from a stream of its own, keyed by seed and name, so that the values
        depend on neither sharding nor device nor the order of construction.

        Args:
            seed: of the weights.
            device: draws them. Default: the device of each parameter, which is the slow one for offloaded parameters.
        """
        for name, parameter in self.named_parameters():
            full = _initial_value(name, parameter.shape, seed, device or parameter.device)
            copy_full_tensor(parameter, full.to(parameter.dtype))  # here, because a copy to the host casts there

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the velocity [B, out channels, F, H, W] in the dtype of `hidden_states`.

        Args:
            hidden_states: noisy latents [B, C, F, H, W].
            timestep: 1000 sigma, fp32 or fp64 (see `embeddings`) or integer: [B], or [B, frames of tokens], or
                [B, tokens] in raster order.
            encoder_hidden_states: text embeddings [B, S, text_dim], zero-padded.
            encoder_hidden_states_image: CLIP image embeddings [B, S, image_dim] of I2V models.
            cache: of a causal model: the KV cache of the segments before the latents, which are one segment then;
                without it they are a whole video.

        Raises:
            ValueError: shapes that don't fit the model or each other, a timestep below fp32, or an image missing or
                superfluous.
        """
        self._check_inputs(hidden_states, encoder_hidden_states, encoder_hidden_states_image)
        grid = token_grid(hidden_states.shape[2:], self.config.patch_size)
        first_frame = 0 if cache is None else cache.num_positions
        context = token_context(grid, self.config, hidden_states.device, self.tile, first_frame)
        if self.sparse_attention is not None:
            context = replace(context, num_selected=self.sparse_attention.selection(context.layout.num_tiles))
        timestep_R, context = _timestep_rows(timestep, hidden_states.shape[0], context)
        embedded_RM, rows_R6M, text_BSM, image_BSM = self.condition_embedder(
            timestep_R, encoder_hidden_states, encoder_hidden_states_image
        )
        patches_BLP = patchify(hidden_states, self.config.patch_size).index_select(1, context.layout.permutation)
        if self.sequence is not None:
            patches_BLP = self.sequence.shard(patches_BLP, context.layout)
            context = _sequence_context(context, self.sequence)
        contexts = self._layer_contexts(context, cache)
        x_BLM = self._run_blocks(self.patch_embedding(patches_BLP), text_BSM, image_BSM, rows_R6M, contexts)
        velocity_BLP = self._head(x_BLM, embedded_RM, context)
        if self.sequence is not None:
            velocity_BLP = self.sequence.gather(velocity_BLP, context.layout)
        velocity_BLP = velocity_BLP.index_select(1, context.layout.inverse)
        return unpatchify(velocity_BLP, grid, self.config.patch_size).to(hidden_states.dtype)

    @property
    def tile(self) -> tuple[int, int, int]:
        """Size of a tile in tokens along (frames, height, width). A causal model has tiles of one frame, so that every
        segment is one run of tokens."""
        return self.config.vsa_tile if self.segmentation is None else (1, *DEFAULT_TILE[1:])

    def _layer_contexts(self, context: TokenContext, cache: KVCache | None) -> list[TokenContext]:
        """Each layer's context: of a causal model with the segments of a whole video, or with the layer's cache."""
        if self.segmentation is None:
            return [context] * len(self.blocks)
        frames, height, width = context.layout.grid
        if cache is None:
            core = CausalAttention(self.segmentation.runs(frames, height * width))
            return [replace(context, attention=ShardedAttention(core, self.sequence))] * len(self.blocks)
        layers = zip(cache.cores(), cache.texts, strict=True)
        return [replace(context, attention=ShardedAttention(core, self.sequence), text=text) for core, text in layers]

    def _run_blocks(
        self,
        x_BLM: Tensor,
        text_BSM: Tensor,
        image_BSM: Tensor | None,
        rows_R6M: Tensor,
        contexts: Sequence[TokenContext],
    ) -> Tensor:
        group = None if self.token_region is None else self.token_region.group
        row_BL = contexts[0].row_BL
        # Where tensor-parallel ranks hold a run of tokens each, phases stay whole: attention sees all tokens.
        if group is not None:
            x_BLM = collectives.shard(x_BLM, 1, group)
            if row_BL is not None:
                row_BL = collectives.shard(row_BL, 1, group)
                contexts = [replace(context, row_BL=row_BL) for context in contexts]
        for block, context in zip(self.blocks, contexts, strict=True):
            x_BLM = block(x_BLM, text_BSM, image_BSM, rows_R6M, context)
        return x_BLM if group is None else collectives.gather(x_BLM, 1, group)

    def _head(self, x_BLM: Tensor, embedded_RM: Tensor, context: TokenContext) -> Tensor:
        table_12M = local(self.scale_shift_table)
        shift, scale = modulation_parts(table_12M + embedded_RM[:, None], context.row_BL)
        return self.proj_out(modulate(self.norm_out(x_BLM), shift, scale).to(self.proj_out.weight.dtype))

    def _check_inputs(self, latents: Tensor, text: Tensor, image: Tensor | None) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.config.in_channels:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} must be [batch, {self.config.in_channels}, frames, H, W]"
            )
        expected = (latents.shape[0], self.config.text_dim)
        if text.ndim != 3 or (text.shape[0], text.shape[2]) != expected:
            raise ValueError(
                f"text embeddings of shape {tuple(text.shape)} must be [{expected[0]}, tokens, {expected[1]}]"
            )
        if (image is None) != (self.config.image_dim is None):
            got = "no image embeddings" if image is None else "image embeddings"
            raise ValueError(f"got {got} for a model with image_dim {self.config.image_dim}")


def _sequence_context(context: TokenContext, sequence: SequenceParallel) -> TokenContext:
    """Returns the context of this rank's tokens."""
    layout, row_BL = context.layout, context.row_BL
    return replace(
        context,
        cos_LD=sequence.shard(context.cos_LD, layout, 0),
        sin_LD=sequence.shard(context.sin_LD, layout, 0),
        row_BL=None if row_BL is None else sequence.shard(row_BL, layout, 1),
    )


def _timestep_rows(timestep: Tensor, batch_size: int, context: TokenContext) -> tuple[Tensor, TokenContext]:
    """Return the distinct timesteps [R] and a context that knows which of them each token uses."""
    if timestep.is_floating_point() and timestep.dtype.itemsize < 4:
        raise ValueError(f"timestep of dtype {timestep.dtype} is rounded already; pass it as float32 or float64")
    timestep = timestep.to(at_least_float32(timestep.dtype))
    layout = context.layout
    if timestep.shape == (batch_size,):
        return timestep, context
    if timestep.shape == (batch_size, layout.grid[0]):
        frame_L = layout.permutation // math.prod(layout.grid[1:])
        first_row_B1 = torch.arange(0, timestep.numel(), layout.grid[0], device=timestep.device)[:, None]
        return timestep.flatten(), replace(context, row_BL=first_row_B1 + frame_L)
    if timestep.shape == (batch_size, layout.num_tokens):
        timestep_R, row_BL = torch.unique(timestep, return_inverse=True)
        return timestep_R, replace(context, row_BL=row_BL.index_select(1, layout.permutation))
    raise ValueError(
        f"timestep of shape {tuple(timestep.shape)} must be [{batch_size}], [{batch_size}, {layout.grid[0]} frames] or "
        f"[{batch_size}, {layout.num_tokens} tokens]"
    )


def _initial_value(name: str, shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    zeros = ("scale_shift_table", "bias", "pos_embed", "time_proj.weight", "proj_out.weight", "to_gate_compress.weight")
    if name.endswith(zeros):
        return torch.zeros(shape, device=device)
    if len(shape) == 1:  # the weight of a norm
        return torch.ones(shape, device=device)
    std = math.sqrt(2 / (shape[0] + math.prod(shape[1:])))
    return keyed_normal([f"{seed}/{name}"], shape, device)[0].mul_(std)
