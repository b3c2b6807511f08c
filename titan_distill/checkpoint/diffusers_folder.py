"""Diffusers folders of safetensors, read one tensor, or one part of a tensor, at a time.

A folder holds `config.json` and either one `diffusion_pytorch_model.safetensors` (`model.safetensors` for networks of
transformers) or several files with an index. Shapes and dtypes come from the file headers. A file is opened again for
every tensor, because safetensors maps files into memory: a mapping that stays open would in the end hold the whole
model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from titan_distill.fault_tolerance.files import is_bare, parse_json

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
TRANSFORMERS_WEIGHTS_NAME = "model.safetensors"
"""File name of weights that the library transformers wrote, as WEIGHTS_NAME is that of diffusers."""
PIPELINE_INDEX = "model_index.json"
"""File name of a pipeline's index, which lists the class of each part by folder."""
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
_LFS_POINTER = b"version https://git-lfs"
TRANSFORMER = "transformer"
TRANSFORMER_2 = "transformer_2"
"""Folder of the second network in a pipeline with two networks."""


@dataclass(frozen=True)
class DiffusersFolder:
    """Architecture and weights of one network."""

    architecture: dict[str, Any]
    """Contents of `config.json`."""
    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    """Stored type of each tensor as safetensors writes it, such as `BF16`."""
    files: dict[str, Path]
    """File that holds each tensor."""

    @property
    def source(self) -> Path:
        """The file of weights, or the folder if there are several."""
        paths = set(self.files.values())
        return paths.pop() if len(paths) == 1 else self.path

    def read(self, name: str) -> Tensor:
        """Returns one tensor as it is stored. It is mapped into memory, not copied."""
        with _opened(self.files[name]) as file:
            return file.get_tensor(name)

    def read_part(self, name: str, region: tuple[slice, ...]) -> Tensor:
        """Returns a part of a tensor, and reads no more than that part."""
        with _opened(self.files[name]) as file:
            return file.get_slice(name)[region]


def network_folder(folder: Path, module: str = TRANSFORMER) -> Path:
    """Returns the folder of a network, given that folder or its pipeline's.

    In a pipeline with two networks `module` chooses one. In other pipelines the folder is that of the transformer.
    """
    inner = (folder / name for name in (module, TRANSFORMER))
    return next((path for path in inner if path.is_dir()), folder)


def open_folder(folder: Path, module: str = TRANSFORMER, weights_name: str = WEIGHTS_NAME) -> DiffusersFolder:
    """Opens the folder of a network, or of one in a pipeline. `weights_name` is the file name of unsharded weights.

    Raises ValueError for a missing or damaged file, and for an index that contradicts the files or names files outside
    of the folder.
    """
    folder = network_folder(folder, module)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; name the folder of a diffusers transformer or pipeline")
    architecture = read_json(folder / CONFIG_NAME)
    index = folder / f"{weights_name}.index.json"
    indexed = _read_index(index)
    if indexed and (folder / weights_name).exists():
        raise ValueError(f"{folder} has both {weights_name} and {index.name}, which name different files; keep one")
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    files: dict[str, Path] = {}
    for path in sorted({folder / name for name in indexed.values()}) or [folder / weights_name]:
        for name, (shape, dtype) in read_header(path).items():
            if name in files:
                raise ValueError(f"{name} is in both {files[name]} and {path}; copy the folder again")
            shapes[name], dtypes[name], files[name] = shape, dtype, path
    for name, file_name in sorted(indexed.items()):
        if files.get(name) != folder / file_name:
            raise ValueError(f"{index} says that {name} is in {file_name}, which does not hold it")
    if not shapes:
        raise ValueError(f"the weights in {folder} hold no tensor")
    return DiffusersFolder(architecture, folder, shapes, dtypes, files)


def _read_index(path: Path) -> dict[str, str]:
    """Returns the file name of each tensor; empty without an index."""
    if not path.exists():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map")
    for name in weight_map.values():
        # An index is data from elsewhere: it may not lead out of its folder.
        if not is_bare(name):
            raise ValueError(f"{path} names {name!r}, which is not a bare file name in that folder")
    return weight_map


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns shape and stored type of each tensor of a file. Raises ValueError for a missing or damaged file."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    if not path.is_file():
        others = sorted(other.name for other in path.parent.glob("*") if other.suffix.lower() in WEIGHTS_SUFFIXES)
        instead = f"; save {', '.join(others[:3])}, which the folder has, as safetensors of that name"
        raise ValueError(f"weights file {path} does not exist{instead if others else ''}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        with path.open("rb") as raw:
            if raw.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ValueError(f"{path} is a Git LFS pointer instead of weights; run `git lfs pull` there") from error
        raise ValueError(f"weights file {path} is damaged: {error}; copy it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. The file is parsed again only after it has changed. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    found = path.stat()
    return dict(_parse(path, found.st_mtime_ns, found.st_size))


@functools.lru_cache(maxsize=32)
def _parse(path: Path, mtime_ns: int, num_bytes: int) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; copy it again")
    return content
