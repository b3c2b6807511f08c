"""Reads and writes a checkpoint folder with torch.distributed.checkpoint (DCP), without trusting the folder.

DCP stores tensors that any layout can load. By default DCP unpickles `.metadata` and every value that is not a tensor,
so a checkpoint from elsewhere could run code. Here an unpickler that accepts only DCP's own plain records reads
`.metadata`, and `torch.load(weights_only=True)` reads values.

Writing differs from DCP's defaults as follows:

- Files are hashed on their way to the disk (`HashedFile`), and those of asynchronous saves are written by another
  process (`writing_process.py`).
- Rank 0 knows every rank's plan, and so the size of the checkpoint, before anything is written. If the disk has too
  little space, all ranks fail at once, instead of some of them minutes later.
- The values may come from copies in host memory (`asynchronous.py`). The plan is always made from the live tensors,
  because it needs their layouts; so asynchronous and synchronous saves write the same files.
- DCP's writer threads can swallow an OSError and report success (https://github.com/pytorch/pytorch/issues/191391). So
  only one thread writes, and `commit.py` compares the sizes that `written_files` returns with the disk.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.utils.serialization import config as serialization

from titan_distill.checkpoint.manifest import CheckpointDamaged, Manifest, verify_hashes
from titan_distill.checkpoint.writing_process import DelegatedFile, WritingProcess
from titan_distill.fault_tolerance.files import FileRecord, HashedFile, format_bytes, is_bare
from titan_distill.fault_tolerance.ranks import RankFailure, Ranks

METADATA_NAME = ".metadata"
_ITEM_BYTES = 4096
"""Estimated bytes of a tensor beyond its elements (header, alignment, index entry), and of any other value."""
_MARGIN = 1.01

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
    process: WritingProcess | None = None,
) -> dict[str, FileRecord]:
    """Writes `state` to `folder` from all ranks of `group`; returns the records of the files that this rank wrote.

    `copies` contains, by flat name, tensors to write instead of those in `state`. Files are written by `process` if
    there is one. Every rank raises NotEnoughSpace before anything is written, and RankFailure if any rank fails.
    """
    writer, planner = Writer(folder, process), _SavePlanner(copies or {})
    # Files need no CRC-32 of each tensor: nobody reads it, the manifest has SHA-256, and it takes a core as long as
    # writing to a fast disk.
    with _dcp_errors("writing", folder), serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
        dcp.save(state, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    return writer.files.records


def read(state: dict[str, Any], folder: Path, metadata: Metadata, group: dist.ProcessGroup | None = None) -> None:
    """Reads a checkpoint into the tensors of `state` in place, in any layout, and replaces its other values."""
    reader = _Reader(folder, metadata)
    with _dcp_errors("reading", folder):
        dcp.load(state, storage_reader=reader, planner=_LoadPlanner(), process_group=group, no_dist=group is None)


def read_metadata(folder: Path) -> Metadata:
    """Returns DCP's index of the checkpoint.

    Raises CheckpointDamaged if the file is not an index, refers to other code or to files outside the folder, or lists
    parts that do not cover their tensor.
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


def read_index(folder: Path, files: Mapping[str, FileRecord]) -> Metadata:
    """Returns the index after comparing it with the sizes of the files. Raises CheckpointDamaged."""
    metadata = read_metadata(folder)
    for name, num_bytes in written_files(folder, metadata).items():
        found = files[name].num_bytes if name in files else 0
        if found != num_bytes:
            raise CheckpointDamaged(f"{folder / name} has {found} bytes on disk instead of {num_bytes}; is it cut off?")
    return metadata


def open_together(folder: Path, manifest: Manifest, ranks: Ranks) -> Metadata:
    """Returns the index after comparing the hashes of all files. Each rank reads a share of the files.

    Raises CheckpointDamaged on every rank.
    """
    own = sorted(manifest.files)[ranks.rank :: ranks.size]
    ranks.together(lambda: verify_hashes(folder, manifest, own))
    return ranks.together(lambda: read_metadata(folder))


