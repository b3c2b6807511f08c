"""A data set of three shapes for the tiny Wan."""

from __future__ import annotations

from pathlib import Path

import torch
from runs import TINY_SHAPES

from titan_distill.data.parquet import LatentRow, ParquetDataset, write_rows
from titan_distill.diffusion.noise import KeyedNoise

SIZES = ((5, 64, 96), (13, 64, 64), (1, 96, 96))
"""(frames, height, width) in pixels: three latent sizes with different numbers of tokens."""
SHAPES = tuple((16, (frames - 1) // 4 + 1, height // 8, width // 8) for frames, height, width in SIZES)
BUCKETS = "--pipeline_config.buckets " + str([list(size) for size in SIZES]).replace(" ", "")


def write_buckets(folder: Path, rows_of_bucket: tuple[int, int, int] = (7, 6, 5)) -> Path:
    """Writes rows of all shapes, mixed, with latents of noise and the texts of the tiny shapes."""
    texts, noise = ParquetDataset(TINY_SHAPES / "prompts.parquet"), KeyedNoise(0)
    kinds = [bucket for bucket, count in enumerate(rows_of_bucket) for _ in range(count)]
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(0)).tolist()
    rows = []
    for index, at in enumerate(order):
        text, shape = texts[index % len(texts)], SHAPES[kinds[at]]
        latent = noise.normal("buckets", 0, [index], shape, device="cpu")[0]
        rows.append(LatentRow(str(index), text.caption, text.text_embedding, latent))
    write_rows(folder / "rows.parquet", rows)
    return folder
