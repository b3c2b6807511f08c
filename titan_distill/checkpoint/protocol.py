"""How all ranks of a run publish a checkpoint together.

Everything is written to ``step-00000100.tmp-<id>/``, compared with the disk, described in a manifest, flushed, and then
renamed; only after that are older steps removed, and they too disappear by a rename first. Each phase ends in an
agreement, so a failure on one rank is raised on all of them and nothing is published. The process may die between any
two lines: a folder with a plain step name is complete, and what else lies around is removed by the next save.

A save runs in the training thread or in one of its own; either way over a process group that nothing else uses.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from titan_distill.checkpoint import discovery, storage
from titan_distill.checkpoint.manifest import FileRecord, Manifest, write_manifest
from titan_distill.checkpoint.publish import check_size, check_written, flush_folder, temporary_beside
from titan_distill.checkpoint.ranks import RankFailure, Ranks


@dataclass(frozen=True)
class Snapshot:
    """What a save writes."""

    manifest: Manifest
    """Without files."""
    state: dict[str, Any]
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    """By flat name: what to write in place of the tensors in ``state``."""


class Protocol:
    """Publishes snapshots in ``folder`` and removes old ones. All ranks call it, in the same order."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks) -> None:
        self.folder, self.keep, self.ranks = folder, keep, ranks

    def save(self, snapshot: Snapshot, prepare: Callable[[], None], still_needed: Collection[Path]) -> Path:
        """Publishes a step and then retires older ones, but none that is ``still_needed``. ``prepare`` completes the
        snapshot on this rank, without communicating.

        On failure nothing is published and earlier steps are as they were. Raises RankFailure or ValueError, on every
        rank.
        """
        self.ranks.together(prepare)
        temporary = self.ranks.on_rank_zero(lambda: self._make_temporary(snapshot.manifest.step))
        try:
            written = storage.write(snapshot.state, temporary, self.ranks.group, snapshot.copies)
            by_rank = self.ranks.gather(lambda: _checked_with_disk(temporary, written))
            files = {name: record for records in by_rank for name, record in records.items()}
            manifest = dataclasses.replace(snapshot.manifest, files=files)
            published = self.ranks.on_rank_zero(lambda: self._publish(temporary, manifest))
        except BaseException:
            if self.ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.ranks.on_rank_zero(lambda: self._retire({published, *still_needed}))
        return published

    def _make_temporary(self, step: int) -> Path:
        final = self.folder / discovery.step_name(step)
        if discovery.is_pinned(final):
            raise RankFailure(
                f"{final} is pinned, so it can't be replaced; remove its file {discovery.PIN_NAME!r}, or choose "
                "another job.output_dir"
            )
        for leftover in discovery.temporary_folders(self.folder):
            shutil.rmtree(leftover)
        temporary = temporary_beside(final)
        temporary.mkdir(parents=True)
        return temporary

    def _publish(self, temporary: Path, manifest: Manifest) -> Path:
        check_written(temporary, manifest.files)
        write_manifest(temporary, manifest)
        flush_folder(temporary)
        published = self.folder / discovery.step_name(manifest.step)
        replaced = _move_aside(published) if published.exists() else None
        # Only a run that was rewound replaces a step. Dying right here loses that step, never another one.
        temporary.rename(published)
        flush_folder(self.folder)
        flush_folder(self.folder.parent)  # the first save has made the folder itself
        if replaced is not None:
            shutil.rmtree(replaced)
        return published

    def _retire(self, needed: Collection[Path]) -> None:
        """Keeps the newest ``keep`` complete steps, pinned ones besides, and those that are needed."""
        free = [path for path in discovery.complete_steps(self.folder) if not discovery.is_pinned(path)]
        kept = [path for path in free if path in needed]
        others = [path for path in free if path not in needed]
        for path in others[max(0, self.keep - len(kept)) :]:
            shutil.rmtree(_move_aside(path))


def _checked_with_disk(folder: Path, written: Mapping[str, FileRecord]) -> Mapping[str, FileRecord]:
    """Each rank looks at its own files: on network disks it alone is sure to see what it wrote."""
    for name, record in written.items():
        path = folder / name
        check_size(path, path.stat().st_size if path.exists() else 0, record.num_bytes)
    return written


def _move_aside(path: Path) -> Path:
    """Takes a checkpoint from discovery in one instant: dying while it is deleted must not leave half of one."""
    aside = temporary_beside(path)
    path.rename(aside)
    return aside
