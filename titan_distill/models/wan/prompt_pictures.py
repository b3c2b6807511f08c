"""The pictures that validation videos start from, beside the prompts of `validation.prompts`.

A table names them in its column `image`, or takes the first frames of its videos; a parquet file has them as
first frames of its latents, or as the tensors of `image_channels`. Prompt k starts from the picture in its own row. If
there are fewer rows than prompts, rows repeat like prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from titan_distill.data.footage import read_picture
from titan_distill.data.parquet import ParquetDataset
from titan_distill.data.tables import CAPTION_COLUMNS, VIDEO_COLUMNS, Columns, Videos, is_table, read_rows
from titan_distill.models.base import Adapter

IMAGE = "image"


class FirstFrames:
    """First latent frames of validation videos, by prompt.

    `normalise` is called with parquet data, before its latents are read. Raises ValueError for a file without pictures,
    or one that can't be read.
    """

    def __init__(self, path: str, height: int, width: int, normalise: Callable[[ParquetDataset], None]) -> None:
        self._size = height, width
        self._rows: list[tuple[str, Path]] | ParquetDataset
        if path.lower().endswith(".txt"):
            raise ValueError(
                f"pipeline_config.validate_from_image = true, but {path} holds prompts only; set validation.prompts to "
                "a table with the columns prompt and image, or to parquet with latents"
            )
        self._rows = _pictures(Path(path)) if is_table(Path(path)) else ParquetDataset(path)
        if isinstance(self._rows, ParquetDataset) and not self._rows.has_latents:
            raise ValueError(f"pipeline_config.validate_from_image = true, but {path} has no latents; set it to false")
        if isinstance(self._rows, ParquetDataset):
            normalise(self._rows)

    def latents(self, prompts: Sequence[int], adapter: Adapter) -> Tensor:
        """Returns [B, C, 1, H, W] for the prompts with these indices. Raises ValueError for a picture that can't be
        decoded."""
        return torch.stack([self._latent(index % len(self._rows), adapter) for index in prompts])

    def _latent(self, row: int, adapter: Adapter) -> Tensor:
        if isinstance(self._rows, ParquetDataset):
            latent = self._rows[row].vae_latent
            assert latent is not None
            if latent.shape != adapter.sample_shape:
                raise ValueError(
                    f"{self._rows.path}, row {row}: latents of {list(latent.shape)}, but pipeline_config's num_frames, "
                    f"height and width make {list(adapter.sample_shape)}; validate from images of that size"
                )
            return latent[:, :1].float()
        where, path = self._rows[row]
        try:
            picture = read_picture(path, *self._size)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return adapter.encode_video(picture[None, None])[0]


class PictureRows:
    """Picture tensors `names` (see `image_channels`) by prompt, from the parquet file with the prompts.

    `names` may be empty. Raises ValueError for a file without the tensors.
    """

    def __init__(self, path: str, names: tuple[str, ...]) -> None:
        self._names = names
        if names and (path.lower().endswith(".txt") or is_table(Path(path))):
            raise ValueError(
                f"the models of this run start from images, of which {path} holds no embeddings; set "
                "validation.prompts to parquet from `titan-distill data preprocess --images`"
            )
        self._rows = ParquetDataset(path, tensors=names) if names else None

    def tensors(self, prompts: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Returns tensors [B, ...] by name for the prompts with these indices."""
        if self._rows is None:
            return {}
        rows = [self._rows[index % len(self._rows)].extra for index in prompts]
        return {name: torch.stack([row[name] for row in rows]).float().to(device) for name in self._names}


def _pictures(path: Path) -> list[tuple[str, Path]]:
    rows = list(read_rows(path))
    has_images = bool(rows) and IMAGE in rows[0].values
    columns, files = Columns(CAPTION_COLUMNS, (IMAGE,) if has_images else VIDEO_COLUMNS), Videos(path)
    return [(row.where, files.find(row.where, columns.values(row)[1])) for row in rows]