def written_files(folder: Path, metadata: Metadata) -> dict[str, int]:
    """Returns the expected size of each data file in bytes, by name. Raises CheckpointDamaged like `read_metadata`."""
    num_bytes: dict[str, int] = {}
    for info in metadata.storage_data.values():
        if not is_bare(info.relative_path):
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
    """Compares names, shapes and dtypes of `state` and checkpoint. Raises ValueError with the first difference."""
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
    """The pickle is not an index, or refers to a name that an index never needs."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise _Untrusted(f"refers to {module}.{name}, which an index never needs; do not trust this checkpoint")


class NotEnoughSpace(RankFailure):
    """The disk has less space than the checkpoint needs. Nothing has been written."""


class _HashedFiles(FileSystem):
    """File access of DCP that records size and SHA-256 of every file it writes."""

    def __init__(self, open_file: Callable[[Path], HashedFile | DelegatedFile]) -> None:
        self._open = open_file
        self.records: dict[str, FileRecord] = {}
        """Size and SHA-256 by file name."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb", "a save does not read"
        with self._open(Path(path)) as file:
            try:
                yield file
            except RuntimeError as error:
                if file.failure is not None:  # torch.save loses it, and complains of positions in its archive
                    raise file.failure from error
                raise
        self.records[Path(path).name] = file.record()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class Writer(dcp.FileSystemWriter):
    """DCP's writer of one checkpoint: one file per rank, flushed to disk."""

    def __init__(self, folder: Path, process: WritingProcess | None = None) -> None:
        # One thread: further ones are where DCP loses an OSError (https://github.com/pytorch/pytorch/issues/191391).
        # The process flushes what it writes.
        super().__init__(folder, thread_count=1, sync_files=process is None)
        self.fs = self.files = _HashedFiles(HashedFile if process is None else process.open)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Runs on rank 0 only. Raises NotEnoughSpace, which DCP tells the others."""
        check_space(Path(self.path), plans)
        return super().prepare_global_plan(plans)


class _SavePlanner(dcp.DefaultSavePlanner):
    """Plans from the live state, and writes the values of `copies` (by flat name) in place of live tensors."""

    def __init__(self, copies: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._copies[index.fqn] if index.fqn in self._copies else super().lookup_object(index)


def check_space(folder: Path, plans: list[SavePlan]) -> None:
    """Raises NotEnoughSpace if the shards that all ranks plan to write do not fit on the disk of `folder`."""
    needed = planned_bytes(plans)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NotEnoughSpace(
            f"the checkpoint needs {format_bytes(needed)}, but the disk of {folder.parent} has {format_bytes(free)} "
            "left; free some, or write elsewhere (a run: lower checkpoint.keep, or choose another job.output_dir)"
        )


def planned_bytes(plans: list[SavePlan]) -> int:
    """Returns the bytes that a checkpoint needs: the shards of all ranks, and `_ITEM_BYTES` for each value."""
    return math.ceil(_MARGIN * sum(_item_bytes(item) for plan in plans for item in plan.items))


def _item_bytes(item: WriteItem) -> int:
    if item.tensor_data is None:
        return _ITEM_BYTES
    return _ITEM_BYTES + math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


class _Reader(dcp.FileSystemReader):
    """DCP's reader of data files, with an index that `read_metadata` has read safely."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """DCP's load planner, which loads values that are not tensors without running code from the file."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        safe = io.BytesIO()  # for DCP's own load, which is not safe
        torch.save(torch.load(value, weights_only=True), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)


def flatten(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a nested state by their flat names in a checkpoint."""
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
    """Checks that the chunks lie within the tensor and cover it, and that their bytes suffice for its elements."""
    within = all(
        len(chunk.offsets) == len(chunk.sizes) == len(entry.size)
        and all(min(o, s) >= 0 and o + s <= n for o, s, n in zip(chunk.offsets, chunk.sizes, entry.size))
        for chunk in entry.chunks
    )
    stored = sum(metadata.storage_data[MetadataIndex(name, chunk.offsets)].length for chunk in entry.chunks)
    num_elements = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
    if not within or num_elements != math.prod(entry.size) or stored < num_elements * entry.properties.dtype.itemsize:
        raise CheckpointDamaged(f"{path} is damaged: its parts of {name} do not make a tensor {list(entry.size)}")


def _tensor_kind(value: Any) -> str:
    if isinstance(value, TensorStorageMetadata):
        return f"a tensor {list(value.size)} of {value.properties.dtype}"
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    return "a value"


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _let_go(failure: BaseException) -> None:
    """Clears the local variables in the frames of an error's traceback, which refer to shards that were being written.

    Otherwise these shards stay allocated as long as the error does. Also, views of DCP's buffers in a garbage cycle
    crash Python 3.12.0 and 3.12.1 (https://github.com/python/cpython/issues/111049).
    """
    known: list[BaseException] = []
    reached: BaseException | None = failure
    while reached is not None and reached not in known:
        known.append(reached)
        traceback.clear_frames(reached.__traceback__)
        reached = reached.__cause__ or reached.__context__


@contextmanager
def _dcp_errors(doing: str, folder: Path) -> Iterator[None]:
    """Turns DCP's error into a RankFailure with one sentence. DCP's error is not an Exception, and it prints every
    rank's traceback."""
    try:
        yield
    except CheckpointException as error:
        causes = {rank: cause for rank, (cause, _) in error.failures.items()}
        for failure in (error, *causes.values()):
            _let_go(failure)
        for cause in causes.values():
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from error  # DCP wraps Ctrl-C like a failure, but somebody asked for it
            if isinstance(cause, RankFailure):
                raise cause from error
        described = "; ".join(f"rank {rank}: {type(cause).__name__}: {cause}" for rank, cause in causes.items())
        raise RankFailure(f"{doing} {folder} failed on {described}") from error
