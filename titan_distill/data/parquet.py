"""Reader and writer of parquet files of latents and text embeddings, in FastVideo's column scheme.

Each tensor has three columns: `<name>_bytes` (raw little-endian values), `<name>_shape` (list of int64) and
`<name>_dtype` (`"float32"`, `"float16"` or `"bfloat16"`). The standard tensors are `vae_latent` and `text_embedding`.
Other columns have the caption and facts about the clip. A text-only row, for data-free distillation, has no
`vae_latent`. A file may have further tensors of any shape; a reader asks for them by name.

Trade-offs. Training reads rows in random order, and the smallest unit that parquet can read is a row group. So the
writer makes small groups (`MAX_GROUP_ROWS`, `MAX_GROUP_BYTES`), with slightly worse compression. The reader caches the
last groups, up to `cache_bytes`: a small dataset is then entirely in memory, and for a large one each row costs reading
one group. Opening a folder reads only the footers. A row is checked when it is read, because checking all rows means
reading everything; `titan_distill.data.summary.inspect` does that in advance. The writer adds parquet's checksum to
each page, so a byte that changed on disk is detected.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import os
import textwrap
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from titan_distill.config.dtypes import DTYPES
from titan_distill.data.rows import BadRowError, RowDataset
from titan_distill.fault_tolerance.files import atomic

MAX_GROUP_ROWS = 32
MAX_GROUP_BYTES = 16 * 2**20
MAX_FIRST_ROWS = 4
"""Rows at the start of a dataset that are read before a run starts."""
MAX_FIRST_FILES = 8
"""Files whose first row is read before a run starts."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_TENSOR_TYPES = {"bytes": pa.binary(), "shape": pa.list_(pa.int64()), "dtype": pa.string()}


def _columns(name: str) -> dict[str, pa.DataType]:
    """Returns the names of the three columns of a tensor."""
    return {f"{name}_{part}": kind for part, kind in _TENSOR_TYPES.items()}


SCHEMA = pa.schema(
    {
        "id": pa.string(),
        **_columns("vae_latent"),
        **_columns("text_embedding"),
        "file_name": pa.string(),
        "caption": pa.string(),
        "media_type": pa.string(),
        "width": pa.int64(),
        "height": pa.int64(),
        "num_frames": pa.int64(),
        "duration_sec": pa.float64(),
        "fps": pa.float64(),
    }
)
REQUIRED_COLUMNS = ("caption", *_columns("text_embedding"))
LATENT_COLUMNS = tuple(_columns("vae_latent"))

_READ_ERRORS = (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError)
"""Errors that pyarrow raises for a damaged file. They include MemoryError, because a damaged length may request any
amount of memory."""

_REMEDY = "copy it again from where it was made, or name other data"


@dataclass(frozen=True)
class LatentRow:
    """One sample. The text embedding has the prompt's true length; the loader adds the padding."""

    id: str
    caption: str
    text_embedding: Tensor  # [L, D]
    vae_latent: Tensor | None = None  # [C, F, H, W], normalised as the transformer expects it
    file_name: str = ""
    media_type: str = "video"
    width: int = 0  # pixels
    height: int = 0  # pixels
    num_frames: int = 0  # pixel frames
    duration_sec: float = 0.0
    fps: float = 0.0
    extra: dict[str, Tensor] = field(default_factory=dict)  # further tensors by column name, of any shape


RowCheck = Callable[[LatentRow], None]
"""Check of a row against a run. Raises ValueError, which says what does not fit and need not name the row. Loader
processes get a pickled copy."""


