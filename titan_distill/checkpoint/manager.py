"""Saving so that a crash at any moment leaves a usable run, and loading only what is whole.

A checkpoint appears in one instant: everything is written to ``step-00000100.tmp-<id>/``, checked against the disk,
described in a manifest, flushed, and then renamed. Only after that are older steps removed, and they too disappear by
a rename first. So a folder with a plain step name is complete, whenever the process died; what else lies around is
removed by the next save. The price is room for one checkpoint more than ``keep``.

Rank 0 decides (names, discovery, retention) and tells the others; a failure on one rank is raised on all of them.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_distill.checkpoint import discovery, state, storage
from titan_distill.checkpoint.manifest import (
    CheckpointDamaged,
    FileRecord,
    FrozenRole,
    Manifest,
    TrainedRole,
    read_manifest,
    record_file,
    verify_hashes,
    verify_sizes,
    write_manifest,
)
from titan_distill.checkpoint.ranks import Ranks
from titan_distill.checkpoint.state import TrainState
from titan_distill.roles import RoleManager

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInfo:
    """What a checkpoint says about the run that wrote it, besides its state. All of it must be JSON-able."""

    family: str
    config_digest: str
    """SHA-256 of the resolved configuration."""
    pipeline_config: dict[str, Any] = field(default_factory=dict)
    architectures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By trainable role: what builds its transformer again (``ModelFamily.architecture``)."""
    frozen: dict[str, FrozenRole] = field(default_factory=dict)
    """The roles that are not saved: where their weights are, and the ``manifest.fingerprint`` of that folder."""


