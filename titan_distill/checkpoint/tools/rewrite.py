"""Rewrites a checkpoint in another number of files, in one process, one tensor at a time.

In torch.distributed.checkpoint (DCP) each rank plans its file before it needs the data. Here one process acts as all
the ranks, one after another. It plans N files without any tensor in memory, and then reads each tensor just before
writing it. A tensor is stored in pieces of a few MiB along its first dim, because a rank that loads a part of a piece
must read the whole piece. With small pieces, a rank of an FSDP role reads its own rows and little more. The price is a
few hundred bytes of index per piece.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from titan_distill.checkpoint import commit
from titan_distill.checkpoint.storage import Writer, check_space
from titan_distill.checkpoint.tools.contents import Contents, open_checkpoint
from titan_distill.fault_tolerance.files import FileRecord
from titan_distill.fault_tolerance.ranks import Ranks

PIECE_BYTES = 4 << 20


def reshard(checkpoint: Path, out: Path, num_files: int) -> Path:
    """Writes all values of `checkpoint` to `out`, in `num_files` data files. Returns `out`.

    Memory: one tensor and, while it is read, its largest stored part. Raises ValueError for a missing or damaged
    checkpoint, an `out` that exists, and more files than there are values.
    """
    contents = open_checkpoint(checkpoint)
    if out.exists():
        raise ValueError(f"{out} exists already; write to another folder")
    num_values = len(contents.names)
    if not 1 <= num_files <= num_values:
        raise ValueError(
            f"num_files is {num_files}, but {contents.path} holds {num_values} values; ask for 1 to {num_values} files"
        )
    try:
        commit.publish(out, contents.manifest, lambda folder: _write(folder, contents, num_files), Ranks())
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise ValueError(f"{out} could not be written: {error}") from error
    return out


def _write(folder: Path, contents: Contents, num_files: int) -> dict[str, FileRecord]:
    paths = contents.metadata.planner_data  # where each value stands in the nested state
    plans = [
        SavePlan([item for name in names for item in _items(name, contents.tensor(name))], planner_data=paths)
        for names in _share_out(contents, num_files)
    ]
    plans, metadata = dcp.DefaultSavePlanner().create_global_plan(plans)
    writer = Writer(folder)
    writer.set_up_storage_writer(is_coordinator=True)
    check_space(folder, plans)
    results = []
    for number, plan in enumerate(plans):
        name = f"__{number}_0.distcp"  # as the ranks of a run name their files
        with writer.files.create_stream(folder / name, "wb") as stream:
            for _, items in groupby(plan.items, key=lambda item: item.index.fqn):
                results.append(_write_value(stream, name, list(items), contents))
            os.fsync(stream.fileno())
    writer.finish(metadata, results)
    return writer.files.records


def _write_value(stream: Any, file_name: str, items: list[WriteItem], contents: Contents) -> list[WriteResult]:
    """Reads a value and writes all its pieces in DCP's format. DCP's own loop would hold all tensors in memory until
    the end."""
    value, results = contents.read(items[0].index.fqn), []
    for item in items:
        offset = stream.tell()
        torch.save(value if item.tensor_data is None else _piece(value, item.tensor_data.chunk), stream)
        length = stream.tell() - offset
        results.append(WriteResult(item.index, length, _StorageInfo(file_name, offset, length)))
    return results


def _piece(whole: torch.Tensor, chunk: ChunkStorageMetadata) -> torch.Tensor:
    part = whole[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes))]
    return part.clone(memory_format=torch.contiguous_format)  # torch.save writes all that a view is of


def _items(name: str, entry: TensorStorageMetadata | None) -> Iterator[WriteItem]:
    if entry is None:
        yield WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)
        return
    for chunk in _pieces(entry):
        data = TensorWriteData(chunk, entry.properties, entry.size)
        yield WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _pieces(entry: TensorStorageMetadata) -> Iterator[ChunkStorageMetadata]:
    """Cuts a tensor along its first dim into parts of at most PIECE_BYTES. A larger row is one part."""
    if (num_bytes := _num_bytes(entry)) <= PIECE_BYTES:
        yield ChunkStorageMetadata(torch.Size([0] * len(entry.size)), entry.size)
        return
    num_rows, *row = entry.size
    step = max(1, PIECE_BYTES * num_rows // num_bytes)
    for start in range(0, num_rows, step):
        size = torch.Size([min(step, num_rows - start), *row])
        yield ChunkStorageMetadata(torch.Size([start, *(0 for _ in row)]), size)


def _share_out(contents: Contents, num_files: int) -> list[list[str]]:
    """Distributes the values over files: in descending size, each to the file with the fewest bytes so far. No file is
    empty."""
    num_bytes = {name: max(1, _num_bytes(contents.tensor(name))) for name in contents.names}
    files: list[list[str]] = [[] for _ in range(num_files)]
    used = [0] * num_files
    for name in sorted(num_bytes, key=lambda name: (-num_bytes[name], name)):
        number = used.index(min(used))
        files[number].append(name)
        used[number] += num_bytes[name]
    return [sorted(names) for names in files]


def _num_bytes(entry: TensorStorageMetadata | None) -> int:
    return 0 if entry is None else math.prod(entry.size) * entry.properties.dtype.itemsize
