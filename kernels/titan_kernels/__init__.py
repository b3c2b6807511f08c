"""Attention kernels for video tokens in tile order, and normal numbers that are the same on every device.

They know nothing of `titan_distill`.
"""

from titan_kernels.attention import add_coarse, attention_jvp, branches, coarse_branch, video_sparse_attention
from titan_kernels.layout import TileLayout, Tiles, tile_layout
from titan_kernels.ops import philox_normal

__all__ = [
    "TileLayout",
    "Tiles",
    "add_coarse",
    "attention_jvp",
    "branches",
    "coarse_branch",
    "philox_normal",
    "tile_layout",
    "video_sparse_attention",
]
