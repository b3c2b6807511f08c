"""Conversion of latent video to a sequence of tokens and back, and the position of each token.

Latents are cut into patches, one token each. Tokens are put into tile order (see `titan_kernels.layout`) while they are
still raw patches and put back when they are raw velocities again: with 64 numbers a token instead of 5120 the two
permutations cost nothing. Everything between is token-wise or attention, so all it needs to know about positions fits
into one small object, `TokenContext`, that every block receives.

Shape suffixes: B batch, C channels, F frames, H and W latent height and width, L tokens, P numbers in a patch,
N heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from titan_kernels import TileLayout, tile_layout
from titan_kernels.layout import DEFAULT_TILE
from torch import Tensor

from titan_distill.attention.causal import TextCache
from titan_distill.attention.sharded import ShardedAttention
from titan_distill.models.wan.config import WanConfig

Grid = tuple[int, int, int]

ROPE_THETA = 10000.0
# One entry is 77 MB at 75,600 tokens. Four suffice for two grids, of training and validation, in two tiles.
_NUM_CACHED_PHASES = 4
# A causal model has an entry for each of its segments, all together as large as one whole grid's.
_NUM_CACHED_SEGMENTS = 32


@dataclass(frozen=True, eq=False)
class TokenContext:
    """Properties of a batch's tokens that attention and modulation need, in tile order.

    Attributes:
        layout: the tile layout.
        cos_LD, sin_LD: fp32 rotary factors; each pair of head channels holds (cos, cos) and (-sin, sin).
        row_BL: int64, the row of the modulation that each token uses; None if sample b uses row b throughout.
        num_selected: see `AttentionCall`.
        attention: replaces this layer's own self-attention in this forward (causal roles).
        text: this layer's cache of the text's keys and values (causal roles).
    """

    layout: TileLayout
    cos_LD: Tensor
    sin_LD: Tensor
    row_BL: Tensor | None = None
    num_selected: int | None = None
    attention: ShardedAttention | None = None
    text: TextCache | None = None


def token_grid(sizes: Sequence[int], patch_size: Grid) -> Grid:
    """Tokens along (frames, height, width) of latents with these sizes.

    Raises:
        ValueError: a size that the patch does not divide (diffusers would drop the rest silently).
    """
    if any(size % patch for size, patch in zip(sizes, patch_size, strict=True)):
        raise ValueError(f"latent size {tuple(sizes)} must be a multiple of the patch size {patch_size}")
    frames, height, width = (size // patch for size, patch in zip(sizes, patch_size, strict=True))
    return frames, height, width


def patchify(latents_BCFHW: Tensor, patch_size: Grid) -> Tensor:
    """Return raster-ordered patches [B, L, P], numbers ordered (channel, frame, row, column) as in a convolution."""
    frames, height, width = token_grid(latents_BCFHW.shape[2:], patch_size)
    split = latents_BCFHW.unflatten(4, (width, -1)).unflatten(3, (height, -1)).unflatten(2, (frames, -1))
    num_tokens = frames * height * width
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(latents_BCFHW.shape[0], num_tokens, -1)


def unpatchify(patches_BLP: Tensor, grid: Grid, patch_size: Grid) -> Tensor:
    """Return latents [B, C, F, H, W] of raster-ordered patches, numbers ordered (frame, row, column, channel)."""
    split = patches_BLP.unflatten(2, (*patch_size, -1)).unflatten(1, grid)
    size = [tokens * patch for tokens, patch in zip(grid, patch_size, strict=True)]
    return split.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(patches_BLP.shape[0], -1, *size)


def token_context(
    grid: Grid, config: WanConfig, device: torch.device, tile: Grid = DEFAULT_TILE, first_frame: int = 0
) -> TokenContext:
    """Return the context of `grid`, which begins at `first_frame` of its video, for samples with one timestep each.

    Raises:
        ValueError: the grid is larger than the model's rotary range, or ends behind it.
    """
    if max(grid) > config.rope_max_seq_len:
        raise ValueError(f"token grid {grid} exceeds rope_max_seq_len {config.rope_max_seq_len} along one dimension")
    if first_frame + grid[0] > config.rope_max_seq_len:
        raise ValueError(
            f"latent frames {first_frame} to {first_frame + grid[0]} exceed the model's rotary range of "
            f"{config.rope_max_seq_len}; make a shorter video"
        )
    layout = tile_layout(grid, tile, device)
    phases = _segment_phases if tile[0] == 1 else _whole_phases  # of causal models
    return TokenContext(layout, *phases(layout, config.attention_head_dim, first_frame))


@torch.inference_mode(False)  # or the first validation would cache tensors that no training step can save for backward
def _phases(layout: TileLayout, head_dim: int, first_frame: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [L, head_dim] in tile order; a head's pairs are split over frames, height and width.

    Angles are formed in fp64 (Wan and diffusers do, too), their cosines stored in fp32.
    """
    spatial_dim = 2 * (head_dim // 6)
    device = layout.permutation.device
    angles = []
    for dim, channels in enumerate((head_dim - 2 * spatial_dim, spatial_dim, spatial_dim)):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
        position = torch.arange(layout.grid[dim], dtype=torch.float64, device=device) + first_frame * (dim == 0)
        angle = torch.outer(position, ROPE_THETA**-exponent)
        shape = [-1 if other == dim else 1 for other in range(3)]
        angles.append(angle.view(*shape, channels // 2).expand(*layout.grid, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)[layout.permutation]
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.stack((cos, cos), dim=-1).flatten(1), torch.stack((-sin, sin), dim=-1).flatten(1)


_whole_phases = lru_cache(maxsize=_NUM_CACHED_PHASES)(_phases)
_segment_phases = lru_cache(maxsize=_NUM_CACHED_SEGMENTS)(_phases)


def apply_rotary(x_BLND: Tensor, context: TokenContext) -> Tensor:
    """Turn each pair of neighbouring head channels by its token's phase; computed in fp32, returned in x's dtype."""
    cos_L1D, sin_L1D = context.cos_LD[:, None], context.sin_LD[:, None]
    even, odd = x_BLND.unflatten(-1, (-1, 2)).unbind(-1)
    swapped_BLND = torch.stack((odd, even), dim=-1).flatten(-2)
    return torch.addcmul(x_BLND * cos_L1D, swapped_BLND, sin_L1D).to(x_BLND.dtype)
