"""Checks that outputs can be written, made before the work whose results they are for.

Only a write tells: permissions, read-only mounts, quotas and full disks have no common flag that could be read instead.
So a probe creates what is missing, writes a file of one mebibyte, and removes everything that it made.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

PROBE_BYTES = 1 << 20


def probe_folder(folder: Path, key: str) -> None:
    """Checks that files can be written to a folder, which may not exist yet.

    Args:
        folder: The folder.
        key: The option or configuration key that names it, for the message.

    Raises:
        ValueError: a file in the way, a missing permission, a full disk, or a name that the file system refuses.
    """
    _probe(folder, folder / f".probe-{uuid.uuid4().hex}", key, folder)


def probe_file(file: Path, key: str, suffixes: tuple[str, ...]) -> None:
    """Checks that a file can be written; one that exists keeps its content.

    Args:
        file: The file.
        key: The option that names it, for the message.
        suffixes: Allowed endings, in lower case.

    Raises:
        ValueError: another ending, a folder in the way, or as for a folder.
    """
    if file.suffix.lower() not in suffixes:
        raise ValueError(f"{key} = {str(file)!r} must end in {' or '.join(suffixes)}; change its ending")
    if os.path.isdir(file):
        raise ValueError(f"{key} = {str(file)!r} is a folder; name a file in it")
    if os.path.exists(file) and not os.access(file, os.W_OK):
        raise ValueError(f"{key} = {str(file)!r} exists and is write-protected; choose another name")
    probe = file if not os.path.exists(file) else file.with_name(f".probe-{uuid.uuid4().hex}")
    _probe(file.parent, probe, key, file)


def _probe(folder: Path, probe: Path, key: str, value: Path) -> None:
    made: list[Path] = []
    try:
        for path in [*reversed(folder.parents), folder]:
            if not os.path.isdir(path):
                path.mkdir()
                made.append(path)
        with probe.open("xb") as file:
            made.append(probe)
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise ValueError(
            f"{key} = {str(value)!r} cannot be written, because {error.filename} is a file; choose another folder"
        ) from error
    except OSError as error:
        seen = "" if value.is_absolute() else f", seen from {Path.cwd()}"
        raise ValueError(
            f"{key} = {str(value)!r} cannot be written ({error.strerror}{seen}); choose a place with room and write "
            "permission"
        ) from error
    finally:
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
