"""Publishes a checkpoint folder in one instant, complete, from all ranks of a run or from one process.

The ranks write to `step-00000100.tmp-<id>/`. Their files are compared with the disk, described in the manifest and
flushed, and then the folder is renamed; only after that are older steps removed, and they too disappear by a rename
first. Each phase ends in an agreement, so a failure on one rank is raised on all of them and nothing is published. The
process may die between any two lines: a folder with a plain step name is complete, and the next save removes the rest.

A save runs in the training thread or in one of its own, in both cases over a process group that nothing else uses.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from titan_distill.checkpoint import discovery, storage
from titan_distill.checkpoint.manifest import Manifest, verify_sizes, write_manifest
from titan_distill.fault_tolerance.files import FileRecord, flush_folder, temporary_beside
from titan_distill.fault_tolerance.ranks import RankFailure, Ranks

Write = Callable[[Path], Mapping[str, FileRecord]]
"""Writes the data of a checkpoint into a folder, collectively, and returns the records of this rank's files."""


def publish_step(
    folder: Path, manifest: Manifest, write: Write, ranks: Ranks, keep: int, needed: Collection[Path]
) -> Path:
    """Publishes a step of a run in `folder`, then removes all but the newest `keep` steps and those in `needed`.

    A step of the same number is replaced. Raises as `publish` does, and RankFailure for a step that is pinned.
    """
    path = folder / discovery.step_name(manifest.step)
    ranks.on_rank_zero(lambda: _make_way(path))
    publish(path, manifest, write, ranks)
    ranks.on_rank_zero(lambda: _retire(folder, keep, {path, *needed}))
    return path


def publish(path: Path, manifest: Manifest, write: Write, ranks: Ranks) -> None:
    """Publishes what `write` writes as `path`, with `manifest` and the records that `write` returns.

    On failure nothing is published and nothing is left behind. Raises RankFailure or ValueError, on every rank.
    """
    temporary = ranks.on_rank_zero(lambda: _make_temporary(path))
    try:
        written = write(temporary)
        by_rank = ranks.gather(lambda: _compared(temporary, written))
        files = {name: record for records in by_rank for name, record in records.items()}
        ranks.on_rank_zero(lambda: _finish(temporary, path, dataclasses.replace(manifest, files=files)))
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _make_way(path: Path) -> None:
    if discovery.is_pinned(path):
        raise RankFailure(
            f"{path} is pinned, so it can't be replaced; remove its file {discovery.PIN_NAME!r}, or choose another "
            "job.output_dir"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    flush_folder(path.parent.parent)
    for leftover in discovery.temporary_folders(path.parent):
        shutil.rmtree(leftover)


def _make_temporary(path: Path) -> Path:
    temporary = temporary_beside(path)
    temporary.mkdir(parents=True)
    return temporary


def _compared(temporary: Path, written: Mapping[str, FileRecord]) -> Mapping[str, FileRecord]:
    """Compares this rank's files with the disk: on network disks it alone is sure to see what it wrote."""
    verify_sizes(temporary, written, "is the disk full?")
    return written


def _finish(temporary: Path, path: Path, manifest: Manifest) -> None:
    storage.read_index(temporary, manifest.files)
    write_manifest(temporary, manifest)
    flush_folder(temporary)
    replaced = _move_aside(path) if path.exists() else None
    # Only a run that was rewound replaces a step. Dying right here loses that step, never another one.
    temporary.rename(path)
    flush_folder(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def _retire(folder: Path, keep: int, needed: Collection[Path]) -> None:
    """Removes old complete steps; pinned ones stay and don't count."""
    free = [path for path in discovery.complete_steps(folder) if not discovery.is_pinned(path)]
    others = [path for path in free if path not in needed]
    for path in others[max(0, keep - (len(free) - len(others))) :]:
        shutil.rmtree(_move_aside(path))


def _move_aside(path: Path) -> Path:
    """Takes a checkpoint from discovery in one instant: dying while it is deleted must not leave half of one."""
    aside = temporary_beside(path)
    path.rename(aside)
    return aside