class CheckpointManager:
    """The checkpoints of one run. Construct and use it on every rank: all methods are collective."""

    def __init__(self, folder: Path, keep: int, run_info: RunInfo) -> None:
        assert keep >= 1, "the configuration refuses to keep no checkpoint"
        self.folder, self.keep, self.run_info = folder, keep, run_info
        self.ranks = Ranks()

    def save(self, roles: RoleManager, train_state: TrainState) -> Path:
        """Publishes the step and retires old ones. On failure nothing is published and earlier steps are as they were.

        Saving a step that exists already replaces it. Raises RuntimeError or ValueError, on every rank.
        """
        manifest = self._describe(roles, train_state)
        temporary = self.ranks.on_rank_zero(lambda: self._make_temporary(train_state.step))
        try:
            storage.write(state.collect(roles, train_state), temporary, self.ranks.group)
            files = self._record_files(temporary)
            published = self.ranks.on_rank_zero(
                lambda: self._publish(temporary, dataclasses.replace(manifest, files=files))
            )
        except BaseException:
            if self.ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.ranks.on_rank_zero(lambda: self._retire(published))
        return published

    def find(self, resume_from: str) -> Path | None:
        """The checkpoint that ``checkpoint.resume_from`` means: ``latest`` (of this run; None before the first) or a
        path.

        Raises ValueError for a path without a complete checkpoint, and when this run has only incomplete ones.
        """
        if resume_from == discovery.LATEST:
            return self.find_latest()
        return self.ranks.on_rank_zero(lambda: discovery.resolve(Path(resume_from)))

    def find_latest(self) -> Path | None:
        """The newest complete checkpoint of this run, None before the first. Raises ValueError as ``find`` does."""
        return self.ranks.on_rank_zero(lambda: discovery.find_latest(self.folder))

    def load(self, path: Path, roles: RoleManager) -> TrainState:
        """Restores all trainable roles, whatever layout they have now. Everything is checked before any tensor changes.

        Raises CheckpointDamaged naming the file, or ValueError naming the first value that this run and the
        checkpoint do not share.
        """
        manifest = self.ranks.on_rank_zero(lambda: _verified_sizes(path))
        shared_out = sorted(manifest.files)[self.ranks.rank :: self.ranks.size]
        self.ranks.together(lambda: verify_hashes(path, manifest, shared_out))
        metadata = self.ranks.together(lambda: storage.read_metadata(path))
        target = state.template(roles, metadata.state_dict_metadata.keys())
        self.ranks.together(lambda: storage.check_matches(target, path, metadata))
        if self.ranks.rank == 0:
            self._warn_before_resuming(path, manifest)
        storage.read(target, path, metadata, self.ranks.group)
        return state.restore(target, roles)

    def _describe(self, roles: RoleManager, train_state: TrainState) -> Manifest:
        trained = {
            handle.name: TrainedRole(
                modules=list(handle.modules),
                num_updates=handle.num_updates,
                has_ema=handle.ema is not None,
                mesh=state.mesh_of(handle),
                architecture=self.run_info.architectures.get(handle.name, {}),
            )
            for handle in roles.trainable
        }
        return Manifest(
            step=train_state.step,
            samples_seen=train_state.samples_seen,
            seed=train_state.seed,
            world_size=self.ranks.size,
            config_digest=self.run_info.config_digest,
            family=self.run_info.family,
            pipeline_config=self.run_info.pipeline_config,
            trained=trained,
            frozen=self.run_info.frozen,
            files={},
        )

    def _make_temporary(self, step: int) -> Path:
        for leftover in discovery.temporary_folders(self.folder):
            shutil.rmtree(leftover)
        temporary = _temporary(self.folder / discovery.step_name(step))
        temporary.mkdir(parents=True)
        return temporary

    def _record_files(self, folder: Path) -> dict[str, FileRecord]:
        """Each rank reads back what it wrote: it alone has that cached. Raises CheckpointDamaged when bytes are
        missing."""

        def record_own() -> dict[str, FileRecord]:
            own = list(folder.glob(f"__{self.ranks.rank}_*"))
            if self.ranks.rank == 0:
                own.append(folder / storage.METADATA_NAME)
            return {path.name: record_file(path) for path in own}

        files = {name: record for records in self.ranks.gather(record_own) for name, record in records.items()}
        self.ranks.on_rank_zero(lambda: _check_written(folder, files))
        return files

    def _publish(self, temporary: Path, manifest: Manifest) -> Path:
        write_manifest(temporary, manifest)
        _flush_folder(temporary)
        published = self.folder / discovery.step_name(manifest.step)
        replaced = _move_aside(published) if published.exists() else None
        # Only a run that was rewound replaces a step. Dying right here loses that step, never another one.
        temporary.rename(published)
        _flush_folder(self.folder)
        if replaced is not None:
            shutil.rmtree(replaced)
        return published

    def _retire(self, just_published: Path) -> None:
        """Keeps the newest complete steps. The one just published stays even when a rewound run has later ones."""
        others = [path for path in discovery.complete_steps(self.folder) if path != just_published]
        for path in others[self.keep - 1 :]:
            shutil.rmtree(_move_aside(path))

    def _warn_before_resuming(self, path: Path, manifest: Manifest) -> None:
        for name, saved in manifest.frozen.items():
            now = self.run_info.frozen.get(name)
            if now is not None and now.digest != saved.digest:
                logger.warning(
                    "The weights of %s have changed since the checkpoint: %s, was %s", name, now.path, saved.path
                )
        newest = next(iter(discovery.step_folders(path.parent)), path)
        if newest.name != path.name:
            logger.warning(
                "Resuming from %s; `latest` goes on meaning %s until this run passes it", path.name, newest.name
            )


def _verified_sizes(path: Path) -> Manifest:
    manifest = read_manifest(path)
    verify_sizes(path, manifest)
    return manifest


def _check_written(folder: Path, files: dict[str, FileRecord]) -> None:
    expected = storage.written_files(folder, storage.read_metadata(folder))
    for name, num_bytes in expected.items():
        found = files[name].num_bytes if name in files else 0
        if found != num_bytes:
            raise CheckpointDamaged(
                f"{folder / name} has {found} bytes on disk instead of {num_bytes}; is the disk full?"
            )


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")


def _move_aside(path: Path) -> Path:
    """Takes a checkpoint from discovery in one instant: dying while it is deleted must not leave half of one."""
    aside = _temporary(path)
    path.rename(aside)
    return aside


def _flush_folder(folder: Path) -> None:
    """Waits until the folder's entries are on disk; without it a rename can be forgotten in a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
