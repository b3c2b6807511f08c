"""Reader and writer of parquet files of latents and text embeddings, in FastVideo's column scheme.

Each tensor has three columns: `<name>_bytes` (raw little-endian values), `<name>_shape` (list of int64) and
`<name>_dtype` (`"float32"`, `"float16"` or `"bfloat16"`). The standard tensors are `vae_latent` and `text_embedding`.
Other columns have the caption and facts about the clip. A text-only row, for data-free distillation, has no
`vae_latent`. A file may have further tensors of any shape; a reader asks for them by name.

Trade-offs. Training reads rows in random order, and the smallest unit that parquet can read is a row group. So the
writer makes groups of about 1 MiB (`MAX_GROUP_BYTES`): a larger row is read alone, and small rows share the cost of a
group, which is about a millisecond and two kilobytes of footer. `titan_distill.data.order` shuffles large datasets so
that the reader's cache (`row_groups`) gets each group once per epoch. Opening a folder reads only the footers. A row is
checked when it is read, because checking all rows means reading everything; `titan_distill.data.summary.inspect` does
that in advance. The writer adds parquet's checksum to each page, so a byte that changed on disk is detected.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from titan_distill.config.dtypes import DTYPES
from titan_distill.data.fastvideo import (
    TIMESTEPS,
    TRAJECTORY,
    UNREAD,
    counts_latent_frames,
    is_worker_file,
    own_columns,
    split_trajectory,
)
from titan_distill.data.latents import NUM_ROWS, Form, LatentStatistics, find_form
from titan_distill.data.location import Location, location, parquet_source, resolved
from titan_distill.data.manifest import DataManifest, read_manifest
from titan_distill.data.order import GroupSizes, Integers
from titan_distill.data.row_groups import CACHE_BYTES, Group, Place, RowGroups, list_files, reading
from titan_distill.data.rows import BadRowError, RowDataset, brief
from titan_distill.data.tensor_columns import columns_of, decode_row, plain
from titan_distill.fault_tolerance.files import atomic

MAX_GROUP_ROWS = 4096
MAX_GROUP_BYTES = 2**20
MAX_FIRST_ROWS = 4
"""Rows at the start of a dataset that are read before a run starts."""
MAX_FIRST_FILES = 8
"""Files whose first row is read before a run starts."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        **columns_of("vae_latent"),
        **columns_of("text_embedding"),
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
REQUIRED_COLUMNS = ("caption", *columns_of("text_embedding"))
LATENT_COLUMNS = tuple(columns_of("vae_latent"))
FACTS = ("file_name", "media_type", "width", "height", "num_frames", "duration_sec", "fps")
_PLAIN_FIELDS = frozenset({"id", "caption", *FACTS})


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
        pq.ParquetWriter(
            temporary,
            schema,
            compression="zstd",
            use_dictionary=_repeating(schema),
            write_page_checksum=True,
        ) as writer,
    ):
        for group in _row_groups(records):
            writer.write_table(pa.Table.from_pylist(group, schema))
            num_rows += len(group)
    return num_rows


def _repeating(schema: pa.Schema) -> list[str]:
    """Returns the names of the parquet columns whose values repeat, for which a dictionary saves space."""
    lists = [f"{name}.list.element" for name in schema.names if name.endswith("_shape")]
    return [*lists, *(name for name in schema.names if not name.endswith(("_bytes", "_shape")) and name != "id")]


def schema_with(names: Iterable[str]) -> pa.Schema:
    """Returns `SCHEMA` with the columns of further tensors."""
    return pa.schema([*SCHEMA, *(pa.field(*column) for name in names for column in columns_of(name).items())])


def read_ids(path: str | Location) -> list[str]:
    """Returns the ids of all rows of a parquet file or folder, in order. No other column is read.

    Raises:
        ValueError: as `ParquetDataset`.
    """
    ids: list[str] = []
    for file in list_files(location(path)):
        with reading(f"{file} has no readable column id"), pq.ParquetFile(parquet_source(file)) as parquet:
            ids += parquet.read(columns=["id"], use_threads=False).column("id").to_pylist()
    return ids


def read_captions(path: str | Location, num_rows: int | None) -> list[str]:
    """Returns the captions of the first `num_rows` rows, or of all rows, of a parquet file or folder. No other column
    is read.

    Raises:
        ValueError: as `ParquetDataset`, or for a row without caption.
    """
    return list(itertools.islice(_captions(location(path)), num_rows))


