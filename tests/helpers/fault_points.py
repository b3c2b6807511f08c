"""Points at which a save can be killed: a run that has this module in `job.imports` dies there, by SIGKILL, or its
writing process does.

`TITAN_TEST_FAULT = "<point> <step> <rank>"` in the environment says where. The points wrap functions of the publish
protocol, so that the protocol itself knows nothing of tests.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from titan_distill.checkpoint import commit, discovery
from titan_distill.checkpoint.writing_process import Piece, WritingProcess
from titan_distill.fault_tolerance import files
from titan_distill.fault_tolerance.files import FileRecord

VARIABLE = "TITAN_TEST_FAULT"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def mid_shard(step: int) -> None:
    """Half of a piece of this rank's file is on its way, or half of what the writing process is to write."""
    write = files.HashedFile.write
    half_a_file(step, lambda process: die())

    def half_a_write(file: files.HashedFile, data: Any) -> int:
        path = Path(str(file.name))
        if path.suffix == ".distcp" and path.parent.name.startswith(discovery.step_name(step)) and file.tell() > 4096:
            write(file, memoryview(data).cast("B")[: len(data) // 2])
            die()
        return write(file, data)

    files.HashedFile.write = half_a_write  # type: ignore[method-assign]


def writer_dies(step: int) -> None:
    """The writing process dies when half of this rank's file is on disk; the run itself goes on."""
    half_a_file(step, lambda process: os.kill(process.pid, signal.SIGKILL))


def half_a_file(step: int, then: Callable[[WritingProcess], None]) -> None:
    """Has the writing process write half of the step's data, before `then`."""
    write = WritingProcess.write

    def half_and_all(process: WritingProcess, path: Path, pieces: list[Piece]) -> FileRecord:
        if path.suffix == ".distcp" and path.parent.name.startswith(discovery.step_name(step)):
            write(process, path, pieces[: len(pieces) // 2])
            then(process)
        return write(process, path, pieces)

    WritingProcess.write = half_and_all  # type: ignore[method-assign]


def before_manifest(step: int) -> None:
    """All data is on disk, and nothing says that it is complete."""
    _die_before("write_manifest", lambda folder, manifest: manifest.step == step)


def before_rename(step: int) -> None:
    """The temporary folder is complete, manifest and all."""
    flush = commit.flush_folder

    def flush_and_die(folder: Path) -> None:
        flush(folder)
        if folder.name.startswith(f"{discovery.step_name(step)}.tmp-"):
            die()

    commit.flush_folder = flush_and_die  # type: ignore[attr-defined]


def during_purge(step: int) -> None:
    """The step is published, and of the oldest one half is gone."""
    move_aside = commit._move_aside

    def move_aside_and_die(path: Path) -> Path:
        aside = move_aside(path)
        if (path.parent / discovery.step_name(step)).exists():
            next(aside.iterdir()).unlink()
            die()
        return aside

    commit._move_aside = move_aside_and_die


def _die_before(name: str, is_due: Callable[..., bool]) -> None:
    inner = getattr(commit, name)

    def dying(*args: Any) -> Any:
        if is_due(*args):
            die()
        return inner(*args)

    setattr(commit, name, dying)


POINTS = {point.__name__: point for point in (mid_shard, before_manifest, before_rename, during_purge)}

if fault := os.environ.get(VARIABLE):
    _point, _step, _rank = fault.split()
    if os.environ.get("RANK", "0") == _rank:
        {**POINTS, writer_dies.__name__: writer_dies}[_point](int(_step))
