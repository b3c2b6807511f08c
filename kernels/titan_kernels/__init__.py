"""Attention kernels for video tokens in tile order; they know nothing of `titan_distill`."""

from titan_kernels.layout import TileLayout, tile_layout

__all__ = ["TileLayout", "tile_layout"]
