"""Wan's keys in the `model_index.json` of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_distill.checkpoint.diffusers_folder import PIPELINE_INDEX, TRANSFORMER, TRANSFORMER_2, read_json

BOUNDARY = "boundary_ratio"
"""Timestep, as a share of 1000, at which the high-noise expert hands over to the low-noise one."""
EXPAND_TIMESTEPS = "expand_timesteps"
"""Whether each frame has a time of its own, as a given first frame needs."""


def exported_index(index: dict[str, Any], modules: Sequence[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the index of an exported role, from the index of the pipeline whose other parts it has.

    The role may have another number of experts than that pipeline, and start videos from images. `config` is the run's
    [pipeline_config]. Raises ValueError when neither `config` nor `index` has the boundary of two experts.
    """
    if TRANSFORMER_2 in modules:
        boundary = config.get(BOUNDARY)
        boundary = index.get(BOUNDARY) if boundary is None else boundary
        if boundary is None:
            raise ValueError(f"neither the run nor its pipeline says {BOUNDARY}; name a --pipeline with two experts")
        index = index | {TRANSFORMER_2: index[TRANSFORMER], BOUNDARY: boundary}
    elif index.get(BOUNDARY) is not None or index.get(TRANSFORMER_2, [None])[0] is not None:
        index = index | {TRANSFORMER_2: [None, None], BOUNDARY: None}
    return index | {EXPAND_TIMESTEPS: True} if config.get("image_probability") else index


def read_index(folder: str) -> dict[str, Any]:
    """Returns the model_index.json of a diffusers pipeline; empty if `folder` has none. Raises ValueError for an
    invalid file."""
    file = Path(folder) / PIPELINE_INDEX
    if not folder or not file.is_file():
        return {}
    try:
        return read_json(file)
    except ValueError as error:
        raise ValueError(f"{file} is no index of a pipeline ({error}); copy it again") from error
