"""Checks of training data and of the run's text encoder against the sizes of a Wan run's networks.

Data that was made for another resolution, another VAE or another text encoder looks like any other. Its first batch
fails deep in the network, after the weights are loaded and the teacher is sampled, or, worse, is cropped and trained
on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from titan_distill.checkpoint.diffusers_folder import read_json
from titan_distill.data.parquet import LatentRow
from titan_distill.models.wan.image_channels import EMBEDDING, LATENT


def check_row(
    latent_shapes: Sequence[tuple[int, ...]], text_width: int, image_width: int | None, row: LatentRow
) -> None:
    """Raises ValueError for a row with other sizes than those of the run.

    `latent_shapes` are (C, F, H, W) of the buckets, or of all samples. `image_width` is that of the networks' CLIP
    embeddings; None if they take none.
    """
    shown = ", ".join(str(list(shape)) for shape in latent_shapes)
    if row.vae_latent is not None and tuple(row.vae_latent.shape) not in latent_shapes:
        raise ValueError(
            f"latents of {list(row.vae_latent.shape)}, but pipeline_config's num_frames, height and width make "
            f"{shown}; change pipeline_config, or preprocess videos at that size"
        )
    width = row.text_embedding.shape[1]
    if width != text_width:
        raise ValueError(
            f"a text embedding of width {width}, but the networks take {text_width}; preprocess the captions with "
            "their text encoder"
        )
    allowed = latent_shapes if row.vae_latent is None else [tuple(row.vae_latent.shape)]
    if (picture := row.extra.get(LATENT)) is not None and tuple(picture.shape) not in allowed:
        raise ValueError(
            f"{LATENT} of {list(picture.shape)}, but pipeline_config's num_frames, height and width make "
            f"{shown}; preprocess the pictures at that size"
        )
    if (tokens := row.extra.get(EMBEDDING)) is not None and (tokens.ndim != 2 or tokens.shape[1] != image_width):
        raise ValueError(
            f"{EMBEDDING} of {list(tokens.shape)}, but the networks take [tokens, {image_width}]; preprocess the "
            "pictures with their image encoder"
        )


def text_width(pipeline: str) -> int | None:
    """Returns the width of the embeddings that the text encoder in a pipeline folder makes; None without a folder or
    where it does not say so. Raises ValueError for a configuration that can't be read."""
    file = Path(pipeline) / "text_encoder" / "config.json"
    if not pipeline or not file.is_file():
        return None
    try:
        return read_json(file).get("d_model")
    except ValueError as error:
        raise ValueError(f"{file} is no configuration of a text encoder ({error}); copy it again") from error
