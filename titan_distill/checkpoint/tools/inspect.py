"""Listing of a run's checkpoints, and verification of one checkpoint.

`describe_folder` reads only manifests, so it is fast and works during a run. `verify` reads every byte.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from titan_distill.checkpoint.discovery import is_pinned, step_folders, temporary_folders
from titan_distill.checkpoint.manifest import MANIFEST_NAME, read_manifest, verify_sizes
from titan_distill.checkpoint.tools.contents import open_checkpoint
from titan_distill.fault_tolerance.files import format_bytes

HEADINGS = ("checkpoint", "age", "size", "samples", "roles", "written by", "state")


def describe_folder(folder: Path) -> str:
    """Returns a table of the checkpoints in a run's folder or its subfolder `checkpoints`, newest first. Temporary
    folders of unfinished saves come last.

    It compares the sizes of files, but no hashes. Raises ValueError if the folder does not exist.
    """
    if (folder / MANIFEST_NAME).exists():
        raise ValueError(f"{folder} is a checkpoint itself; list {folder.parent}, or verify this one")
    found = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if not found.is_dir():
        raise ValueError(f"there is no folder {folder}; name a run's folder, or its checkpoints")
    rows = describe_steps(found)
    return _table([HEADINGS, *rows]) if rows else f"no checkpoints in {folder}"


def describe_steps(checkpoints: Path) -> list[tuple[str, ...]]:
    """Returns a row of text per checkpoint in the folder, under `HEADINGS`. Empty if the folder does not exist."""
    rows = []
    leftovers = sorted(temporary_folders(checkpoints), reverse=True)
    for path in (*step_folders(checkpoints), *leftovers):
        with suppress(FileNotFoundError):  # published or removed meanwhile by a run that goes on
            rows.append(_row(path, is_temporary=path in leftovers))
    return rows


def num_bytes(checkpoint: Path) -> int:
    """Returns the size of all files of a checkpoint, complete or not."""
    return sum(file.stat().st_size for file in checkpoint.iterdir() if file.is_file())


def verify(path: Path) -> str:
    """Checks sizes, hashes and index, and reads every value. Returns the result in one line.

    One tensor is in memory at a time. Raises CheckpointDamaged with the name of the first file that does not match the
    manifest.
    """
    contents = open_checkpoint(path)
    for name in contents.names:
        contents.read(name)
    files = contents.manifest.files
    size = format_bytes(sum(record.num_bytes for record in files.values()))
    amount = f"{len(files)} files, {size}, {len(contents.names)} values"
    return f"{contents.path} is complete: {amount}, all hashes are right and all values can be read"


def _row(path: Path, *, is_temporary: bool) -> tuple[str, ...]:
    age = _duration(max(0.0, time.time() - path.stat().st_mtime))
    size = format_bytes(num_bytes(path))
    samples = roles = layout = "?"
    state = "temporary: of a save in progress, or of one that died"
    try:
        if not is_temporary:
            manifest = read_manifest(path)
            ranks, trained = manifest.world_size, manifest.trained
            samples = f"{manifest.samples_seen:,}"
            roles = ", ".join(f"{name} + EMA" if role.has_ema else name for name, role in trained.items())
            layouts = "; ".join(f"{name} {_layout(role.mesh)}" for name, role in trained.items())
            layout = f"{ranks} rank{'s' if ranks > 1 else ''}: {layouts}"
            verify_sizes(path, manifest.files)
            state = "complete, weights only" if manifest.weights_only else "complete"
    except ValueError as error:
        state = str(error)
    return path.name, age, size, samples, roles, layout, state + (", pinned" if is_pinned(path) else "")


def _layout(mesh: dict[str, int]) -> str:
    return " × ".join(f"{axis} {degree}" for axis, degree in mesh.items()) or "unsharded"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
