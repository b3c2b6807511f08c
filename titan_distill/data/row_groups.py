"""Row groups of parquet files: an index of all of them, and a cache of those that were read last.

Opening reads each file's footer once. A footer lists the pages of all columns of all row groups and takes longer to
parse than a group to read, so parsed footers are kept, the last ones up to `FOOTER_BYTES`. Row groups are kept up to
`cache_bytes`, but at least one. Both are counted while they come and go (`RowGroups.held_bytes`), so a process needs no
more than these two limits and one row group, whatever the size of the dataset.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from titan_distill.data.fastvideo import own_columns
from titan_distill.data.folders import UNFINISHED, VIDEOS, files_below
from titan_distill.data.location import Location, parquet_source
from titan_distill.data.order import GroupSizes
from titan_distill.data.rows import BadRowError, brief
from titan_distill.data.tensor_columns import Columns, TensorColumn, columns_of, decode_column

FOOTER_BYTES = 64 * 2**20
"""Memory for parsed footers, by their size on disk."""
CACHE_BYTES = 256 * 2**20
"""Default memory for decoded row groups. Two windows of `SampleOrder` fit in it."""

REMEDY = "copy it again from where it was made, or name other data"

_READ_ERRORS = (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError)
"""Errors that pyarrow raises for a damaged file. They include MemoryError, because a damaged length may request any
amount of memory."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Group:
    """A row group in memory."""

    columns: Columns  # without those of `tensors`
    tensors: dict[str, TensorColumn]

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return sum(part.nbytes for part in (*self.columns.values(), *self.tensors.values()))


class Place(NamedTuple):
    """Place of a row. Its text, for messages, is "<file>, row n"; it is made only where it is needed."""

    groups: RowGroups
    group: int
    row: int
    """Index in the group."""

    def __str__(self) -> str:
        file, first_row, _ = self.groups.in_file(self.group)
        return f"{self.groups.files[file]}, row {first_row + self.row}"


def list_files(path: Location) -> Sequence[Location]:
    """Returns the parquet files of a dataset, in order: those of a folder, or, if it has none itself, those of its
    subfolders. Raises ValueError if there are none, or if `titan-distill data preprocess` has not finished."""
    with reading(f"{path} can't be read"):
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise ValueError(f"no dataset at {path}: expected a parquet file or a folder of them")
        files = parquet_files(path) or files_below(path, (".parquet",))
        for folder in dict.fromkeys((path / UNFINISHED, *(file.parent for file in files))):
            if folder.name == UNFINISHED and (folder / VIDEOS).is_file():
                raise ValueError(
                    f"{folder.parent} lacks clips, because `titan-distill data preprocess` was stopped there; the same "
                    "command goes on"
                )
    if not files:
        raise ValueError(f"no *.parquet file in or below {path}: expected what `titan-distill data preprocess` writes")
    return files


def parquet_files(folder: Location) -> Sequence[Location]:
    """Returns the parquet files in a folder, sorted by name; none if there is no such folder."""
    paths = folder.iterdir() if folder.is_dir() else iter(())
    return sorted((path for path in paths if path.suffix.lower() == ".parquet"), key=str)


