"""Attention kernels for video tokens in tile order; they know nothing of `titan_distill`."""

from titan_kernels.attention import add_coarse, branches, coarse_branch, video_sparse_attention
from titan_kernels.layout import TileLayout, Tiles, tile_layout

__all__ = ["TileLayout", "Tiles", "add_coarse", "branches", "coarse_branch", "tile_layout", "video_sparse_attention"]
