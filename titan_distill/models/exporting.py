"""The part of a model family that writes what other programs read: networks, pipelines and how to sample them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_distill.diffusion.requests import SampleRequest


class ExportedFormats(ABC):
    """Formats of an exported role. Base of `ModelFamily`."""

    @staticmethod
    @abstractmethod
    def write_weights(
        tensors: Iterable[tuple[str, Tensor]], architecture: dict[str, Any], folder: Path, dtype: torch.dtype | None
    ) -> None:
        """Writes a module's weights in the family's usual format (for Wan, a diffusers folder)."""

    @staticmethod
    def write_original(tensors: Iterable[tuple[str, Tensor]], file: Path, dtype: torch.dtype | None) -> None:
        """Writes a module's weights as one safetensors file, under the names of the family's original code. Raises
        ValueError for weights that this code does not know."""
        raise ValueError("--original: this model family has no other format; leave it out")

    @staticmethod
    def pipeline_index(index: dict[str, Any], modules: Sequence[str], config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the `model_index.json` of an exported role with these modules, from its pipeline's `index` and the
        run's [pipeline_config]. Default: `index` unchanged. Raises ValueError if a needed value is in neither of the
        two."""
        return index

    def exported_scheduler(self, request: SampleRequest) -> dict[str, Any]:
        """Returns the `scheduler_config.json` of an exported role that is sampled as `request` says. Default: empty,
        which leaves that of the pipeline."""
        return {}

    def sampling_section(
        self,
        request: SampleRequest,
        architecture: dict[str, Any],
        modules: Sequence[str],
        index: Mapping[str, Any] | None,
    ) -> str:
        """Returns a text that says how to sample an exported role without this package, for the folder's `README.md`.
        `index` is its `model_index.json`, empty if it has none, and None for `write_original`. Default: an empty
        text."""
        return ""