def write_rows(path: str | Path, rows: Iterable[LatentRow]) -> int:
    """Writes `rows` to one parquet file and returns their number. Tensors are stored in their dtype.

    Rows are consumed one row group at a time. The file appears under its name only when it is complete.

    Raises:
        ValueError: there is no row, a caption is empty, a tensor has non-finite values or an unknown dtype, or the rows
            have different `extra` tensors.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    num_rows = 0
    remaining = iter(rows)
    first = next(remaining, None)
    if first is None:
        raise ValueError(f"no rows to write to {path}: a dataset needs at least one")
    schema = schema_with(first.extra)
    records = (_to_record(row, first.extra) for row in itertools.chain([first], remaining))
    with (
        atomic(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for group in _row_groups(records):
            writer.write_table(pa.Table.from_pylist(group, schema))
            num_rows += len(group)
    return num_rows


def schema_with(names: Iterable[str]) -> pa.Schema:
    """Returns `SCHEMA` with the columns of further tensors."""
    return pa.schema([*SCHEMA, *(pa.field(*column) for name in names for column in _columns(name).items())])


def read_texts(path: str | Path, column: str) -> list[str]:
    """Returns one text column (such as `id` or `caption`) of all rows of a parquet file or folder, in order. No other
    column is read.

    Raises:
        ValueError: as `ParquetDataset`.
    """
    texts: list[str] = []
    for file in _list_files(Path(path)):
        with _reading(f"{file} has no readable column {column}"), pq.ParquetFile(file) as parquet:
            texts += parquet.read(columns=[column], use_threads=False).column(column).to_pylist()
    return texts


def read_captions(path: str | Path, num_rows: int | None) -> list[str]:
    """Returns the captions of the first `num_rows` rows, or of all rows, of a parquet file or folder. No other column
    is read.

    Raises:
        ValueError: as `ParquetDataset`, or for a row without caption.
    """
    return list(itertools.islice(_captions(Path(path)), num_rows))


def _captions(path: Path) -> Iterator[str]:
    for file in _list_files(path):
        for group in _index_file(file, SCHEMA)[0]:
            column = _read_group(group, SCHEMA, ("caption",)).column("caption")
            for row, value in enumerate(column, group.first_row):
                where = f"{file}, row {row}"
                yield _caption(_plain({"caption": value}, "caption", where), where)


def extra_names(path: str | Path) -> tuple[str, ...]:
    """Returns the names of the further tensors in the first file of a dataset, sorted.

    Raises:
        ValueError: as `ParquetDataset`.
    """
    file = _list_files(Path(path))[0]
    with _reading(f"{file} is not a complete parquet file"):
        columns = set(pq.read_schema(file).names) - set(SCHEMA.names)
    names = {column.removesuffix("_bytes") for column in columns if column.endswith("_bytes")}
    return tuple(sorted(name for name in names if _columns(name).keys() <= columns))


@contextmanager
def _reading(fault: str) -> Iterator[None]:
    """Turns the errors of a damaged file into one ValueError that begins with `fault`."""
    try:
        yield
    except (*_READ_ERRORS, KeyError) as error:
        raise ValueError(f"{fault} ({_brief(error)}): {_REMEDY}") from error


class ParquetDataset(RowDataset[LatentRow]):
    """Map-style view of one parquet file, or of all `*.parquet` files of a folder sorted by name.

    Args:
        path: file or folder.
        tensors: names of the further tensors that every row must have; they are returned in `LatentRow.extra`.
        checks: further checks of each row. A row that fails one is bad.
        max_bad_rows: see `RowDataset`.
        cache_bytes: memory for decoded row groups, per process.

    Raises:
        ValueError: the path does not exist, a file is empty, truncated or without rows, or columns are missing or of
            another type.
        BadRowError: while indexing, at the first bad row beyond `max_bad_rows`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        tensors: Sequence[str] = (),
        checks: Sequence[RowCheck] = (),
        max_bad_rows: int | None = None,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        super().__init__(path, max_bad_rows)
        self._tensors, self._schema, self._checks = tuple(tensors), schema_with(tensors), tuple(checks)
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[_Group, pa.Table] = OrderedDict()
        files = _list_files(self.path)
        self.num_files = len(files)
        self._groups: list[_Group] = []
        digest = hashlib.sha256()
        for file in files:
            groups, footer = _index_file(file, self._schema)
            self._groups += groups
            num_rows = sum(group.num_rows for group in groups)
            digest.update(os.fsencode(f"{file.relative_to(self.path)}\0{file.stat().st_size}\0{num_rows}\0") + footer)
        self.digest = digest.hexdigest()
        self._group_ends = list(itertools.accumulate(group.num_rows for group in self._groups))
        if not len(self):
            raise ValueError(f"{self.path} holds no rows; name other data")

    def __len__(self) -> int:
        return self._group_ends[-1] if self._group_ends else 0

    @property
    def has_latents(self) -> bool:
        return self[0].vae_latent is not None

    @property
    def first_rows(self) -> Sequence[int]:
        starts = [end - group.num_rows for end, group in zip(self._group_ends, self._groups, strict=True)]
        files = [start for start, group in zip(starts, self._groups, strict=True) if not group.first_row]
        return sorted({*range(min(MAX_FIRST_ROWS, len(self))), *files[:MAX_FIRST_FILES]})

    def read(self, index: int) -> LatentRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a dataset of {len(self)} rows")
        number = bisect.bisect_right(self._group_ends, index)
        group = self._groups[number]
        offset = index - (self._group_ends[number] - group.num_rows)
        table = self._table(group)
        record = {name: table.column(name)[offset] for name in table.column_names}
        where = f"{group.file}, row {group.first_row + offset}"
        row = _from_record(record, self._tensors, where)
        try:
            for check in self._checks:
                check(row)
        except ValueError as error:
            raise BadRowError(f"{where}: {error}") from error
        return row

    def __getstate__(self) -> dict[str, Any]:
        # A worker started by spawn fills a cache of its own.
        return {**self.__dict__, "_cache": OrderedDict()}

    def _table(self, group: _Group) -> pa.Table:
        if group not in self._cache:
            self._cache[group] = _read_group(group, self._schema)
            while len(self._cache) > 1 and sum(table.nbytes for table in self._cache.values()) > self._cache_bytes:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]


