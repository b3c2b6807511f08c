"""Atomic publication of a checkpoint folder, written by all ranks of a run or by one process.

The ranks write to the temporary folder `step-00000100.tmp-<id>/`. They verify the sizes of their files, write the
manifest and flush everything to disk. Then the folder is renamed to `step-00000100`. Only after that are older steps
removed, each renamed before it is deleted. Each phase ends with a collective, so a failure on one rank is raised on all
ranks and nothing is published. A process may die at any moment: a folder without the suffix `.tmp-<id>` is complete,
and the next save removes the others.

A save runs in the training thread or in its own thread, over a process group that nothing else uses.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from titan_distill.checkpoint import discovery, storage
from titan_distill.checkpoint.manifest import CheckpointDamaged, Manifest, read_manifest, verify_sizes, write_manifest
from titan_distill.fault_tolerance.files import FileRecord, flush_folder, temporary_beside
from titan_distill.fault_tolerance.ranks import RankFailure, Ranks

logger = logging.getLogger(__name__)

Write = Callable[[Path], Mapping[str, FileRecord]]
"""Function that writes the data of a checkpoint into a folder and returns the records of this rank's files.
Collective."""


def publish_step(
    folder: Path,
    manifest: Manifest,
    write: Write,
    ranks: Ranks,
    keep: int,
    needed: Collection[Path],
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Publishes a step of a run in `folder`, then removes all but the newest `keep` steps and those in `needed`.

    `check` is called on rank 0 before anything in `folder` changes, and again before the step appears; its error ends
    the save. An existing step of the same number is replaced. Raises the errors of `publish`, and RankFailure if that
    step is pinned.
    """
    path = folder / discovery.step_name(manifest.step)
    ranks.on_rank_zero(lambda: _make_way(path, manifest.run, check))
    publish(path, manifest, write, ranks, check)
    ranks.on_rank_zero(lambda: _retire(folder, keep, {path, *needed}))
    return path


def publish(
    path: Path, manifest: Manifest, write: Write, ranks: Ranks, check: Callable[[], None] = lambda: None
) -> None:
    """Publishes the files that `write` writes as the folder `path`, with `manifest` and the records that `write`
    returns.

    On failure nothing is published and nothing is left behind. Raises RankFailure or ValueError, on every rank.
    """
    temporary = ranks.on_rank_zero(lambda: _make_temporary(path))
    try:
        written = write(temporary)
        by_rank = ranks.gather(lambda: _compared(temporary, written))
        files = {name: record for records in by_rank for name, record in records.items()}
        ranks.on_rank_zero(lambda: _finish(temporary, path, dataclasses.replace(manifest, files=files), check))
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _make_way(path: Path, run: str, check: Callable[[], None]) -> None:
    check()
    if path.exists() and (owner := _run_of(path)) not in ("", run):
        # Such a folder was put here by hand. It is not worth losing this run's step, nor is it ours to replace.
        aside = path.with_name(f"{path.name}.of-{owner}")
        path.rename(aside)
        logger.warning("%s belongs to run %s: it is %s now", path, owner, aside.name)
    if discovery.is_pinned(path):
        raise RankFailure(
            f"{path} is pinned, so it can't be replaced; remove its file {discovery.PIN_NAME!r}, or choose another "
            "job.output_dir"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    flush_folder(path.parent.parent)
    for leftover in discovery.temporary_folders(path.parent):
        shutil.rmtree(leftover)


def _run_of(path: Path) -> str:
    try:
        return read_manifest(path).run
    except CheckpointDamaged:  # of whatever run: nothing can resume it
        return ""


def _make_temporary(path: Path) -> Path:
    temporary = temporary_beside(path)
    temporary.mkdir(parents=True)
    return temporary


def _compared(temporary: Path, written: Mapping[str, FileRecord]) -> Mapping[str, FileRecord]:
    """Compares the sizes of this rank's files with the disk. On a network disk other ranks may not see the files
    yet."""
    verify_sizes(temporary, written, "is the disk full?")
    return written


def _finish(temporary: Path, path: Path, manifest: Manifest, check: Callable[[], None]) -> None:
    storage.read_index(temporary, manifest.files)
    write_manifest(temporary, manifest)
    flush_folder(temporary)
    check()
    replaced = _move_aside(path) if path.exists() else None
    # Only a run that was rewound replaces a step. Dying right here loses that step, never another one.
    temporary.rename(path)
    flush_folder(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def _retire(folder: Path, keep: int, needed: Collection[Path]) -> None:
    """Removes all but the newest `keep` complete steps. Pinned steps are not removed and not counted."""
    free = [path for path in discovery.complete_steps(folder) if not discovery.is_pinned(path)]
    others = [path for path in free if path not in needed]
    for path in others[max(0, keep - (len(free) - len(others))) :]:
        shutil.rmtree(_move_aside(path))


def _move_aside(path: Path) -> Path:
    """Renames a checkpoint so that discovery no longer finds it. If the process dies while deleting it, no partial
    checkpoint is left under its name."""
    aside = temporary_beside(path)
    path.rename(aside)
    return aside
