"""``manifest.json``: what a complete checkpoint folder contains, so that damage is found before it is loaded.

Size and SHA-256 of every file, and a digest over the manifest itself. Everything that describes the run (roles,
layouts, architectures) stands here as JSON, so that discovery, export and people can read it without torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
_HASH_CHUNK_BYTES = 1 << 22
_FINGERPRINT_BYTES = 1 << 20


class CheckpointDamaged(ValueError):
    """A checkpoint's files are not what its manifest says; the message names the file."""


@dataclass(frozen=True)
class FileRecord:
    """One file of the checkpoint."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class AdaptedBase:
    """The weights that a role's low-rank adapters change, which are not saved either."""

    path: str
    """A folder, or a role in a checkpoint, as in ``init_from``."""
    digest: str
    """``initial_weights.weights_digest`` of it."""
    scale: float
    """By which an adapter counts, alpha / rank."""


@dataclass(frozen=True)
class TrainedRole:
    """A role whose state is in the checkpoint."""

    modules: list[str]
    num_updates: int
    has_ema: bool
    mesh: dict[str, int]
    """Mesh axis -> degree, of the layout that saved it; empty for plain tensors. Any other layout can load it."""
    architecture: dict[str, Any]
    """What builds the module again; the diffusers config for families that diffusers knows."""
    base: AdaptedBase | None = None
    """What the checkpoint's adapters are for; None where it holds all weights."""


@dataclass(frozen=True)
class FrozenRole:
    """A role that is not saved, only named."""

    path: str
    digest: str
    """``fingerprint`` of the folder at ``path``; empty when the role has no folder."""


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``."""

    step: int
    samples_seen: int
    seed: int
    world_size: int
    config_digest: str
    family: str
    pipeline_config: dict[str, Any]
    trained: dict[str, TrainedRole]
    frozen: dict[str, FrozenRole]
    files: dict[str, FileRecord]
    """By name within the folder, the manifest itself excepted."""
    weights_only: bool = False
    """No optimizers, schedulers or progress: roles can start from it, but a run can't go on from it."""
    noise_version: int | None = None
    """Of the noise that the run drew; None where it is unknown, as in checkpoints from before this field."""
    format_version: int = FORMAT_VERSION


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes ``manifest.json`` and waits until it is on disk."""
    content = dataclasses.asdict(manifest)
    with (folder / MANIFEST_NAME).open("w") as file:
        json.dump({**content, "digest": _digest(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks ``manifest.json``.

    Raises CheckpointDamaged when it is missing, unreadable or was edited, ValueError when a newer version wrote it.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointDamaged(f"{path} is missing, so {folder.name} is not a complete checkpoint")
    try:
        content = json.loads(path.read_text())
        version, digest = content["format_version"], content.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointDamaged(f"{path} is damaged: it is not the JSON object that was written") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}, but this titan_distill reads up to {FORMAT_VERSION}; "
            "use the version that wrote it, or a newer one"
        )
    if digest != _digest(content):
        raise CheckpointDamaged(f"{path} is damaged or was edited: its digest does not match its contents")
    return _from_json(content)


def _from_json(content: dict[str, Any]) -> Manifest:
    nested = {
        "trained": {name: _trained_role(record) for name, record in content["trained"].items()},
        "frozen": {name: FrozenRole(**record) for name, record in content["frozen"].items()},
        "files": {name: FileRecord(**record) for name, record in content["files"].items()},
    }
    return Manifest(**{**content, **nested})


def _trained_role(record: dict[str, Any]) -> TrainedRole:
    base = record.get("base")
    return TrainedRole(**{**record, "base": None if base is None else AdaptedBase(**base)})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def record_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file as it is on disk now."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
        return FileRecord(file.tell(), digest.hexdigest())


def verify_sizes(folder: Path, manifest: Manifest) -> None:
    """Checks that every file is there with its size: cheap, reads nothing. Raises CheckpointDamaged."""
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointDamaged(f"{path} is missing; use another checkpoint")
        if (num_bytes := path.stat().st_size) != record.num_bytes:
            raise CheckpointDamaged(
                f"{path} is damaged: it has {num_bytes} bytes instead of {record.num_bytes}; use another checkpoint"
            )


def verify_hashes(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Reads the named files (default: all) and compares their hashes. Raises CheckpointDamaged."""
    for name in manifest.files if names is None else names:
        if record_file(folder / name) != manifest.files[name]:
            raise CheckpointDamaged(
                f"{folder / name} is damaged: its SHA-256 is not the one in {MANIFEST_NAME}; use another checkpoint"
            )


def fingerprint(folder: Path) -> str:
    """Identifies the weights of a frozen role: SHA-256 over file names, sizes, and the first and last MiB of each file.

    A teacher can have tens of GB; reading all of it at each start would cost minutes to tell apart what this tells
    apart.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        num_bytes = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{num_bytes}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_FINGERPRINT_BYTES))
            file.seek(max(0, num_bytes - _FINGERPRINT_BYTES))
            digest.update(file.read())
    return digest.hexdigest()