class _Group(NamedTuple):
    """Position of a row group: its file, its index and its `first_row` within the file."""

    file: Path
    number: int
    first_row: int
    num_rows: int


def parquet_files(folder: Path) -> list[Path]:
    """Returns the parquet files in a folder, sorted by name; none if there is no such folder."""
    paths = folder.iterdir() if folder.is_dir() else iter(())
    return sorted(path for path in paths if path.suffix.lower() == ".parquet")


def _list_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"no dataset at {path}: expected a parquet file or a folder of them")
    files = parquet_files(path)
    if not files:
        raise ValueError(f"no *.parquet file in {path}: expected the output of `titan-distill data preprocess`")
    return files


def _index_file(file: Path, expected: pa.Schema) -> tuple[list[_Group], bytes]:
    """Returns the row groups and the footer of a file."""
    with (
        _reading(f"{file} is not a complete parquet file"),
        file.open("rb") as stream,
        pq.ParquetFile(stream) as parquet,
    ):
        footer = _footer(stream)
        schema, metadata = parquet.schema_arrow, parquet.metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        columns = list(zip(schema.names, schema.types))
    if min(sizes, default=0) < 0 or sum(sizes) != metadata.num_rows:
        raise ValueError(f"{file} is damaged: its row groups do not add up to {metadata.num_rows} rows: {_REMEDY}")
    _check_columns(file, columns, expected)
    first_rows = itertools.accumulate(sizes, initial=0)
    groups = [_Group(file, number, first, size) for number, (first, size) in enumerate(zip(first_rows, sizes))]
    return groups, footer


def _footer(file: BinaryIO) -> bytes:
    """Returns the footer of a valid parquet file. It ends with its length, in 4 bytes, and `PAR1`."""
    file.seek(-8, os.SEEK_END)
    num_bytes = int.from_bytes(file.read(4), "little")
    file.seek(-8 - num_bytes, os.SEEK_END)
    return file.read(num_bytes)


def _check_columns(file: Path, columns: list[tuple[str, pa.DataType]], expected: pa.Schema) -> None:
    names = [name for name, _ in columns]
    required = REQUIRED_COLUMNS + (LATENT_COLUMNS if set(LATENT_COLUMNS) & set(names) else ())
    required += tuple(expected.names[len(SCHEMA) :])
    missing = [name for name in required if name not in names]
    if missing:
        raise ValueError(f"{file} lacks the columns {', '.join(missing)}: a dataset has {', '.join(required)}")
    for name in expected.names:
        if names.count(name) > 1:
            raise ValueError(f"{file} has the column {name} {names.count(name)} times: a dataset has it once")
    for name, kind in columns:
        if name in expected.names and not _reads_as(kind, expected.field(name).type):
            raise ValueError(f"{file} has the column {name} as {kind}: a dataset has it as {expected.field(name).type}")


def _reads_as(kind: pa.DataType, expected: pa.DataType) -> bool:
    """Returns whether values of a column's type read as the same Python type as those of the expected type."""
    types = pa.types
    if types.is_null(kind):
        return True
    if types.is_list(expected):
        is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        return is_list and _reads_as(kind.value_type, expected.value_type)
    if types.is_string(expected):
        text = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_string(text) or types.is_large_string(text)
    if types.is_binary(expected):
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    return types.is_integer(kind) or (types.is_floating(expected) and types.is_floating(kind))


def _read_group(group: _Group, schema: pa.Schema, wanted: Sequence[str] | None = None) -> pa.Table:
    # Opened anew for each group and read without Arrow's thread pool, so that nothing is shared across a fork.
    where = f"{group.file}, rows {group.first_row} to {group.first_row + group.num_rows - 1}"
    try:
        with pq.ParquetFile(group.file, page_checksum_verification=True) as parquet:
            columns = [name for name in wanted or schema.names if name in parquet.schema_arrow.names]
            table = parquet.read_row_group(group.number, columns=columns, use_threads=False)
    except _READ_ERRORS as error:
        raise BadRowError(f"{where}: unreadable ({_brief(error)})") from error
    if table.num_rows != group.num_rows:
        raise BadRowError(f"{where}: unreadable ({table.num_rows} rows were found)")
    return table


