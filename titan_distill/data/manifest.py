"""Manifest of a data folder, `titan_data.json`: the encoders, sizes and frame rate of its rows.

Latents of another VAE, or of the same VAE without its normalisation, have the shape that a run expects and train to
wrong numbers. The commands that make data therefore record what made it, and a run compares it with its own encoders
before it trains. A folder without a manifest, such as one from elsewhere, is checked by its rows alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from titan_distill.data.location import Location
from titan_distill.fault_tolerance.files import atomic, parse_json

MANIFEST_NAME = "titan_data.json"
FORMAT_VERSION = 1
ENCODERS = ("vae", "text_encoder", "tokenizer")
"""Fields with digests of encoders."""

Size = tuple[int, int, int]
"""(frames, height, width) of a clip in pixels."""
Latents = Literal["normalised", "raw"]


@dataclass(frozen=True, kw_only=True)
class DataManifest:
    """Contents of `titan_data.json`. An empty digest stands for an encoder that is not known."""

    latents: Latents | None = None
    """Whether latents are normalised by the VAE's mean and standard deviation, or raw; None for text-only data."""
    vae: str = ""
    text_encoder: str = ""
    tokenizer: str = ""
    sizes: tuple[Size, ...] = ()
    """Sizes of the clips in pixels; none for samples that are not videos."""
    fps: float | None = None
    """Frames per second of the clips; None for the videos' own."""
    format_version: int = FORMAT_VERSION

    def with_encoders(self, digests: Mapping[str, str]) -> DataManifest:
        """Returns the manifest with these digests by name."""
        values: dict[str, Any] = dict(digests)
        return dataclasses.replace(self, **values)


def write_manifest(folder: Path, manifest: DataManifest) -> None:
    """Writes the manifest of a folder. Raises ValueError if the folder has another one."""
    present = read_manifest(folder)
    if present is not None and present != manifest:
        different = ", ".join(
            f"{field.name} = {_shown(getattr(present, field.name))} instead of {_shown(getattr(manifest, field.name))}"
            for field in dataclasses.fields(manifest)
            if getattr(present, field.name) != getattr(manifest, field.name)
        )
        raise ValueError(f"{folder} holds data with {different}; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / MANIFEST_NAME) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n", encoding="utf-8")


def read_manifest(path: Location) -> DataManifest | None:
    """Returns the manifest of a data folder, or of the folder of a data file; None if there is none.

    Raises ValueError for one that can't be read, or that a newer version wrote.
    """
    file = (path if path.is_dir() else path.parent) / MANIFEST_NAME
    if not file.is_file():
        return None
    try:
        return _from_json(parse_json(file.read_text(encoding="utf-8")))
    except _NewerError as error:
        raise ValueError(f"{file} {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{file} is no manifest of data ({error}); copy it again, or remove it to train without its checks"
        ) from error


def stated_form(manifests: Mapping[Location, DataManifest]) -> Latents | None:
    """Returns the form of latents that the manifests of a dataset's folders state; None if they state none. Raises
    ValueError if they differ."""
    found = {manifest.latents: folder for folder, manifest in manifests.items() if manifest.latents}
    if len(found) > 1:
        listed = " and ".join(f"{form} latents in {folder}" for form, folder in found.items())
        raise ValueError(f"there are {listed}; name these folders in data.sources")
    return next(iter(found), None)


def check_manifest(path: Location, *, encoders: Mapping[str, str], sizes: Sequence[Size], needs_latents: bool) -> None:
    """Compares the manifest of a data folder, if it has one, with a run.

    Args:
        path: the data.
        encoders: digests of the run's encoders by name, see `ENCODERS`; those that the run does not have are left out.
        sizes: sizes of the run's samples in pixels; empty if they are not videos.
        needs_latents: whether the run trains on latents.

    Raises:
        ValueError: an encoder or the sizes differ, or the latents are not what networks take.
    """
    manifest = read_manifest(path)
    if manifest is None:
        return
    file = (path if path.is_dir() else path.parent) / MANIFEST_NAME
    for name in ENCODERS:
        made_with, own = getattr(manifest, name), encoders.get(name, "")
        if name == "vae" and not needs_latents:
            continue
        if made_with and own and made_with != own:
            raise ValueError(
                f"{file} says that the data was made with the {name.replace('_', ' ')} {made_with[:12]}, but that of "
                f"the run is {own[:12]}; name the pipeline that made the data, or make it again with this "
                f'one (if both have the same weights in other files, set {name} in {MANIFEST_NAME} to "")'
            )
    if needs_latents and sizes and not set(manifest.sizes) <= set(sizes):
        raise ValueError(
            f"{file} says that the clips have frames × height × width {_sizes(manifest.sizes)}, but the run trains on "
            f"{_sizes(sizes)}; name all sizes of the data in the run, or preprocess videos at its size"
        )


def _sizes(sizes: Sequence[Size]) -> str:
    return ", ".join(" × ".join(map(str, size)) for size in sizes)


def _shown(value: Any) -> str:
    return str(value)[:40]


class _NewerError(ValueError):
    """A manifest that a newer version wrote."""


def _from_json(content: dict[str, Any]) -> DataManifest:
    version = content.get("format_version")
    if type(version) is not int:
        raise ValueError(f"format_version is {version!r}")
    if version > FORMAT_VERSION:
        raise _NewerError(
            f"has format_version {version}, but this titan_distill reads up to {FORMAT_VERSION}; use the version that "
            "wrote it, or a newer one"
        )
    manifest = DataManifest(**{**content, "sizes": tuple(_size(size) for size in content.get("sizes", []))})
    if manifest.latents not in (None, *get_args(Latents)):
        raise ValueError(f"latents is {manifest.latents!r}")
    for name in ENCODERS:
        if not isinstance(getattr(manifest, name), str):
            raise ValueError(f"{name} is {getattr(manifest, name)!r}")
    if manifest.fps is not None and not (isinstance(manifest.fps, (int, float)) and manifest.fps > 0):
        raise ValueError(f"fps is {manifest.fps!r}")
    return manifest


def _size(size: Any) -> Size:
    frames, height, width = size
    if not all(type(number) is int and number > 0 for number in size):
        raise ValueError(f"a size is {size!r}")
    return frames, height, width
