"""Checks of a resume against the checkpoint's manifest, before any network is built: configuration and data.

Every key either takes effect on a resume or is refused (`config/resume.py`), so the configuration that a run records
is the one that it trains with. The data must be the checkpoint's, because the order of samples is a function of its
rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_distill.checkpoint import discovery
from titan_distill.checkpoint.manifest import DataRecord, Manifest, read_manifest, verify_sizes
from titan_distill.config.changes import Change, changes
from titan_distill.config.config import Config
from titan_distill.config.resume import LOGGED, REFUSED
from titan_distill.config.sections import FIRST_TILE, Tile
from titan_distill.data.order import check_version

_ALWAYS_RECORDED = ("job.seed", "recipe.family")
"""Keys that manifests without a configuration have, too."""
_NEW_RUN = "start a new run from its weights with roles.<name>.init_from"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resume:
    """A checkpoint to resume from, and the keys that have changed since."""

    path: Path
    manifest: Manifest
    changes: list[Change]

    @property
    def order_version(self) -> int:
        """Version of the order of samples, with which the run goes on."""
        return 1 if self.manifest.data is None else self.manifest.data.order_version

    def check_data(self, data: DataRecord, config: Config) -> None:
        """Raises ValueError for other data than the checkpoint's, unless `checkpoint.allow_changed_data` is set, and
        for an order of samples that is not known."""
        check_version(self.order_version)
        saved = self.manifest.data
        if saved is None:
            logger.warning("The checkpoint does not record its data: whether it has changed since is not known")
        elif (saved.num_rows, saved.digest) != (data.num_rows, data.digest):
            named = ", ".join(f"{key} = {path!r}" for key, path in config.data.keys.items())
            difference = f"{named} has {data}, but {self.path} was saved with {saved}"
            if not config.checkpoint.allow_changed_data:
                same = "the same sets, order and weights" if config.data.sources else "the same data"
                raise ValueError(f"{difference}; name {same}, or go on with this by --checkpoint.allow_changed_data")
            logger.warning("Data has changed: %s; samples come in the order of the present data from here", difference)

    def log_changes(self) -> None:
        """Logs one line per key that takes effect with another value."""
        if self.manifest.config is None:
            keys = " and ".join(_ALWAYS_RECORDED)
            logger.warning("The checkpoint does not record its configuration: only %s are compared", keys)
        for change in self.changes:
            if change.resume == LOGGED:
                logger.warning("Changed since the checkpoint: %s", change)


def find_resume(config: Config) -> Resume | None:
    """Returns the checkpoint that `checkpoint.resume_from` names; None for a fresh start.

    Raises ValueError if there is no such checkpoint, or if the configuration has a change that a resume refuses.
    """
    if not config.checkpoint.resume_from:
        return None
    path = discovery.find(config.job.output_folder / "checkpoints", config.checkpoint.resume_from)
    if path is None:
        return None
    manifest = resumable(path)
    found = _changes(manifest, config)
    if refused := [str(change) for change in found if change.resume == REFUSED]:
        raise ValueError(f"{path} cannot be resumed with {', '.join(refused)}; set it back, or {_NEW_RUN}")
    _check_ema(path, manifest, config)
    if manifest.step > config.training.steps:
        raise ValueError(
            f"training.steps = {config.training.steps}, but {path} has done {manifest.step} already; raise it"
        )
    return Resume(path, manifest, found)


def follow_tiles(config: Config) -> Config:
    """Returns the configuration with the tiles of the checkpoint that `checkpoint.resume_from` names.

    Raises ValueError if there is no such checkpoint, or if a role is to have another tile.
    """
    if not (config.checkpoint.resume_from and config.sparse_roles):
        return config
    path = discovery.find(config.job.output_folder / "checkpoints", config.checkpoint.resume_from)
    if path is None:
        return config
    saved = read_manifest(path).config or {}
    found = {name: tile for name in config.sparse_roles if (tile := _saved_tile(saved, name)) is not None}
    for name, tile in found.items():
        config.check_tile(name, tile, str(path))
    return config.with_tiles(found)


def _saved_tile(saved: Mapping[str, Any], role: str) -> Tile | None:
    """Returns the tile of a role in a checkpoint's configuration; None if the role was not there, or not sparse."""
    if saved and saved["roles"].get(role, {}).get("attention") != "sparse":
        return None
    section = saved.get("sparse_attention", {}).get("tile", list(FIRST_TILE))
    frames, height, width = saved.get("roles", {}).get(role, {}).get("tile") or section
    return frames, height, width


def resumable(path: Path) -> Manifest:
    """Reads the manifest of a checkpoint to resume from. Raises CheckpointDamaged, or ValueError if it holds weights
    only."""
    manifest = read_manifest(path)
    if manifest.weights_only:
        raise ValueError(
            f"{path} holds weights only, so no run can be resumed from it; start one with roles.<name>.init_from"
        )
    verify_sizes(path, manifest.files)
    return manifest


def _changes(manifest: Manifest, config: Config) -> list[Change]:
    if manifest.config is not None:
        return changes(manifest.config, config)
    recorded = {"job": {"seed": manifest.seed}, "recipe": {"family": manifest.family}}
    return [change for change in changes(recorded, config) if change.key in _ALWAYS_RECORDED]


def _check_ema(path: Path, manifest: Manifest, config: Config) -> None:
    for name, trained in manifest.trained.items():
        averages = config.ema.decay > 0 and config.ema.role == name
        if averages != trained.has_ema:
            has, remedy = ("an", "above 0") if trained.has_ema else ("no", "to 0")
            raise ValueError(
                f"ema.decay = {config.ema.decay:g}, but {path} has {has} EMA of {name!r}, and a resume neither begins "
                f"nor drops one; set it {remedy}, or {_NEW_RUN}"
            )
