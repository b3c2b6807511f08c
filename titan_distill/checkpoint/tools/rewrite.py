"""Writing a checkpoint from one process, one tensor at a time.

torch.distributed.checkpoint (DCP) lets each rank plan what it writes before it needs the data. Here one process plays
all the ranks, one after another: it plans N files without holding any tensor, and reads each one when its turn comes.
A tensor is stored in pieces of a few MiB along its first dim, because a rank that loads any part of a stored piece has
to read all of it: with pieces, a rank of an FSDP role reads its own rows and little more. The price is some hundred
bytes of index a piece.
"""

from __future__ import annotations

import heapq
import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from titan_distill.checkpoint.manifest import FileRecord
from titan_distill.checkpoint.publish import publish_alone
from titan_distill.checkpoint.tools.contents import open_checkpoint
from titan_distill.checkpoint.writer import Writer, check_space, planned_bytes

PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class TensorKind:
    """What is known of a tensor before it is read."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


Source = Callable[[str], Any]
"""Reads the value that a name stands for; called once for each name."""


def reshard(checkpoint: Path, out: Path, num_files: int) -> Path:
    """Writes everything that ``checkpoint`` holds to ``out``, in ``num_files`` data files. Returns ``out``.

    Holds one tensor, and while it is read also its largest stored part. Raises ValueError for a missing or damaged
    checkpoint, an ``out`` that exists, and more files than there are values.
    """
    contents = open_checkpoint(checkpoint)
    kinds = {name: _kind(contents.tensor(name)) for name in contents.names}
    _check_num_files(num_files, len(kinds), contents.path)

    def fill(folder: Path) -> dict[str, FileRecord]:
        return write(folder, kinds, contents.read, num_files, contents.metadata.planner_data)

    return publish_alone(out, contents.manifest, fill)


def write(
    folder: Path,
    kinds: Mapping[str, TensorKind | None],
    source: Source,
    num_files: int,
    paths: Mapping[str, Any] | None = None,
) -> dict[str, FileRecord]:
    """Writes ``num_files`` data files and their index; returns the records of all. Raises RuntimeError or OSError.

    Args:
        kinds: by name, None where the value is no tensor.
        paths: by name, where the value stood in the nested state that was saved; DCP's ``planner_data``.
    """
    assert 0 < num_files <= len(kinds), "a file without any value can't be written"
    nested = dict(paths or {name: (name,) for name in kinds})
    plans = [
        SavePlan([item for name in names for item in _items(name, kinds[name])], planner_data=nested)
        for names in _share_out(kinds, num_files)
    ]
    plans, metadata = dcp.DefaultSavePlanner().create_global_plan(plans)
    writer, pieces_of = Writer(folder), _Pieces(source)
    writer.set_up_storage_writer(is_coordinator=True)
    check_space(folder, planned_bytes(plans))
    results = []
    for number, plan in enumerate(plans):
        name = f"__{number}_0.distcp"  # as the ranks of a run name their files
        with writer.files.create_stream(folder / name, "wb") as stream:
            results.append([_write_item(stream, name, item, pieces_of.read(item)) for item in plan.items])
            os.fsync(stream.fileno())
    writer.finish(metadata, results)
    return writer.files.records


class _Pieces:
    """Reads what is planned, and keeps the tensor that a piece is part of until another one is needed."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.name, self.whole = "", torch.empty(0)

    def read(self, item: WriteItem) -> Any:
        if item.tensor_data is None:
            return self.source(item.index.fqn)
        if item.index.fqn != self.name:
            self.whole = torch.empty(0)  # let go of the last tensor before the next one is read
            self.name, self.whole = item.index.fqn, self.source(item.index.fqn)
        chunk = item.tensor_data.chunk
        part = self.whole[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes))]
        return part.clone(memory_format=torch.contiguous_format)  # torch.save writes all that a view is of


def _write_item(stream: io.IOBase, file_name: str, item: WriteItem, value: Any) -> WriteResult:
    """In DCP's format. Its own loop keeps a part of every tensor that it has written until the file is closed."""
    offset = stream.tell()
    torch.save(value, cast(IO[bytes], stream))
    length = stream.tell() - offset
    return WriteResult(item.index, length, _StorageInfo(file_name, offset, length))


def _items(name: str, kind: TensorKind | None) -> Iterator[WriteItem]:
    if kind is None:
        yield WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)
        return
    for chunk in pieces(kind):
        data = TensorWriteData(chunk, TensorProperties(dtype=kind.dtype), kind.shape)
        yield WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def pieces(kind: TensorKind) -> Iterator[ChunkStorageMetadata]:
    """Cuts a tensor along its first dim into parts of at most PIECE_BYTES, or one row where that is more."""
    if kind.num_bytes <= PIECE_BYTES:
        yield ChunkStorageMetadata(torch.Size([0] * len(kind.shape)), kind.shape)
        return
    num_rows, *row = kind.shape
    step = max(1, PIECE_BYTES * num_rows // kind.num_bytes)
    for start in range(0, num_rows, step):
        size = torch.Size([min(step, num_rows - start), *row])
        yield ChunkStorageMetadata(torch.Size([start, *(0 for _ in row)]), size)


def _share_out(kinds: Mapping[str, TensorKind | None], num_files: int) -> list[list[str]]:
    """Names by file: the largest first, each to the file with the fewest bytes so far, so that none stays empty."""
    num_bytes = {name: 1 if kind is None else max(1, kind.num_bytes) for name, kind in kinds.items()}
    files: list[list[str]] = [[] for _ in range(num_files)]
    heap = [(0, number) for number in range(num_files)]
    for name in sorted(num_bytes, key=lambda name: (-num_bytes[name], name)):
        used, number = heapq.heappop(heap)
        files[number].append(name)
        heapq.heappush(heap, (used + num_bytes[name], number))
    return [sorted(names) for names in files]


def _check_num_files(num_files: int, num_values: int, path: Path) -> None:
    if not 1 <= num_files <= num_values:
        raise ValueError(
            f"num_files is {num_files}, but {path} holds {num_values} values; ask for 1 to {num_values} files"
        )


def _kind(entry: TensorStorageMetadata | None) -> TensorKind | None:
    return None if entry is None else TensorKind(entry.size, entry.properties.dtype)
