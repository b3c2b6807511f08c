"""Stored Wan networks in a diffusers folder or in a role of a checkpoint. Each file is read once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path

from titan_distill.checkpoint.diffusers_folder import TRANSFORMER, TRANSFORMER_2, network_folder, open_folder
from titan_distill.checkpoint.initial_weights import WeightsReference, read_weights, resolve_reference
from titan_distill.config.paths import is_reference
from titan_distill.config.sections import Tile
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.state_dict import GATE, check_weights, load_weights, read_config
from titan_distill.models.wan.transformer import WanTransformer

EXPERTS = (TRANSFORMER, TRANSFORMER_2)

WeightLoader = Callable[[WanTransformer], None]
"""Function that fills a materialised model, in any layout, with weights."""


class StoredWeights:
    """The networks that a role starts from. `weights` names a diffusers folder or, where `may_refer`, perhaps a role in
    a checkpoint."""

    def __init__(self, weights: str, *, may_refer: bool) -> None:
        self.weights = weights
        self._refers = may_refer and is_reference(weights)
        self._architectures: dict[str, WanConfig] = {}

    @functools.cached_property
    def _reference(self) -> WeightsReference | None:
        return resolve_reference(self.weights) if self._refers else None

    @functools.cached_property
    def experts(self) -> tuple[str, ...]:
        """Names of the stored networks."""
        if self._reference is not None:
            return tuple(self._reference.trained.modules)
        return EXPERTS if (Path(self.weights) / TRANSFORMER_2).is_dir() else EXPERTS[:1]

    def architecture(self, expert: str) -> WanConfig:
        """Returns the configuration of one network. Raises ValueError if it cannot be read."""
        if expert not in self._architectures:
            self._architectures[expert] = (
                read_config(network_folder(Path(self.weights), expert))
                if self._reference is None
                else WanConfig.from_diffusers(self._reference.trained.architecture)
            )
        return self._architectures[expert]

    def tile(self, expert: str, *, by_name: bool) -> Tile | None:
        """Returns the tile of the sparse attention that one network was trained with; None for dense weights. Weights
        of others may have gates that their configuration does not mention; `by_name` does not look for them."""
        config = self.architecture(expert)
        is_sparse = config.sparse_attention
        if not (is_sparse or by_name or self._reference):
            shapes = open_folder(network_folder(Path(self.weights), expert)).shapes
            is_sparse = any(GATE in name for name in shapes)
        return config.vsa_tile if is_sparse else None

    def check(self, build: Callable[[], WanTransformer], expert: str) -> None:
        """Compares names, shapes and stored types of one network's tensors with the model that `build` returns, which
        may be on the meta device. Raises ValueError. Tensors of a checkpoint are compared when they are read, so no
        model is built for them."""
        if self._reference is None:
            check_weights(build(), network_folder(Path(self.weights), expert))

    def loader(self, expert: str) -> WeightLoader:
        """Returns a function that fills a model with one network's weights. Nothing is read before it is called."""
        if self._refers:
            return partial(read_weights, self.weights, name=expert)
        return partial(load_weights, folder=network_folder(Path(self.weights), expert))
