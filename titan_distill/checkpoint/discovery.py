"""Search for usable checkpoints in a folder, and for the checkpoint that a path such as `.../latest` means.

A killed save leaves a folder behind. A folder therefore counts as a checkpoint only if its name is exact
(`step-00000100`, no suffix), its manifest is intact, and every file has the size in the manifest. Loading also compares
the hashes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from titan_distill.checkpoint.manifest import MANIFEST_NAME, CheckpointDamaged, read_manifest, verify_sizes
from titan_distill.config.paths import of_key
from titan_distill.fault_tolerance.run_folder import read_run

LATEST = "latest"
CHECKPOINTS = "checkpoints"
"""Folder of a run that has its checkpoints."""
PIN_NAME = "pin"
"""Name of the file that pins a step: saves never remove a step whose folder contains it (`touch
.../step-00000100/pin`)."""
_STEP_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY_NAME = re.compile(r"step-\d{8,}\.tmp-.+")

logger = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """Returns the folder name of a step."""
    return f"step-{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Returns all folders in `folder` that are named like a checkpoint, newest first, complete or not."""
    found = [path for path in _children(folder) if _STEP_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def is_pinned(path: Path) -> bool:
    """Returns whether the step is pinned. `checkpoint.keep` neither removes nor counts pinned steps."""
    return (path / PIN_NAME).exists()


def temporary_folders(folder: Path) -> list[Path]:
    """Returns the temporary folders in `folder`, of saves that are in progress or were killed."""
    return [path for path in _children(folder) if _TEMPORARY_NAME.fullmatch(path.name)]


def complete_steps(folder: Path) -> Iterator[Path]:
    """Yields the complete checkpoints of the run that owns `folder`, newest first.

    Warns about each incomplete one that it passes. Checkpoints of another run are passed in silence: the run's own
    never depend on them. Those without an id are the folder's.
    """
    owner = read_run(folder.parent)
    for path in step_folders(folder):
        try:
            manifest = read_manifest(path)
            if owner is None or manifest.run in ("", owner.id):
                verify_sizes(path, manifest.files)
                yield path
        except CheckpointDamaged as damage:
            logger.warning("Skipping an incomplete checkpoint: %s", damage)


def find_latest(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint, or None if the folder has no checkpoint.

    Raises ValueError if there are checkpoints but all are incomplete or of other runs, because a run must not silently
    start again at step 0.
    """
    newest = next(complete_steps(folder), None)
    if newest is None and (broken := step_folders(folder)):
        raise ValueError(
            f"none of the {len(broken)} checkpoints in {folder} is a complete one of this run (each incomplete one is "
            "named in a warning above); name another checkpoint, or another --job.name to start from step 0"
        )
    return newest


def find(folder: Path, resume_from: str) -> Path | None:
    """Returns the checkpoint that `checkpoint.resume_from` names: a path, or `latest` of the run in `folder`.

    Returns None for `latest` if the run has no checkpoint yet. Raises ValueError for a path without a complete
    checkpoint, for one in `folder` that belongs to another run, and for `latest` if the run has only incomplete ones.
    """
    if resume_from == LATEST:
        return find_latest(folder)
    with of_key("checkpoint.resume_from", resume_from):
        path = resolve(Path(resume_from))
    owner = read_run(folder.parent)
    saved = read_manifest(path).run
    if path.resolve().parent == folder.resolve() and owner is not None and saved not in ("", owner.id):
        raise ValueError(
            f"{path} belongs to run {saved}, but {folder.parent} to run {owner.id}; move it to a folder of its own"
        )
    return path


def resolve(path: Path) -> Path:
    """Returns the checkpoint that `path` means: one step's folder, `.../checkpoints/latest`, or a run's folder, which
    means its latest. Raises ValueError.

    `latest` is an alias that is looked up here, not a link on disk, so it can't point to something incomplete.
    """
    if (path / CHECKPOINTS).is_dir() and not (path / MANIFEST_NAME).exists():
        path = path / CHECKPOINTS / LATEST
    if path.name == LATEST and not path.exists():
        newest = find_latest(path.parent)
        if newest is None:
            raise ValueError(f"there is no checkpoint in {path.parent}; train first, or name another folder")
        return newest
    if not path.is_dir():
        known = ", ".join(step.name for step in step_folders(path.parent)) or "no checkpoints"
        raise ValueError(f"there is no checkpoint {path}; {path.parent} has {known}")
    verify_sizes(path, read_manifest(path).files)
    return path


def _children(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())
