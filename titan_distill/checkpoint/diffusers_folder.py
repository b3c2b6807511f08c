"""A folder of safetensors as diffusers writes it, read one tensor at a time.

It holds ``config.json`` and either one ``diffusion_pytorch_model.safetensors`` or several with an index. Shapes come
from the file headers. A file is opened anew for every tensor: safetensors maps files into memory, and pages of a
mapping that stays open would add up to the whole model.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titan_distill.checkpoint.tools.rewrite import TensorKind

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
TRANSFORMER = "transformer"
TRANSFORMER_2 = "transformer_2"
"""The second expert of a pipeline that has two."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class DiffusersFolder:
    """Architecture and weights of one network."""

    architecture: dict[str, Any]
    """``config.json``."""
    kinds: dict[str, TensorKind]
    files: dict[str, Path]
    """By tensor."""

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored: mapped into memory, not copied."""
        with _opened(self.files[name]) as file:
            return file.get_tensor(name)

    def read_part(self, name: str, region: tuple[slice, ...]) -> Tensor:
        """The same of a part of it, reading no more than that."""
        with _opened(self.files[name]) as file:
            return file.get_slice(name)[region]


def network_folder(folder: Path, module: str = TRANSFORMER) -> Path:
    """The folder of a network, given it or its pipeline: ``module`` of one that has two, the transformer of others."""
    inner = (folder / name for name in (module, TRANSFORMER))
    return next((path for path in inner if path.is_dir()), folder)


def open_folder(folder: Path, module: str = TRANSFORMER) -> DiffusersFolder:
    """Opens a network's folder, or one in a pipeline's.

    Raises ValueError for a missing or damaged file, and for an index that disagrees with the files or leads out of the
    folder.
    """
    folder = network_folder(folder, module)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; name a diffusers transformer or pipeline")
    architecture = read_json(folder / CONFIG_NAME)
    indexed = _read_index(folder)
    kinds: dict[str, TensorKind] = {}
    files: dict[str, Path] = {}
    for path in sorted({folder / name for name in indexed.values()}) or [folder / WEIGHTS_NAME]:
        for name, kind in _read_header(path).items():
            if name in files:
                raise ValueError(f"{name} is in both {files[name]} and {path}; remove it from one of them")
            kinds[name], files[name] = kind, path
    for name, file_name in sorted(indexed.items()):
        if files.get(name) != folder / file_name:
            raise ValueError(f"{folder / INDEX_NAME} says that {name} is in {file_name}, which does not hold it")
    if not kinds:
        raise ValueError(f"the weights in {folder} hold no tensor")
    return DiffusersFolder(architecture, kinds, files)


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name; empty without an index."""
    path = folder / INDEX_NAME
    if not path.exists():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map")
    for name in weight_map.values():
        # An index is data from elsewhere: it may not lead out of its folder.
        if not isinstance(name, str) or name in ("", ".", "..") or any(separator in name for separator in "/\\"):
            raise ValueError(f"{path} names {name!r}, which is not a bare file name in that folder")
    return weight_map


def _read_header(path: Path) -> dict[str, TensorKind]:
    kinds = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            stored = file.get_slice(name)
            dtype = stored.get_dtype()
            if dtype not in _DTYPES:
                raise ValueError(f"{name} in {path} has dtype {dtype}, which is none of {', '.join(_DTYPES)}")
            kinds[name] = TensorKind(torch.Size(stored.get_shape()), _DTYPES[dtype])
    return kinds


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist")
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"weights file {path} is damaged: {error}") from error
    with file:
        yield file


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object, parsed once as long as it does not change. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    found = path.stat()
    return dict(_parse(path, found.st_mtime_ns, found.st_size))


@functools.lru_cache(maxsize=32)
def _parse(path: Path, mtime_ns: int, num_bytes: int) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content
