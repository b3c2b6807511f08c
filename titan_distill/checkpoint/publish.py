"""Making a checkpoint folder appear in one instant, complete.

What is written goes into a temporary folder beside its final place, is compared with the disk, described in the
manifest, flushed, and renamed. ``protocol.py`` does this with all ranks of a run; ``publish_alone`` does it for
tools that write a checkpoint from one process.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from titan_distill.checkpoint import storage
from titan_distill.checkpoint.manifest import CheckpointDamaged, FileRecord, Manifest, verify_sizes, write_manifest


def publish_alone(out: Path, manifest: Manifest, write: Callable[[Path], Mapping[str, FileRecord]]) -> Path:
    """Lets ``write`` fill a folder and publishes it as ``out``, with ``manifest`` and the records that it returns.

    Raises ValueError when ``out`` exists or writing fails; nothing is left behind then.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; remove it, or write to another folder")
    temporary = temporary_beside(out)
    try:
        temporary.mkdir(parents=True)
        complete = dataclasses.replace(manifest, files=dict(write(temporary)))
        verify_sizes(temporary, complete)
        check_written(temporary, complete.files)
        write_manifest(temporary, complete)
        flush_folder(temporary)
        temporary.rename(out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | RuntimeError):  # torch.save reports a full disk as a RuntimeError
            raise ValueError(f"{out} could not be written: {error}") from error
        raise
    flush_folder(out.parent)
    return out


def check_written(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Compares files with what the index says they hold. Raises CheckpointDamaged naming the file."""
    for name, num_bytes in storage.written_files(folder, storage.read_metadata(folder)).items():
        check_size(folder / name, files[name].num_bytes if name in files else 0, num_bytes)


def check_size(path: Path, found: int, expected: int) -> None:
    """Compares a file's bytes on disk with what was written to it. Raises CheckpointDamaged."""
    if found != expected:
        raise CheckpointDamaged(f"{path} has {found} bytes on disk instead of {expected}; is the disk full?")


def temporary_beside(path: Path) -> Path:
    """A new name beside ``path`` that discovery knows as unfinished."""
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")


def flush_folder(folder: Path) -> None:
    """Waits until the folder's entries are on disk; without it a rename can be forgotten in a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
