"""torch.distributed.checkpoint (DCP) on a folder, without trusting what the folder says.

DCP stores tensors that any layout can load back, but two of its habits are unsafe. It unpickles ``.metadata`` and
every value that is not a tensor, so that a checkpoint from elsewhere could run code: here ``.metadata`` goes through
an unpickler that knows only DCP's own plain records, and values through ``torch.load(weights_only=True)``. And its
writer threads can swallow an OSError and report success (https://github.com/pytorch/pytorch/issues/191391): so after
a save ``written_files`` checks that everything which was planned has been stored, and the sizes that files must have
are compared with the disk. What else is different in writing stands in ``writer.py``.
"""

from __future__ import annotations

import io
import pickle
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from titan_distill.checkpoint.manifest import CheckpointDamaged, FileRecord
from titan_distill.checkpoint.ranks import RankFailure
from titan_distill.checkpoint.writer import Planner, Writer

METADATA_NAME = ".metadata"

# DCP says it to whoever has no process group on purpose. For good, because warnings.catch_warnings is not for threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

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


def write(
    state: dict[str, Any],
    folder: Path,
    group: dist.ProcessGroup | None,
    copies: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, FileRecord]:
    """Writes ``state`` to ``folder`` from all ranks of ``group``, tensors from ``copies`` by flat name where it has
    them. Returns the records of the files that this rank wrote.

    Raises NotEnoughSpace before anything is written, and RankFailure when any rank fails, on every rank.
    """
    writer, planner = Writer(folder), Planner(copies or {})
    with _dcp_errors("writing", folder), _without_checksums():
        dcp.save(state, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    return writer.files.records


def read(state: dict[str, Any], folder: Path, metadata: Metadata, group: dist.ProcessGroup | None = None) -> None:
    """Reads into the tensors of ``state`` in place, whatever layout they have, and replaces its other values."""
    reader = _Reader(folder, metadata)
    with _dcp_errors("reading", folder):
        dcp.load(state, storage_reader=reader, planner=_Planner(), process_group=group, no_dist=group is None)


def read_metadata(folder: Path) -> Metadata:
    """DCP's index of the checkpoint.

    Raises CheckpointDamaged when it is no index, refers to other code or to files outside the folder, or when the parts
    of a value that it lists do not make the whole.
    """
    path = folder / METADATA_NAME
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise _Untrusted(f"is damaged: it holds a {type(metadata).__name__}, not an index")
        written_files(folder, metadata)
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                _check_covered(path, metadata, name, entry)
    except _Untrusted as reason:
        raise CheckpointDamaged(f"{path} {reason}") from None
    except CheckpointDamaged:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointDamaged(f"{path} is damaged: it can't be unpickled ({type(error).__name__})") from error
    return metadata


def written_files(folder: Path, metadata: Metadata) -> dict[str, int]:
    """Name -> bytes that each data file must have. Raises CheckpointDamaged as ``read_metadata`` does."""
    num_bytes: dict[str, int] = {}
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise CheckpointDamaged(
                f"{folder / METADATA_NAME} names {info.relative_path!r}, which is outside the folder"
            )
        if info.offset < 0 or info.length <= 0:
            raise CheckpointDamaged(
                f"{folder / METADATA_NAME} is damaged: it names {info.length} bytes at {info.offset} of a file"
            )
        end = info.offset + info.length
        num_bytes[info.relative_path] = max(end, num_bytes.get(info.relative_path, 0))
    for index in _planned(metadata):
        if index not in metadata.storage_data:
            raise CheckpointDamaged(f"{folder / METADATA_NAME} plans {index.fqn!r}, but no file in {folder} holds it")
    return num_bytes


def check_matches(state: dict[str, Any], folder: Path, metadata: Metadata) -> None:
    """Checks names, shapes and dtypes, both ways. Raises ValueError naming the first difference."""
    saved, wanted = metadata.state_dict_metadata, flatten(state)
    if missing := sorted(wanted.keys() - saved.keys()):
        raise ValueError(f"{folder} has no {missing[0]}{_more(missing)}, which this run needs; {_SAME_RUN}")
    if unexpected := sorted(saved.keys() - wanted.keys()):
        raise ValueError(f"{folder} has {unexpected[0]}{_more(unexpected)}, which this run would drop; {_SAME_RUN}")
    for name, value in wanted.items():
        here, there = _tensor_kind(value), _tensor_kind(saved[name])
        if here != there:
            raise ValueError(f"{name} is {here} in this run but {there} in {folder}; {_SAME_RUN}")


_SAME_RUN = "resume with the same roles, models, EMA and precision, or start a new run with roles.<name>.init_from"


class _Untrusted(Exception):
    """The pickle asks for something that no index needs, or is none."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise _Untrusted(f"refers to {module}.{name}, which an index never needs; do not trust this checkpoint")


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


def flatten(state: dict[str, Any]) -> dict[str, Any]:
    """Nested values by the flat names that they have in a checkpoint."""
    planner = dcp.DefaultLoadPlanner()
    planner.set_up_planner(state)
    return planner.state_dict


def _planned(metadata: Metadata) -> Iterator[MetadataIndex]:
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            yield from (MetadataIndex(name, chunk.offsets) for chunk in entry.chunks)
        else:
            yield MetadataIndex(name)


def _check_covered(path: Path, metadata: Metadata, name: str, entry: TensorStorageMetadata) -> None:
    """Chunks must lie within the tensor and make all of it, and their bytes must suffice for its elements."""
    within = all(
        len(chunk.offsets) == len(chunk.sizes) == len(entry.size)
        and all(min(o, s) >= 0 and o + s <= n for o, s, n in zip(chunk.offsets, chunk.sizes, entry.size))
        for chunk in entry.chunks
    )
    stored = sum(metadata.storage_data[MetadataIndex(name, chunk.offsets)].length for chunk in entry.chunks)
    num_elements = sum(prod(chunk.sizes) for chunk in entry.chunks)
    if not within or num_elements != prod(entry.size) or stored < num_elements * entry.properties.dtype.itemsize:
        raise CheckpointDamaged(f"{path} is damaged: its parts of {name} do not make a tensor {list(entry.size)}")


def _tensor_kind(value: Any) -> str:
    if isinstance(value, TensorStorageMetadata):
        return f"a tensor {list(value.size)} of {value.properties.dtype}"
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    return "a value"


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Files without zip's CRC-32 of each tensor: nobody reads it, the manifest has SHA-256, and it costs a core as much
    time as writing to a fast disk does."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _let_go(failure: BaseException) -> None:
    """Empties the frames that a failure remembers of what they held: shards on their way to the disk.

    A traceback keeps them for as long as anybody keeps the failure. Worse, views of DCP's buffers that are garbage in a
    cycle crash Python 3.12.0 and 3.12.1 (https://github.com/python/cpython/issues/111049).
    """
    known: list[BaseException] = []
    reached: BaseException | None = failure
    while reached is not None and reached not in known:
        known.append(reached)
        traceback.clear_frames(reached.__traceback__)
        reached = reached.__cause__ or reached.__context__


@contextmanager
def _dcp_errors(doing: str, folder: Path) -> Iterator[None]:
    """Turns DCP's exception, which is no Exception and prints every rank's traceback, into one sentence."""
    try:
        yield
    except CheckpointException as error:
        causes = {rank: cause for rank, (cause, _) in error.failures.items()}
        for failure in (error, *causes.values()):
            _let_go(failure)
        for cause in causes.values():
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from error  # DCP wraps Ctrl-C like any failure, but it is somebody's wish
            if isinstance(cause, RankFailure):
                raise cause from error
        described = "; ".join(f"rank {rank}: {type(cause).__name__}: {cause}" for rank, cause in causes.items())
        raise RankFailure(f"{doing} {folder} failed on {described}") from error
