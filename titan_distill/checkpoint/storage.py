"""torch.distributed.checkpoint (DCP) on a folder, without trusting what the folder says.

DCP stores tensors that any layout can load back, but two of its habits are unsafe. It unpickles ``.metadata`` and
every value that is not a tensor, so that a checkpoint from elsewhere could run code: here ``.metadata`` goes through
an unpickler that knows only DCP's own plain records, and values through ``torch.load(weights_only=True)``. And its
writer threads can swallow an OSError and report success (https://github.com/pytorch/pytorch/issues/191391): so after
a save ``written_files`` checks that everything which was planned has been stored, and the sizes that files must have
are compared with the disk.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from titan_distill.checkpoint.manifest import CheckpointDamaged

METADATA_NAME = ".metadata"

_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # where Python 3.13 keeps them
}


def write(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Writes ``state`` to ``folder`` from all ranks of ``group``. Raises RuntimeError on every rank when one fails."""
    with _dcp_errors("writing", folder):
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), process_group=group, no_dist=group is None)


def read(state: dict[str, Any], folder: Path, metadata: Metadata, group: dist.ProcessGroup | None = None) -> None:
    """Reads into the tensors of ``state`` in place, whatever layout they have, and replaces its other values."""
    reader = _Reader(folder, metadata)
    with _dcp_errors("reading", folder):
        dcp.load(state, storage_reader=reader, planner=_Planner(), process_group=group, no_dist=group is None)


def read_metadata(folder: Path) -> Metadata:
    """DCP's index of the checkpoint. Raises CheckpointDamaged when it is no index, or refers to other code."""
    path = folder / METADATA_NAME
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except CheckpointDamaged as damage:
        raise CheckpointDamaged(f"{path} {damage}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointDamaged(f"{path} is damaged: it can't be unpickled ({type(error).__name__})") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointDamaged(f"{path} is damaged: it holds a {type(metadata).__name__}, not an index")
    return metadata


def written_files(folder: Path, metadata: Metadata) -> dict[str, int]:
    """Name -> bytes that each data file must have. Raises CheckpointDamaged when a planned value was never stored."""
    num_bytes: dict[str, int] = {}
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise CheckpointDamaged(
                f"{folder / METADATA_NAME} names {info.relative_path!r}, which is outside the folder"
            )
        end = info.offset + info.length
        num_bytes[info.relative_path] = max(end, num_bytes.get(info.relative_path, 0))
    for index in _planned(metadata):
        if index not in metadata.storage_data:
            raise CheckpointDamaged(f"{folder / METADATA_NAME} plans {index.fqn!r}, but no file in {folder} holds it")
    return num_bytes


def check_matches(state: dict[str, Any], folder: Path, metadata: Metadata) -> None:
    """Checks names, shapes and dtypes, both ways. Raises ValueError naming the first difference."""
    saved, wanted = metadata.state_dict_metadata, _flatten(state)
    if missing := sorted(wanted.keys() - saved.keys()):
        raise ValueError(f"{folder} has no {missing[0]}{_more(missing)}, which this run needs; {_SAME_RUN}")
    if unexpected := sorted(saved.keys() - wanted.keys()):
        raise ValueError(f"{folder} has {unexpected[0]}{_more(unexpected)}, which this run would drop; {_SAME_RUN}")
    for name, value in wanted.items():
        here, there = _tensor_kind(value), _tensor_kind(saved[name])
        if here != there:
            raise ValueError(f"{name} is {here} in this run but {there} in {folder}; {_SAME_RUN}")


_SAME_RUN = "resume with the same roles, models, EMA and precision, or start a new run with roles.<name>.init_from"


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise CheckpointDamaged(f"refers to {module}.{name}, which an index never needs; do not trust this checkpoint")


class _Reader(dcp.FileSystemReader):
    """Reads data files by an index that has been read safely before."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _Planner(dcp.DefaultLoadPlanner):
    """DCP's planner, but values that are not tensors are loaded without executing anything."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        safe = io.BytesIO()  # what DCP's own load, which is not safe, gets to see
        torch.save(torch.load(value, weights_only=True), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)


def _flatten(state: dict[str, Any]) -> dict[str, Any]:
    planner = dcp.DefaultLoadPlanner()
    planner.set_up_planner(state)
    return planner.state_dict


def _planned(metadata: Metadata) -> Iterator[MetadataIndex]:
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            yield from (MetadataIndex(name, chunk.offsets) for chunk in entry.chunks)
        else:
            yield MetadataIndex(name)


def _tensor_kind(value: Any) -> str:
    if isinstance(value, TensorStorageMetadata):
        return f"a tensor {list(value.size)} of {value.properties.dtype}"
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    return "a value"


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


@contextmanager
def _dcp_errors(doing: str, folder: Path) -> Iterator[None]:
    """Turns DCP's exception, which is no Exception and prints every rank's traceback, into one sentence."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except CheckpointException as error:
            if any(isinstance(cause, KeyboardInterrupt) for cause, _ in error.failures.values()):
                raise KeyboardInterrupt from error  # DCP wraps Ctrl-C like any failure, but it is somebody's wish
            causes = "; ".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, (e, _) in error.failures.items())
            raise RuntimeError(f"{doing} {folder} failed on {causes}") from error