def _brief(value: object, width: int = 200) -> str:
    """Returns a value as one short printable line. pyarrow's messages have several lines and contain bytes of the
    file."""
    words = textwrap.shorten(str(value), width, placeholder=" ...")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in words)


def _row_groups(records: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Cuts a stream of records into row groups of at most `MAX_GROUP_ROWS` rows and about `MAX_GROUP_BYTES`."""
    group: list[dict[str, Any]] = []
    num_bytes = 0
    for record in records:
        group.append(record)
        num_bytes += sum(len(value) for value in record.values() if isinstance(value, bytes))
        if len(group) == MAX_GROUP_ROWS or num_bytes >= MAX_GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _to_record(row: LatentRow, extra: Iterable[str]) -> dict[str, Any]:
    if not row.caption.strip():
        raise ValueError(f"row {row.id!r}: caption is empty; write one, or remove the row")
    if set(row.extra) != set(extra):
        raise ValueError(
            f"row {row.id!r} has the tensors {sorted(row.extra)}, the first row {sorted(extra)}: use the same in all"
        )
    record = {name: getattr(row, name) for name in SCHEMA.names if hasattr(row, name)}
    for name, tensor in {"vae_latent": row.vae_latent, "text_embedding": row.text_embedding, **row.extra}.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"row {row.id!r}: {name} has dtype {tensor.dtype}: use one of {', '.join(DTYPES)}")
        if not tensor.isfinite().all():
            raise ValueError(f"row {row.id!r}: {name} has non-finite values: a dataset holds finite values only")
        record[f"{name}_bytes"] = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        record[f"{name}_shape"] = list(tensor.shape)
        record[f"{name}_dtype"] = DTYPE_NAMES[tensor.dtype]
    return record


def _from_record(record: Mapping[str, pa.Scalar], tensors: Iterable[str], where: str) -> LatentRow:
    facts = {name: _plain(record, name, where) for name in record if name in LatentRow.__dataclass_fields__}
    known = {name: value for name, value in facts.items() if value is not None}
    caption = known.get("caption")
    embedding = _tensor(record, "text_embedding", 2, where)
    if embedding is None:
        raise BadRowError(f"{where}: no text embedding for caption {_brief(caption or '', 80)!r}")
    known["caption"] = _caption(caption, where)
    latent = _tensor(record, "vae_latent", 4, where)
    extra = {name: _tensor(record, name, None, where) for name in tensors}
    if absent := [name for name, tensor in extra.items() if tensor is None]:
        raise BadRowError(f"{where}: no {absent[0]}")
    return LatentRow(**{"id": where, **known, "text_embedding": embedding, "vae_latent": latent, "extra": extra})


def _caption(caption: str | None, where: str) -> str:
    if caption is None or not caption.strip():
        raise BadRowError(f"{where}: caption is empty")
    return caption


def _plain(record: Mapping[str, pa.Scalar], name: str, where: str) -> Any:
    try:
        return record[name].as_py()
    except UnicodeDecodeError as error:
        raise BadRowError(f"{where}: {name} is not valid UTF-8 ({_brief(error)})") from error


def _tensor(record: Mapping[str, pa.Scalar], name: str, num_dims: int | None, where: str) -> Tensor | None:
    """Builds a tensor from its three columns; None if they are absent or empty. `num_dims` is its number of dims; None
    allows any."""
    if f"{name}_bytes" not in record:
        return None
    data = record[f"{name}_bytes"].as_buffer() if record[f"{name}_bytes"].is_valid else pa.py_buffer(b"")
    shape, dtype_name = record[f"{name}_shape"].as_py() or [], _plain(record, f"{name}_dtype", where) or ""
    if not data.size and not shape:
        return None
    dtype = DTYPES.get(dtype_name)
    if dtype is None:
        raise BadRowError(f"{where}: {name}_dtype is {dtype_name!r}: expected one of {', '.join(DTYPES)}")
    if len(shape) != (num_dims or max(1, len(shape))) or not all(size is not None and size >= 1 for size in shape):
        expected = "positive sizes" if num_dims is None else f"{num_dims} positive sizes"
        raise BadRowError(f"{where}: {name}_shape is {_brief(shape)}: expected {expected}")
    if data.size != math.prod(shape) * dtype.itemsize:
        size = math.prod(shape) * dtype.itemsize
        raise BadRowError(f"{where}: {name}_bytes holds {data.size} bytes: {shape} in {dtype_name} takes {size}")
    # bytearray: the copy is writable and outlives the cached row group.
    tensor = torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
    if not tensor.isfinite().all():
        raise BadRowError(f"{where}: {name} has non-finite values")
    return tensor