class RowGroups:
    """Row groups of several files, numbered over all of them.

    Args:
        root: file or folder of the dataset. The digest contains names relative to it.
        files: parquet files, in order.
        columns: names of the columns to read; a file may lack some.
        tensors: names of tensors, whose columns are read too, and their numbers of dims; None allows any.
        check: called with each file and its schema. Raises ValueError for one that does not fit.
        cache_bytes: memory for decoded row groups.

    Raises:
        ValueError: a file is not complete, or its footer contradicts itself.
    """

    def __init__(
        self,
        root: Location,
        files: Sequence[Location],
        columns: Sequence[str],
        tensors: Mapping[str, int | None],
        check: Callable[[Location, pa.Schema], None],
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.files = files
        self._columns = (*columns, *(column for name in tensors for column in columns_of(name)))
        self._tensors, self._cache_bytes = dict(tensors), cache_bytes
        self._groups: _Kept[Group] = _Kept(cache_bytes)
        self._footers: _Kept[pq.FileMetaData] = _Kept(FOOTER_BYTES)
        num_rows: list[int] = []
        num_bytes: list[int] = []
        file_ends: list[int] = []
        digest = hashlib.sha256()
        for number, file in enumerate(files):
            schema, metadata, footer, file_bytes = _read_footer(file)
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            sizes = [group.num_rows for group in groups]
            if min(sizes, default=0) < 0 or sum(sizes) != metadata.num_rows:
                raise ValueError(
                    f"{file} is damaged: its row groups do not add up to {metadata.num_rows} rows: {REMEDY}"
                )
            check(file, pa.schema([f.with_name(own) for f, own in zip(schema, own_columns(schema.names))]))
            num_rows += sizes
            num_bytes += [group.total_byte_size for group in groups]
            file_ends.append(len(num_rows))
            self._footers.add(number, metadata, len(footer))
            name = file.relative_to(root)  # type: ignore[arg-type]  # both are of one kind
            digest.update(os.fsencode(f"{name}\0{file_bytes}\0{sum(sizes)}\0") + footer)
        self.digest = digest.hexdigest()
        self.sizes = GroupSizes(np.array(num_rows, np.int64), np.array(num_bytes, np.int64))
        self._row_ends = np.cumsum(self.sizes.num_rows)
        self.num_rows = int(self._row_ends[-1]) if num_rows else 0
        self._file_ends = np.array(file_ends, np.int64)

    def __len__(self) -> int:
        return len(self._row_ends)

    @property
    def held_bytes(self) -> int:
        """Bytes of the row groups and footers that are kept."""
        return self._groups.num_bytes + self._footers.num_bytes

    @property
    def file_starts(self) -> list[int]:
        """First row of each file that has rows."""
        return [start for start, end in self._rows_of_files if start < end]

    @property
    def _rows_of_files(self) -> list[tuple[int, int]]:
        """First row of each file, and the row after its last."""
        ends = np.concatenate([[0], self._row_ends])[np.concatenate([[0], self._file_ends])].tolist()
        return list(itertools.pairwise(ends))

    def locate(self, row: int) -> Place:
        """Returns the group of a row and the row's index in it."""
        group = bisect.bisect_right(self._row_ends, row)
        return Place(self, group, row - self._first_row(group))

    def read(self, number: int) -> Group:
        """Returns a row group, from the cache or from disk. Raises BadRowError if it is unreadable."""
        group = self._groups.get(number)
        if group is None:
            group = self._decode(self._load(number))
            self._groups.add(number, group, group.nbytes)
        return group

    def drop(self, tensor: str) -> None:
        """Reads a tensor's columns no longer."""
        del self._tensors[tensor]
        self._columns = tuple(name for name in self._columns if name not in columns_of(tensor))
        self._groups = _Kept(self._cache_bytes)

    def read_column(self, name: str) -> Iterator[tuple[pa.Array | None, int]]:
        """Yields a column of each file, None if the file lacks it, and the file's number of rows. For small columns:
        they are not kept. Raises ValueError for a damaged one."""
        for number, (start, end) in enumerate(self._rows_of_files):
            file = self.files[number]
            with (
                reading(f"{file} has no readable column {name}"),
                pq.ParquetFile(parquet_source(file), metadata=self._footers.get(number)) as parquet,
            ):
                has_it = name in parquet.schema_arrow.names
                column = parquet.read(columns=[name], use_threads=False).column(name) if has_it else None
            yield None if column is None else _one_array(column), end - start

    def __getstate__(self) -> dict[str, Any]:
        # A process started by spawn fills a cache of its own.
        return {**self.__dict__, "_groups": _Kept(self._cache_bytes), "_footers": _Kept(FOOTER_BYTES)}

    def _decode(self, columns: Columns) -> Group:
        tensors = {name: decode_column(columns, name, num_dims) for name, num_dims in self._tensors.items()}
        decoded = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        done = {column for name in decoded for column in columns_of(name)}
        return Group({name: column for name, column in columns.items() if name not in done}, decoded)

    def _load(self, number: int) -> Columns:
        # Opened anew for each group and read without Arrow's thread pool, so that nothing is shared across a fork.
        file, first_row, in_file = self.in_file(number)
        size = int(self.sizes.num_rows[number])
        where = f"{self.files[file]}, rows {first_row} to {first_row + size - 1}"
        try:
            metadata = self._footers.get(file)
            if metadata is None:
                metadata = pq.read_metadata(parquet_source(self.files[file]))
                self._footers.add(file, metadata, metadata.serialized_size)
            source = parquet_source(self.files[file])
            with pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True) as parquet:
                stored = parquet.schema_arrow.names
                wanted = {own: name for own, name in zip(own_columns(stored), stored) if own in self._columns}
                table = parquet.read_row_group(in_file, columns=list(wanted.values()), use_threads=False)
        except _READ_ERRORS as error:
            raise BadRowError(f"{where}: unreadable ({brief(error)})") from error
        if table.num_rows != size:
            raise BadRowError(f"{where}: unreadable ({table.num_rows} rows were found)")
        columns = {own: table.column(name) for own, name in wanted.items()}
        return {name: column.chunk(0) if column.num_chunks == 1 else column for name, column in columns.items()}

    def _first_row(self, number: int) -> int:
        return int(self._row_ends[number - 1]) if number else 0

    def in_file(self, number: int) -> tuple[int, int, int]:
        """Returns a group's file, and its first row and its index in that file."""
        file = int(np.searchsorted(self._file_ends, number, side="right"))
        first_group = int(self._file_ends[file - 1]) if file else 0
        return file, self._first_row(number) - self._first_row(first_group), number - first_group


