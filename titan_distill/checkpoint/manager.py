"""The checkpoints of a run: saving so that a crash at any moment leaves a usable run, and loading only what is whole.

``protocol.py`` makes a checkpoint appear in one instant, or not at all; here is what a run does with that. With
``checkpoint.mode = "sync"`` training waits until a step is published. With ``"async"`` it waits only until the state of
the step can't be lost any more to training itself (``staging.py``): a thread writes and publishes while training goes
on, over a process group of its own. Both write the same files. At most one save is under way; a save that is due
earlier waits for it. The price of "sync" is time, of "async" one copy of the state in host memory, and that a failure
is noticed some steps later.

Rank 0 decides (names, discovery, retention) and tells the others; a failure on one rank is raised on all of them, at
the same step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from titan_distill.checkpoint import discovery, state, storage
from titan_distill.checkpoint.background import Background
from titan_distill.checkpoint.manifest import (
    AdaptedBase,
    FrozenRole,
    Manifest,
    TrainedRole,
    read_manifest,
    verify_hashes,
    verify_sizes,
)
from titan_distill.checkpoint.protocol import Protocol, Snapshot
from titan_distill.checkpoint.ranks import Ranks
from titan_distill.checkpoint.staging import Stage, Stager
from titan_distill.checkpoint.state import TrainState
from titan_distill.roles import RoleManager

PATIENCE_SECONDS = 60.0
"""How long a run that ends by an error waits for the save under way. Earlier checkpoints don't depend on it."""

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
    bases: dict[str, AdaptedBase] = field(default_factory=dict)
    """By role of which only adapters are saved: what they are for."""
    noise_version: int | None = None
    """Of the noise that the run draws (`diffusion.noise.NOISE_VERSION`)."""


