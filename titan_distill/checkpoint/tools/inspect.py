"""What a person asks of checkpoints before using them: which are there, and is this one whole?

``describe_folder`` is cheap and reads manifests only, so that it can be asked of a run that is training. ``verify``
reads every byte.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from titan_distill.checkpoint.discovery import is_pinned, step_folders, temporary_folders
from titan_distill.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest, verify_sizes
from titan_distill.checkpoint.tools.contents import Contents, open_checkpoint

_HEADINGS = ("checkpoint", "age", "size", "samples", "roles", "written by", "state")


@dataclass(frozen=True)
class Listed:
    """One folder among the checkpoints of a run."""

    path: Path
    age_seconds: float
    num_bytes: int
    manifest: Manifest | None
    """None where there is no readable one."""
    problem: str
    """Why it can't be used; empty when it is complete."""


def describe_folder(folder: Path) -> str:
    """A table of the checkpoints in a run's folder or in its ``checkpoints``, newest step first, leftovers at the end.

    Files are counted and measured, not hashed. Raises ValueError when there is no such folder.
    """
    listed = list_folder(folder)
    return _table([_HEADINGS, *(_row(item) for item in listed)]) if listed else f"no checkpoints in {folder}"


def list_folder(folder: Path) -> list[Listed]:
    """What ``describe_folder`` shows, in its order."""
    if (folder / MANIFEST_NAME).exists():
        raise ValueError(f"{folder} is a checkpoint itself; list {folder.parent}, or verify this one")
    inner = folder / "checkpoints"
    folder = inner if inner.is_dir() else folder
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; name a run's folder, or its checkpoints")
    leftovers = sorted(temporary_folders(folder), reverse=True)
    listed = []
    for path in (*step_folders(folder), *leftovers):
        with suppress(FileNotFoundError):  # published or retired meanwhile by a run that goes on
            listed.append(_look_at(path, temporary=path in leftovers))
    return listed


def verify(path: Path) -> str:
    """Checks sizes, hashes and index, and then that every value can be read. Returns what was found, in one line.

    Holds one tensor. Raises CheckpointDamaged naming the first file that is not as it was published.
    """
    contents = open_checkpoint(path)
    for name in contents.names:
        contents.read(name)
    return f"{contents.path} is complete: {_amount(contents)}, all hashes are right and all values can be read"


def _amount(contents: Contents) -> str:
    num_bytes = sum(record.num_bytes for record in contents.manifest.files.values())
    return f"{len(contents.manifest.files)} files, {format_bytes(num_bytes)}, {len(contents.names)} values"


def _look_at(path: Path, *, temporary: bool) -> Listed:
    manifest, problem = None, "temporary: of a save under way, or of one that died" if temporary else ""
    try:
        if not temporary:
            manifest = read_manifest(path)
            verify_sizes(path, manifest)
    except ValueError as error:
        problem = str(error)
    num_bytes = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return Listed(path, max(0.0, time.time() - path.stat().st_mtime), num_bytes, manifest, problem)


def _row(item: Listed) -> tuple[str, ...]:
    samples = roles = layout = "?"
    if item.manifest is not None:
        trained = item.manifest.trained
        samples = f"{item.manifest.samples_seen:,}"
        roles = ", ".join(f"{name} + EMA" if role.has_ema else name for name, role in trained.items())
        layout = "; ".join(f"{name} {_layout(role.mesh)}" for name, role in trained.items())
        num_ranks = item.manifest.world_size
        layout = f"{num_ranks} rank{'s' if num_ranks > 1 else ''}: {layout}"
    kind = ", weights only" if item.manifest and item.manifest.weights_only else ""
    state = (item.problem or f"complete{kind}") + (", pinned" if is_pinned(item.path) else "")
    return item.path.name, _duration(item.age_seconds), format_bytes(item.num_bytes), samples, roles, layout, state


def _layout(mesh: dict[str, int]) -> str:
    return " × ".join(f"{axis} {degree}" for axis, degree in mesh.items()) or "whole"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def format_bytes(num_bytes: float) -> str:
    """With the largest binary unit that leaves at least one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