def _captions(path: Location) -> Iterator[str]:
    groups = RowGroups(path, list_files(path), ("caption",), {}, partial(_check_columns, expected=SCHEMA))
    for number in range(len(groups)):
        for row, value in enumerate(groups.read(number).columns["caption"]):
            where = Place(groups, number, row)
            yield _caption(plain({"caption": value}, "caption", where), where)


def extra_names(path: str | Location) -> tuple[str, ...]:
    """Returns the names of the further tensors in the first file of a dataset, sorted, without those of pixels.

    Raises:
        ValueError: as `ParquetDataset`.
    """
    file = list_files(location(path))[0]
    with reading(f"{file} is not a complete parquet file"):
        columns = set(own_columns(pq.read_schema(parquet_source(file)).names)) - set(SCHEMA.names)
    names = {column.removesuffix("_bytes") for column in columns if column.endswith("_bytes")}
    return tuple(sorted(name for name in names - {UNREAD} if columns_of(name).keys() <= columns))


class ParquetDataset(RowDataset[LatentRow]):
    """Map-style view of one parquet file, or of all `*.parquet` files of a folder sorted by name (`list_files`).

    Args:
        path: file or folder; local, or a URL that fsspec opens.
        tensors: names of the further tensors that every row must have; they are returned in `LatentRow.extra`.
        for_batches: whether rows are only put together to batches. They then come without the facts about the clip,
            from file name to fps, and their tensors share memory with the cache and must not be changed.
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
        path: str | Location,
        *,
        tensors: Sequence[str] = (),
        for_batches: bool = False,
        checks: Sequence[RowCheck] = (),
        max_bad_rows: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        super().__init__(path, max_bad_rows)
        self._tensors, self._checks, self._copies = tuple(tensors), tuple(checks), not for_batches
        self._groups = RowGroups(
            self.path,
            list_files(self.path),
            ("id", "caption", *(() if for_batches else FACTS)),
            {"text_embedding": 2, "vae_latent": 4, **dict.fromkeys(tensors)},
            partial(_check_columns, expected=schema_with(tensors)),
            cache_bytes,
        )
        self._statistics: LatentStatistics | None = None
        self.num_files, self.digest = len(self._groups.files), self._groups.digest
        if not len(self):
            raise ValueError(f"{self.path} holds no rows; name other data")

    def __len__(self) -> int:
        return self._groups.num_rows

    @property
    def files(self) -> set[str]:
        return {resolved(file) for file in self._groups.files}

    @functools.cached_property
    def manifests(self) -> dict[Location, DataManifest]:
        """Manifests by folder: that of the dataset, and those of its subfolders with files. Raises ValueError for one
        that can't be read."""
        own = self.path if self.path.is_dir() else self.path.parent
        folders = dict.fromkeys((own, *(file.parent for file in self._groups.files)))
        return {folder: manifest for folder in folders if (manifest := read_manifest(folder)) is not None}

    @property
    def has_latents(self) -> bool:
        return self[0].vae_latent is not None

    @property
    def group_sizes(self) -> GroupSizes:
        return self._groups.sizes

    def drop_latents(self) -> None:
        """Reads no latents from now on: every row is one of text."""
        self._groups.drop("vae_latent")

    def place(self, index: int) -> Place:
        """Returns the place of a row, for messages."""
        return self._groups.locate(index)

    def latent_shapes(self) -> Integers:
        """Returns the shape of each row's latents, [N, 4], from one column: 0 for a row without latents, -1 for one
        whose shape has not four sizes. Raises ValueError if the column can't be read."""
        return np.concatenate([_shapes(*column) for column in self._groups.read_column("vae_latent_shape")])

    @property
    def held_bytes(self) -> int:
        """Bytes of row groups and footers that this process keeps."""
        return self._groups.held_bytes

    @property
    def first_rows(self) -> Sequence[int]:
        return sorted({*range(min(MAX_FIRST_ROWS, len(self))), *self._groups.file_starts[:MAX_FIRST_FILES]})

    def normalise_latents(
        self, statistics: LatentStatistics, stated: Form | None, stated_by: str = "data.latents"
    ) -> None:
        """Finds out whether the stored latents are raw, and if so normalises those of all rows read from now on.

        Args:
            statistics: those of the run's VAE.
            stated, stated_by: see `find_form`.

        Raises:
            ValueError: as `find_form`, or for a form of data without stored latents.
        """
        first = next(self._stored_latents(), None)
        if first is None:
            if stated is not None:
                raise ValueError(f"{stated_by} = {stated!r} has no effect on data without stored latents; remove it")
            return
        file = self._groups.files[0]
        is_foreign = is_worker_file(file) or counts_latent_frames(file, first.shape[1])
        form = find_form(self._stored_latents(), statistics, stated, stated_by, is_foreign=is_foreign)
        self._statistics = statistics if form == "raw" else None

    def _stored_latents(self) -> Iterator[Tensor]:
        """Yields the latents of the first rows. Ends of trajectories are none: sampling makes normalised ones."""
        for index in range(min(NUM_ROWS, len(self))):
            try:
                group = self._groups.read(self._groups.locate(index).group)
                latent = self.read(index).vae_latent if _has_latent_column(group) else None
            except BadRowError:
                continue
            if latent is not None:
                yield latent

    def read(self, index: int) -> LatentRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a dataset of {len(self)} rows")
        where = self._groups.locate(index)
        group = self._groups.read(where.group)
        record = {name: column[where.row] for name, column in group.columns.items()}
        decoded = {name: column.row(where.row) for name, column in group.tensors.items()}
        if self._copies:
            decoded = {name: tensor.clone() for name, tensor in decoded.items()}
        row = _from_record(record, decoded, self._tensors, where)
        try:
            if row.vae_latent is None and {TRAJECTORY, TIMESTEPS} <= row.extra.keys():
                states, timesteps, end = split_trajectory(row.extra[TRAJECTORY], row.extra[TIMESTEPS])
                row = replace(row, vae_latent=end, extra={**row.extra, TRAJECTORY: states, TIMESTEPS: timesteps})
            elif row.vae_latent is not None and self._statistics is not None:
                row = replace(row, vae_latent=self._statistics.normalise(row.vae_latent))
            for check in self._checks:
                check(row)
        except ValueError as error:
            raise BadRowError(f"{where}: {error}") from error
        return row