class _Kept(Generic[Value]):
    """The values that were used last, by number, up to `max_bytes` but at least one."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._values: OrderedDict[int, tuple[Value, int]] = OrderedDict()

    def get(self, number: int) -> Value | None:
        if number not in self._values:
            return None
        self._values.move_to_end(number)
        return self._values[number][0]

    def add(self, number: int, value: Value, num_bytes: int) -> None:
        self._values[number] = (value, num_bytes)
        self.num_bytes += num_bytes
        while len(self._values) > 1 and self.num_bytes > self._max_bytes:
            _, (_, freed) = self._values.popitem(last=False)
            self.num_bytes -= freed


@contextmanager
def reading(fault: str) -> Iterator[None]:
    """Turns the errors of a damaged file into one ValueError that begins with `fault`."""
    try:
        yield
    except (*_READ_ERRORS, KeyError) as error:
        raise ValueError(f"{fault} ({brief(error)}): {REMEDY}") from error


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _read_footer(file: Location) -> tuple[pa.Schema, pq.FileMetaData, bytes, int]:
    """Returns the schema and the footer of a file, parsed and as its bytes, and the size of the file."""
    with (
        reading(f"{file} is not a complete parquet file"),
        file.open("rb") as stream,
        pq.ParquetFile(stream) as parquet,
    ):
        footer = _footer(stream)
        return parquet.schema_arrow, parquet.metadata, footer, stream.seek(0, os.SEEK_END)


def _footer(file: IO[bytes]) -> bytes:
    """Returns the footer of a valid parquet file. It ends with its length, in 4 bytes, and `PAR1`."""
    file.seek(-8, os.SEEK_END)
    num_bytes = int.from_bytes(file.read(4), "little")
    file.seek(-8 - num_bytes, os.SEEK_END)
    return file.read(num_bytes)
