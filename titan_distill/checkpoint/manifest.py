"""The manifest of a checkpoint, `manifest.json`: sizes and hashes of its files, and a description of the run.

The manifest has the SHA-256 of every file and a digest over itself, so damage is found before it is loaded. Roles,
layouts and architectures stand here as JSON, which discovery and export read without torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_distill.fault_tolerance.files import FileRecord, record_file

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"


class CheckpointDamaged(ValueError):
    """A checkpoint's files are not what its manifest says; the message names the file."""


@dataclass(frozen=True)
class AdaptedBase:
    """The weights that a LoRA adapter changes; they are named, not saved."""

    path: str
    """A folder, or a role in a checkpoint, as in `init_from`."""
    digest: str
    """`initial_weights.weights_digest` of `path`."""
    scale: float
    """LoRA scaling, alpha / rank."""


@dataclass(frozen=True)
class TrainedRole:
    """A role whose state the checkpoint holds."""

    modules: list[str]
    num_updates: int
    has_ema: bool
    mesh: dict[str, int]
    """Degree by mesh axis of the layout that saved it; empty for plain tensors. Any layout can load it."""
    architecture: dict[str, Any]
    """Architecture of the module, to build it again; the diffusers config for families that diffusers knows."""
    base: AdaptedBase | None = None
    """Base weights of a LoRA adapter. None where the checkpoint holds all weights."""


@dataclass(frozen=True)
class FrozenRole:
    """A frozen role, which is named and not saved."""

    path: str
    digest: str
    """`fingerprint` of the folder at `path`; empty when the role has no folder."""


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`."""

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
    """By name within the folder; all files but the manifest itself."""
    weights_only: bool = False
    """Whether there are no optimizers, schedulers and progress: roles can start from it, but no run resumes from it."""
    noise_version: int | None = None
    """Version of the noise that the run drew. None in checkpoints from before this field."""
    format_version: int = FORMAT_VERSION


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` and waits until it is on disk."""
    content = dataclasses.asdict(manifest)
    with (folder / MANIFEST_NAME).open("w") as file:
        json.dump({**content, "digest": _digest(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks `manifest.json`.

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
    trained, frozen, files = (content[name] for name in ("trained", "frozen", "files"))
    for role in trained.values():
        if (base := role.get("base")) is not None:
            role["base"] = AdaptedBase(**base)
    nested = {
        "trained": {name: TrainedRole(**role) for name, role in trained.items()},
        "frozen": {name: FrozenRole(**role) for name, role in frozen.items()},
        "files": {name: FileRecord(**record) for name, record in files.items()},
    }
    return Manifest(**{**content, **nested})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify_sizes(folder: Path, files: Mapping[str, FileRecord], remedy: str = "use another checkpoint") -> None:
    """Checks that every file is there with its size; cheap, reads nothing. Raises CheckpointDamaged."""
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointDamaged(f"{path} is missing; {remedy}")
        if (num_bytes := path.stat().st_size) != record.num_bytes:
            raise CheckpointDamaged(
                f"{path} is damaged: it has {num_bytes} bytes instead of {record.num_bytes}; {remedy}"
            )


def verify_hashes(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Reads the named files (default: all) and compares their hashes. Raises CheckpointDamaged."""
    for name in manifest.files if names is None else names:
        if record_file(folder / name) != manifest.files[name]:
            raise CheckpointDamaged(
                f"{folder / name} is damaged: its SHA-256 is not the one in {MANIFEST_NAME}; use another checkpoint"
            )
