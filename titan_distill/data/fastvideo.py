"""Differences between the files of FastVideo's preprocessing and those of `titan_distill.data.parquet`.

Latents of clips are *raw*: means of the VAE's posterior, which its trainer normalises (`titan_distill.data.latents`
decides whether a dataset's are). The picture tensors of image-to-video have other names; they mean the same, and the
picture's latent is normalised. Files lie in folders `worker_N`, and `num_frames` counts latent frames.

A trajectory has one state per sampling step, stored *after* the step beside the timestep *before* it. So each state is
at the timestep of the next step, the last one is the clean end, and the initial noise is not stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow.parquet as pq
from torch import Tensor

from titan_distill.data.location import Location, parquet_source

TRAJECTORY, TIMESTEPS = "trajectory", "trajectory_timesteps"

OWN_NAMES = {"trajectory_latents": TRAJECTORY, "first_frame_latent": "image_latent", "clip_feature": "image_embedding"}
"""Names of tensors here by their names in FastVideo."""

UNREAD = "pil_image"
"""Tensor of uint8 pixels beside the latents of a picture, which nothing here reads."""

_PARTS = ("bytes", "shape", "dtype")


def own_columns(names: Sequence[str]) -> list[str]:
    """Returns the names of a file's columns, with FastVideo's names of tensors replaced where they are not taken."""
    replaced = {f"{theirs}_{part}": f"{own}_{part}" for theirs, own in OWN_NAMES.items() for part in _PARTS}
    return [name if replaced.get(name, name) in names else replaced[name] for name in names]


def is_worker_file(file: Location) -> bool:
    """Returns whether a file lies where FastVideo's preprocessing writes it."""
    return file.parent.name.startswith("worker_")


def counts_latent_frames(file: Location, num_latent_frames: int) -> bool:
    """Returns whether the first row of a file has the number of latent frames as `num_frames`, as FastVideo's have.
    `titan-distill data preprocess` stores the number of the video's frames, which is larger."""
    with pq.ParquetFile(parquet_source(file)) as parquet:
        if "num_frames" not in parquet.schema_arrow.names or not parquet.metadata.num_row_groups:
            return False
        counts = parquet.read_row_group(0, columns=["num_frames"], use_threads=False).column(0)
    return num_latent_frames > 1 and len(counts) > 0 and counts[0].as_py() == num_latent_frames


def split_trajectory(states: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns states [S - 1, C, F, H, W], their timesteps [S - 1] and the clean end [C, F, H, W] of a trajectory of S
    steps, which may have a leading dim of one. Raises ValueError for other shapes."""
    if states.ndim == 6 and len(states) == 1:
        states = states[0]
    timesteps = timesteps.flatten()
    if states.ndim != 5 or len(states) < 2 or len(states) != len(timesteps):
        raise ValueError(
            f"trajectory_latents of {list(states.shape)} at {len(timesteps)} timesteps: expected [steps, C, F, H, W] "
            "with two steps or more and a timestep each"
        )
    return states[:-1], timesteps[1:], states[-1]
