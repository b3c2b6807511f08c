"""Checkpoints of a run: saving that leaves a usable checkpoint if the process dies at any moment, and loading of
complete checkpoints.

`commit.py` makes a checkpoint folder appear only when it is complete. With `checkpoint.mode = "sync"` training waits
until the checkpoint is published. With `"async"` it waits only until its state is copied (`asynchronous.py`). While
training continues, a thread with its own process group plans and publishes, and a process of low priority writes
(`writing_process.py`). Both modes write the same files. At most one save runs at a time, and the next one waits for it.
The price of "sync" is time. The price of "async" is a copy of the state in host memory, and a failed save is noticed
some steps later.

Rank 0 chooses names, finds checkpoints and removes old ones, and tells the other ranks. A failure on one rank is raised
on all ranks, at the same step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from titan_distill.checkpoint import commit, discovery, state, storage
from titan_distill.checkpoint.asynchronous import Stage, Stager, in_background
from titan_distill.checkpoint.manifest import (
    AdaptedBase,
    DataRecord,
    FrozenRole,
    Manifest,
    TrainedRole,
)
from titan_distill.checkpoint.resuming import resumable
from titan_distill.checkpoint.state import TrainState
from titan_distill.checkpoint.writing_process import WritingProcess
from titan_distill.fault_tolerance.files import FileRecord
from titan_distill.fault_tolerance.ranks import Ranks
from titan_distill.fault_tolerance.run_lock import RunLock
from titan_distill.roles import RoleManager

BACKGROUND_PATIENCE = 30
"""Times the timeout of other collectives that ranks wait for each other in a save in the background. On a node whose
cores are all busy the writing process takes up to thirty times as long (`writing_process.py`)."""
PATIENCE_SECONDS = 60.0
"""Seconds that a failed run waits for a save in progress. Earlier checkpoints do not depend on that save."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInfo:
    """Description of a run that is stored in the manifests of its checkpoints. All values must be representable in
    JSON."""

    family: str
    config_digest: str
    """SHA-256 of the resolved configuration."""
    pipeline_config: dict[str, Any] = field(default_factory=dict)
    architectures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Architecture of each trainable role (`ModelFamily.architecture`), to build it again."""
    frozen: dict[str, FrozenRole] = field(default_factory=dict)
    """Frozen roles: the folder of the weights and its `fingerprint`."""
    bases: dict[str, AdaptedBase] = field(default_factory=dict)
    """Base weights of each role that trains a LoRA adapter; the checkpoint contains only the LoRA adapter."""
    run: str = ""
    """Id of the run (`run_folder.Run`)."""
    noise_version: int | None = None
    """Version of the noise that the run draws (`diffusion.noise.NOISE_VERSION`)."""
    config: dict[str, Any] | None = None
    """Resolved configuration, secrets redacted."""
    data: DataRecord | None = None
    """Data that the run trains on."""


class CheckpointManager:
    """Saves and loads the checkpoints of one run. Use it on every rank: all methods are collective unless stated
    otherwise.

    It is a context manager around training, and waits at the end for the last save. `timeout_seconds` limits the time
    that ranks wait for each other in a save or load, see `Ranks`. With a `lock`, which rank 0 holds, nothing is
    published after another process has taken the folder over.
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
        lock: RunLock | None = None,
    ) -> None:
        assert keep >= 1, "the configuration refuses to keep no checkpoint"
        self.folder, self.keep, self.run_info, self.is_async = folder, keep, run_info, mode == "async"
        self._check_lock = (lambda: None) if lock is None else lock.check
        self.ranks = Ranks(timeout_seconds)
        # Groups are not for two threads at once: the saving thread has its own.
        # Training goes on meanwhile, a writer of low priority may be slow, and the heartbeat notices a lost rank.
        patience = BACKGROUND_PATIENCE * timeout_seconds if timeout_seconds else None
        self._saving_ranks = Ranks(patience) if self.is_async else self.ranks
        self._device = device or torch.device("cpu")
        self._stager = Stager(self._device)
        self._stage: Stage | None = None
        self._saving: Future[None] | None = None
        self._saving_name = ""
        self._resumed_from: Path | None = None

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Waits for the save in progress: without limit, or for at most PATIENCE_SECONDS if the run has failed."""
        if error is None:
            self.wait()
        elif self._saving is not None:
            self._wait_alone(self._saving)

    @property
    def is_saving(self) -> bool:
        """Whether a save is in progress, or has ended and its result is not yet checked. Equal on all ranks."""
        return self._saving is not None

    def save(self, roles: RoleManager, train_state: TrainState) -> Path:
        """Publishes the step and removes old ones. In mode "async" it waits for the previous save and starts this one.

        Returns the folder of the step, which may not exist yet in mode "async". On failure nothing is published and
        earlier steps are unchanged. An existing step of the same number is replaced. Raises RankFailure or ValueError,
        on every rank.
        """
        self.wait()
        name = discovery.step_name(train_state.step)
        manifest, collected = self._describe(roles, train_state), state.collect(roles, train_state)
        # Where this run comes from stays until the run has something newer.
        resumed = self._resumed_from
        needed = [resumed] if resumed is not None and resumed.name >= name else []
        if self.is_async:
            stage = self._stager.begin(collected, _steady(roles))
            process = self.ranks.together(lambda: WritingProcess(self._stager.memory))
            self._stage, self._saving_name = stage, name
            self._saving = in_background("checkpoint", lambda: self._publish(manifest, stage, needed, process))
        else:
            self._publish(manifest, Stage(collected), needed)
        return self.folder / name

    def before_change(self) -> None:
        """Waits until the state is copied. Call it before weights, optimizer moments or EMA change. Not collective."""
        if self._stage is not None:
            self._stage.is_complete.wait()
            self._stage = None

    def poll(self) -> None:
        """Raises the error of the save in progress if it has failed, on all ranks at the same step. Call it between two
        steps."""
        if self._saving is not None and self.ranks.all(self._saving.done()):
            self.wait()

    def wait(self) -> None:
        """Waits until no save is in progress. Raises the errors of `save` if it has failed."""
        if (saving := self._saving) is not None:
            self._saving = None
            self.ranks.together(saving.result)

    def load(self, path: Path, roles: RoleManager) -> TrainState:
        """Restores all trainable roles, in any layout. Everything is checked before any tensor changes.

        Raises CheckpointDamaged with the name of the file, or ValueError with the name of the first value that only
        this run or only the checkpoint has.
        """
        manifest = self.ranks.on_rank_zero(lambda: resumable(path))
        self.ranks.together(lambda: self._check_bases(path, manifest))
        self.ranks.together(lambda: self._check_architectures(path, manifest))
        metadata = storage.open_together(path, manifest, self.ranks)
        target = state.template(roles, metadata.state_dict_metadata.keys())
        self.ranks.together(lambda: storage.check_matches(target, path, metadata))
        if self.ranks.rank == 0:
            self._warn_before_resuming(path, manifest)
        storage.read(target, path, metadata, self.ranks.group)
        self._resumed_from = self.folder / path.name if path.resolve().parent == self.folder.resolve() else None
        return state.restore(target, roles)

    def _describe(self, roles: RoleManager, train_state: TrainState) -> Manifest:
        info = self.run_info
        trained = {
            handle.name: TrainedRole(
                modules=list(handle.modules),
                num_updates=handle.num_updates,
                has_ema=handle.ema is not None,
                mesh=state.mesh_of(handle),
                architecture=info.architectures.get(handle.name, {}),
                base=info.bases.get(handle.name),
            )
            for handle in roles.trainable
        }
        return Manifest(
            **vars(train_state),
            world_size=self.ranks.size,
            config_digest=info.config_digest,
            family=info.family,
            pipeline_config=info.pipeline_config,
            trained=trained,
            frozen=info.frozen,
            files={},
            run=info.run,
            noise_version=info.noise_version,
            config=info.config,
            data=info.data,
        )

    def _publish(
        self, manifest: Manifest, stage: Stage, needed: list[Path], process: WritingProcess | None = None
    ) -> None:
        ranks = self._saving_ranks

        def write(folder: Path) -> dict[str, FileRecord]:
            return storage.write(stage.state, folder, ranks.group, stage.copies, process)

        try:
            if self.is_async and self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a new thread's is 0, and using it would cost memory there
            with process or nullcontext():
                ranks.together(stage.finish)
                commit.publish_step(self.folder, manifest, write, ranks, self.keep, needed, self._check_lock)
        finally:
            stage.is_complete.set()  # whatever has failed, nobody waits for it in vain

    def _wait_alone(self, saving: Future[None]) -> None:
        """Waits for a save without a collective, because the other ranks may be lost."""
        name = self._saving_name
        logger.warning("Waiting up to %.0f s until %s is saved; interrupt again to give it up", PATIENCE_SECONDS, name)
        if not wait([saving], PATIENCE_SECONDS).done:
            logger.warning("%s is not saved: it took too long; earlier checkpoints are unchanged", name)
        elif (failure := saving.exception()) is not None:  # the run's own error is the one to raise
            logger.warning("%s is not saved: %s", name, failure)
        else:
            logger.warning("%s is saved", name)

    def _check_bases(self, path: Path, manifest: Manifest) -> None:
        for name, trained in manifest.trained.items():
            saved, now = trained.base, self.run_info.bases.get(name)
            if saved is not None and now is not None and (saved.digest, saved.scale) != (now.digest, now.scale):
                raise ValueError(
                    f"{path} has a LoRA adapter of {name!r} for {saved.path} with scaling {saved.scale:g}, but this "
                    f"run's is for {now.path} with scaling {now.scale:g}, or those weights have changed; resume with "
                    "the same weights and roles.<name>.lora"
                )

    def _check_architectures(self, path: Path, manifest: Manifest) -> None:
        for name, trained in manifest.trained.items():
            saved, now = trained.architecture, self.run_info.architectures.get(name, {})
            # The family is compared elsewhere; version 0.1 recorded the type that FSDP had made of a head.
            for key in sorted((saved.keys() & now.keys()) - {"_class_name"}):
                if json.dumps(saved[key]) != json.dumps(now[key]):  # a tuple is saved as a list
                    raise ValueError(
                        f"roles.{name} has {key} = {now[key]}, but {path} was saved with {saved[key]}; name a network "
                        "of the same architecture, or start a new run with roles.<name>.init_from"
                    )

    def _warn_before_resuming(self, path: Path, manifest: Manifest) -> None:
        for name, saved in manifest.frozen.items():
            now = self.run_info.frozen.get(name)
            if now is not None and now.digest != saved.digest:
                logger.warning(
                    "The weights of %s have changed since the checkpoint: %s, was %s", name, now.path, saved.path
                )
        if manifest.noise_version != self.run_info.noise_version:
            logger.warning(
                "Noise changes from here: the checkpoint's run drew noise of version %s, this one draws version %s",
                manifest.noise_version or "1 (not recorded)",
                self.run_info.noise_version,
            )
        logger.info("Resuming from %s", path)
        newest = next(iter(discovery.step_folders(path.parent)), path)
        if newest.name != path.name:
            logger.warning("`latest` means %s until this run passes it", newest.name)


def _steady(roles: RoleManager) -> Iterator[Tensor]:
    """Returns the tensors that change only when a role steps or its EMA is swapped in: nearly all of a run's state."""
    for handle in roles.trainable:
        for module in handle.modules.values():
            yield from module.parameters()
        for optimizer in handle.optimizers.values():
            for moments in optimizer.state.values():
                yield from (value for value in moments.values() if isinstance(value, Tensor))
        if handle.ema is not None:
            yield from handle.ema.shadow.values()