def _has_latent_column(group: Group) -> bool:
    return "vae_latent" in group.tensors or "vae_latent_bytes" in group.columns


def _shapes(column: pa.Array | None, num_rows: int) -> Integers:
    """Returns lists of four integers as a matrix, see `ParquetDataset.latent_shapes`."""
    shapes = np.zeros((num_rows, 4), np.int64)
    if column is None or pa.types.is_null(column.type):
        return shapes
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    values = pc.list_flatten(column).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    starts, has_four = np.cumsum(lengths) - lengths, lengths == 4
    shapes[(lengths > 0) & ~has_four] = -1
    shapes[has_four] = values[starts[has_four, None] + np.arange(4)]
    return shapes


def _check_columns(file: Location, schema: pa.Schema, expected: pa.Schema) -> None:
    names = schema.names
    required = REQUIRED_COLUMNS + (LATENT_COLUMNS if set(LATENT_COLUMNS) & set(names) else ())
    required += tuple(expected.names[len(SCHEMA) :])
    missing = [name for name in required if name not in names]
    if missing:
        raise ValueError(f"{file} lacks the columns {', '.join(missing)}: a dataset has {', '.join(required)}")
    for name in expected.names:
        if names.count(name) > 1:
            raise ValueError(f"{file} has the column {name} {names.count(name)} times: a dataset has it once")
    for name, kind in zip(names, schema.types):
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


def _from_record(
    record: Mapping[str, pa.Scalar], decoded: Mapping[str, Tensor], extra_names: Iterable[str], where: Place
) -> LatentRow:
    """Builds a row from its values and its tensors. Those that are not decoded are decoded here."""

    def tensor(name: str, num_dims: int | None) -> Tensor | None:
        return decoded[name] if name in decoded else decode_row(record, name, num_dims, where)

    known: dict[str, Any] = {}
    for name in record:
        if name in _PLAIN_FIELDS and (value := plain(record, name, where)) is not None:
            known[name] = value
    caption = known.get("caption")
    embedding = tensor("text_embedding", 2)
    if embedding is None:
        raise BadRowError(f"{where}: no text embedding for caption {brief(caption or '', 80)!r}")
    known["caption"] = _caption(caption, where)
    if "id" not in known:
        known["id"] = str(where)
    latent = tensor("vae_latent", 4)
    extra: dict[str, Tensor] = {}
    for name in extra_names:
        if (further := tensor(name, None)) is None:
            raise BadRowError(f"{where}: no {name}")
        extra[name] = further
    return LatentRow(text_embedding=embedding, vae_latent=latent, extra=extra, **known)


def _caption(caption: str | None, where: object) -> str:
    if caption is None or not caption.strip():
        raise BadRowError(f"{where}: caption is empty")
    return caption