class CheckpointManager:
    """The checkpoints of one run. Construct and use it on every rank: all methods are collective, unless they say so.

    Around training it is a context manager, which waits for the last save. ``timeout_seconds`` is how long ranks wait
    for each other when they save and load, see `Ranks`.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        run_info: RunInfo,
        *,
        mode: Literal["sync", "async"] = "sync",
        device: torch.device | None = None,
        timeout_seconds: float | None = None,
    ) -> None:
        assert keep >= 1, "the configuration refuses to keep no checkpoint"
        self.folder, self.run_info, self.is_async = folder, run_info, mode == "async"
        self.ranks = Ranks(timeout_seconds)
        # Groups are not for two threads at once: the saving thread has its own.
        self._protocol = Protocol(folder, keep, Ranks(timeout_seconds) if self.is_async else self.ranks)
        self._device = device or torch.device("cpu")
        self._background, self._stager = Background(), Stager(self._device)
        self._stage: Stage | None = None
        self._saving_step = 0
        self._resumed_from: Path | None = None

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the save under way: as long as it takes, or for a while when the run has failed."""
        if error is None:
            self.wait()
        elif self._background.is_busy:
            self._wait_alone()

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way, or done and not yet looked at; the same on all ranks."""
        return self._background.is_busy

    def save(self, roles: RoleManager, train_state: TrainState) -> Path:
        """Publishes the step and retires old ones; asynchronously, it waits for the save before and begins this one.

        Returns the folder that the step has, or will have. On failure nothing is published and earlier steps are as
        they were. Saving a step that exists already replaces it. Raises RankFailure or ValueError, on every rank.
        """
        self.wait()
        manifest, collected = self._describe(roles, train_state), state.collect(roles, train_state)
        needed = self._still_needed(train_state.step)
        if not self.is_async:
            return self._protocol.save(Snapshot(manifest, collected), lambda: None, needed)
        stage = self._stage = self._stager.begin(collected, _steady(roles))
        snapshot = Snapshot(manifest, stage.state, stage.copies)
        self._saving_step = train_state.step
        self._background.start("checkpoint", lambda: self._save_staged(snapshot, stage, needed))
        return self.folder / discovery.step_name(train_state.step)

    def before_change(self) -> None:
        """Call it before a role's weights, moments or average change: waits until they are copied. Not collective."""
        if self._stage is not None:
            self._stage.is_complete.wait()
            self._stage = None

    def poll(self) -> None:
        """Call it between two steps: raises what the save under way has failed with, on all ranks at the same step."""
        if self.is_saving and self.ranks.all(self._background.is_done):
            self.wait()

    def wait(self) -> None:
        """Waits until no save is under way. Raises as ``save`` does when it has failed."""
        if self.is_saving:
            self.ranks.together(self._background.join)

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
        manifest = self.ranks.on_rank_zero(lambda: _resumable(path))
        shared_out = sorted(manifest.files)[self.ranks.rank :: self.ranks.size]
        self.ranks.together(lambda: verify_hashes(path, manifest, shared_out))
        metadata = self.ranks.together(lambda: storage.read_metadata(path))
        target = state.template(roles, metadata.state_dict_metadata.keys())
        self.ranks.together(lambda: self._check_bases(path, manifest))
        self.ranks.together(lambda: storage.check_matches(target, path, metadata))
        if self.ranks.rank == 0:
            self._warn_before_resuming(path, manifest)
        storage.read(target, path, metadata, self.ranks.group)
        self._resumed_from = self.folder / path.name if path.resolve().parent == self.folder.resolve() else None
        return state.restore(target, roles)

    def _describe(self, roles: RoleManager, train_state: TrainState) -> Manifest:
        trained = {
            handle.name: TrainedRole(
                modules=list(handle.modules),
                num_updates=handle.num_updates,
                has_ema=handle.ema is not None,
                mesh=state.mesh_of(handle),
                architecture=self.run_info.architectures.get(handle.name, {}),
                base=self.run_info.bases.get(handle.name),
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
            noise_version=self.run_info.noise_version,
        )

    def _save_staged(self, snapshot: Snapshot, stage: Stage, needed: list[Path]) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a new thread's is 0, and using it would cost memory there
            self._protocol.save(snapshot, stage.finish, needed)
        finally:
            stage.is_complete.set()  # whatever has failed, nobody waits for it in vain

    def _wait_alone(self) -> None:
        """Without asking the other ranks, which may not be there any more."""
        name = discovery.step_name(self._saving_step)
        logger.warning("Waiting up to %.0f s until %s is saved; interrupt again to give it up", PATIENCE_SECONDS, name)
        try:
            if self._background.join(PATIENCE_SECONDS):
                logger.warning("%s is saved", name)
            else:
                logger.warning("%s is not saved: it took too long; earlier checkpoints are as they were", name)
        except (RuntimeError, ValueError) as failure:  # the run's own error is the one to raise
            logger.warning("%s is not saved: %s", name, failure)

    def _still_needed(self, step: int) -> list[Path]:
        """Where this run comes from, until it has something newer."""
        resumed = self._resumed_from
        return [resumed] if resumed is not None and resumed.name >= discovery.step_name(step) else []

    def _check_bases(self, path: Path, manifest: Manifest) -> None:
        for name, trained in manifest.trained.items():
            saved, now = trained.base, self.run_info.bases.get(name)
            if saved is not None and now is not None and (saved.digest, saved.scale) != (now.digest, now.scale):
                raise ValueError(
                    f"{path} has adapters of {name!r} for {saved.path}, counted {saved.scale:g} times, but this run's "
                    f"are for {now.path}, counted {now.scale:g} times, or those weights have changed; resume with the "
                    "same weights and roles.<name>.lora"
                )

    def _warn_before_resuming(self, path: Path, manifest: Manifest) -> None:
        for name, saved in manifest.frozen.items():
            now = self.run_info.frozen.get(name)
            if now is not None and now.digest != saved.digest:
                logger.warning(
                    "The weights of %s have changed since the checkpoint: %s, was %s", name, now.path, saved.path
                )
        if manifest.config_digest != self.run_info.config_digest:
            logger.warning("The configuration has changed since the checkpoint: config.toml has the present one")
        if manifest.noise_version != self.run_info.noise_version:
            logger.warning(
                "Noise changes from here: the checkpoint's run drew noise of version %s, this one draws version %s",
                manifest.noise_version or "1 (not recorded)",
                self.run_info.noise_version,
            )
        logger.info("Resuming from %s", path)
        newest = next(iter(discovery.step_folders(path.parent)), path)
        if newest.name != path.name:
            logger.warning("`latest` goes on meaning %s until this run passes it", newest.name)


def _resumable(path: Path) -> Manifest:
    manifest = read_manifest(path)
    if manifest.weights_only:
        raise ValueError(
            f"{path} holds weights only, so no run can be resumed from it; start one with roles.<name>.init_from"
        )
    verify_sizes(path, manifest)
    return manifest


def _steady(roles: RoleManager) -> Iterator[Tensor]:
    """What only changes when a role steps, or is swapped with its average: nearly all of a run's state."""
    for handle in roles.trainable:
        for module in handle.modules.values():
            yield from module.parameters()
        for optimizer in handle.optimizers.values():
            for moments in optimizer.state.values():
                yield from (value for value in moments.values() if isinstance(value, Tensor))
        if handle.ema is not None:
            yield from handle.ema.shadow.values()
