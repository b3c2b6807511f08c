"""The manifest of a checkpoint, `manifest.json`: sizes and hashes of its files, and a description of the run.

The manifest contains the SHA-256 of every file and of itself, so damage is found before loading. It describes roles,
layouts and architectures in JSON, which discovery and export read without torch.
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

from titan_distill.fault_tolerance.files import FileRecord, is_bare, parse_json, record_file

FORMAT_VERSION = 3
MANIFEST_NAME = "manifest.json"


class CheckpointDamaged(ValueError):
    """A file of a checkpoint does not match the manifest. The message names the file."""


@dataclass(frozen=True)
class AdaptedBase:
    """Base weights of a LoRA adapter. The checkpoint contains a reference to them, not the weights."""

    path: str
    """Folder, or role in a checkpoint, in the form of `init_from`."""
    digest: str
    """Digest of the weights at `path`, from `initial_weights.weights_digest`."""
    scale: float
    """LoRA scaling, alpha / rank."""


@dataclass(frozen=True)
class TrainedRole:
    """A role whose state the checkpoint holds."""

    modules: list[str]
    num_updates: int
    has_ema: bool
    mesh: dict[str, int]
    """Degrees by mesh axis of the layout that saved the role; empty for plain tensors. Any layout can load it."""
    architecture: dict[str, Any]
    """Architecture of the module, to build it again; the diffusers config for families that diffusers knows."""
    base: AdaptedBase | None = None
    """Base weights of the LoRA adapter. None if the checkpoint contains all weights of the role."""


@dataclass(frozen=True)
class FrozenRole:
    """A frozen role. The checkpoint contains a reference to its weights, not the weights."""

    path: str
    digest: str
    """`fingerprint` of the folder at `path`; empty if the role has no folder."""


@dataclass(frozen=True)
class DataRecord:
    """Identity of the training data."""

    num_rows: int
    digest: str
    """`RowDataset.digest`."""
    order_version: int = 1
    """Version of the order of samples (`RowDataset.order_version`). 1 in checkpoints older than this field."""

    def __str__(self) -> str:
        return f"{self.num_rows} rows (digest {self.digest[:12]})"


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
    """All files of the folder except the manifest, by name within the folder."""
    weights_only: bool = False
    """Whether the checkpoint contains only weights, without optimizers, schedulers and progress. Roles can start from
    it, but a run cannot resume from it."""
    run: str = ""
    """Id of the run (`run_folder.Run`). Empty in checkpoints from before this field."""
    noise_version: int | None = None
    """Version of the noise that the run drew. None in checkpoints older than this field."""
    config: dict[str, Any] | None = None
    """Resolved configuration, secrets redacted. None in checkpoints older than this field."""
    data: DataRecord | None = None
    """Data that the run trained on. None in checkpoints older than this field."""
    format_version: int = FORMAT_VERSION


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` and waits until it is on disk."""
    content = dataclasses.asdict(manifest)
    with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as file:
        json.dump({**content, "digest": _digest(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks `manifest.json`.

    Raises CheckpointDamaged if the manifest is missing, unreadable or edited, or names anything outside of its folder,
    and ValueError if a newer version wrote it.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointDamaged(f"{path} is missing, so {folder.name} is not a complete checkpoint")
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
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
    try:
        manifest = _from_json(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointDamaged(f"{path} is damaged: its values are not those of a checkpoint ({error})") from error
    # A digest is no signature: whoever makes a manifest makes its digest, too.
    for name in (*manifest.files, *(module for role in manifest.trained.values() for module in role.modules)):
        if not is_bare(name):
            raise CheckpointDamaged(
                f"{path} names {name!r}, which is outside of its folder; do not trust this checkpoint"
            )
    return manifest


def _from_json(content: dict[str, Any]) -> Manifest:
    trained, frozen, files = (content[name] for name in ("trained", "frozen", "files"))
    for role in trained.values():
        if (base := role.get("base")) is not None:
            role["base"] = AdaptedBase(**base)
    nested = {
        "trained": {name: TrainedRole(**role) for name, role in trained.items()},
        "frozen": {name: FrozenRole(**role) for name, role in frozen.items()},
        "files": {name: FileRecord(**record) for name, record in files.items()},
        "data": None if content.get("data") is None else DataRecord(**content["data"]),
    }
    manifest = Manifest(**{**content, **nested})
    for name, least in (("step", 0), ("samples_seen", 0), ("seed", 0), ("world_size", 1)):
        value = getattr(manifest, name)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} = {value!r}, which must be a whole number of at least {least}")
    for name in ("trained", "files"):
        if not getattr(manifest, name):
            raise ValueError(f"{name} is empty")
    return manifest


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify_sizes(folder: Path, files: Mapping[str, FileRecord], remedy: str = "use another checkpoint") -> None:
    """Checks that every file exists and has its recorded size, without reading it. Raises CheckpointDamaged."""
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
