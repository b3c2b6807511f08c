"""Broken parquet files, and what may become of them: whole batches, or one sentence that names the file."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from config_mutations import bounded

from titan_distill.data.loader import Batch, SampleLoader
from titan_distill.data.parquet import SCHEMA, LatentRow, ParquetDataset, write_rows

NUM_ROWS = 12
ROWS_PER_GROUP = 4
MAX_TEXT_TOKENS = 8
LATENT_SHAPE = (4, 2, 3, 5)
TEXT_WIDTH = 8

Record = dict[str, Any]


def good_records(folder: Path) -> list[Record]:
    """Rows as the writer stores them."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        LatentRow(
            id=f"row-{index}",
            caption=f"caption {index}",
            text_embedding=torch.randn(3 + index % 4, TEXT_WIDTH, generator=generator),
            vae_latent=torch.randn(*LATENT_SHAPE, generator=generator),
            file_name=f"{index}.mp4",
        )
        for index in range(NUM_ROWS)
    ]
    write_rows(folder / "whole.parquet", rows)
    records: list[Record] = pq.ParquetFile(folder / "whole.parquet").read().to_pylist()
    (folder / "whole.parquet").unlink()
    return records


def floats(*values: float) -> bytes:
    return torch.tensor(values, dtype=torch.float32).numpy().tobytes()


VALUES: dict[str, list[Any]] = {
    "caption": ["", " \n", None, "x" * 100_000, "größe ☃ 𝄞", "a\nb\x00"],
    "id": ["", None, "a\nb", "\x1b[31m"],
    "fps": [math.nan, math.inf, -1.0, None],
    "width": [-1, 2**62, None],
    **{f"{name}_dtype": ["", None, "float64", "FLOAT32", "int8", "a\nb"] for name in ("vae_latent", "text_embedding")},
    "vae_latent_shape": [
        None,
        [],
        [4],
        [4, 2, 3, 6],
        [-4, -2, 3, 5],
        [0, 2, 3, 5],
        [2**62, 2**62, 2, 2],
        [4, None, 3, 5],
    ],
    "text_embedding_shape": [None, [], [24], [-3, -8], [2**40, 8], [None, 8], [3, 0], [1] * 1000],
    "vae_latent_bytes": [
        None,
        b"",
        b"\0",
        floats(*[math.nan] * 120),
        floats(*[math.inf] * 120),
        bytes(479),
        bytes(10**6),
    ],
    "text_embedding_bytes": [None, b"", b"\0", floats(*[math.nan] * 24), floats(*[-math.inf] * 24), bytes(95)],
}
"""Values that a faulty writer may put into one cell."""

TYPES: dict[str, list[tuple[pa.DataType, Callable[[Any], Any]]]] = {
    "caption": [
        (pa.int64(), len),
        (pa.binary(), lambda text: text.encode() + b"\xff"),
        (pa.list_(pa.string()), lambda text: [text]),
        (pa.large_string(), str),
        (pa.dictionary(pa.int32(), pa.string()), str),
    ],
    "id": [(pa.int64(), len), (pa.struct([("a", pa.string())]), lambda text: {"a": text})],
    "width": [(pa.string(), str), (pa.float64(), float)],
    **{
        f"{name}_shape": [
            (pa.string(), str),
            (pa.int64(), len),
            (pa.list_(pa.float64()), list),
            (pa.list_(pa.string()), lambda shape: [str(size) for size in shape]),
            (pa.list_(pa.list_(pa.int64())), lambda shape: [shape]),
        ]
        for name in ("vae_latent", "text_embedding")
    },
    **{
        f"{name}_bytes": [
            (pa.list_(pa.uint8()), list),
            (pa.int64(), len),
            (pa.string(), lambda data: "x" * len(data)),
            (pa.large_binary(), bytes),
        ]
        for name in ("vae_latent", "text_embedding")
    },
    **{
        f"{name}_dtype": [(pa.int64(), len), (pa.list_(pa.string()), list)] for name in ("vae_latent", "text_embedding")
    },
}
"""Columns of another type, with how a writer would have made them."""


def mutate(folder: Path, records: list[Record], draw: random.Random) -> str:
    """Writes a broken dataset into `folder` and says what is wrong with it."""
    kind = draw.choice(["cells", "cells", "column", "type", "bytes", "bytes", "bytes", "footer", "not parquet"])
    records = [dict(record) for record in records]
    schema = SCHEMA
    told = kind
    if kind == "cells":
        for _ in range(draw.choice([1, 1, 2, 5])):
            name = draw.choice(sorted(VALUES))
            row, value = draw.randrange(NUM_ROWS), draw.choice(VALUES[name])
            records[row][name] = value
            told += f", {name} of row {row} is {repr(value)[:40]}"
    if kind == "column":
        name = draw.choice(schema.names)
        told += f" {name} dropped"
        schema = schema.remove(schema.get_field_index(name))
    if kind == "type":
        name = draw.choice(sorted(TYPES))
        field, change = draw.choice(TYPES[name])
        told += f", {name} is {field}"
        schema = schema.set(schema.get_field_index(name), pa.field(name, field))
        for record in records:
            record[name] = change(record[name])
    rows = [{name: record[name] for name in schema.names} for record in records]
    file = folder / f"{draw.choice('ac')}.parquet"
    sizes = draw.choice([1, ROWS_PER_GROUP, NUM_ROWS])
    compression = draw.choice(["zstd", "none", "snappy"])
    pq.write_table(pa.Table.from_pylist(rows, schema), file, row_group_size=sizes, compression=compression)
    if kind in ("bytes", "footer"):
        file.write_bytes(_damaged(file.read_bytes(), kind == "footer", draw))
    if kind == "not parquet":
        file.write_bytes(draw.choice([b"", b"PAR1", b"PAR1PAR1", b"caption\nx\n", b"\0" * 5000, b"PAR1" * 3000]))
    if draw.random() < 0.3:
        pq.write_table(pa.Table.from_pylist(_good_rows(len(records)), SCHEMA), folder / "b.parquet", row_group_size=4)
        told += ", beside a good file"
    return told


def _good_rows(count: int) -> list[Record]:
    """A second file's worth of unbroken rows."""
    shape, width = LATENT_SHAPE, TEXT_WIDTH
    return [
        {
            "id": f"good-{index}",
            "caption": "good",
            "text_embedding_bytes": bytes(4 * width),
            "text_embedding_shape": [1, width],
            "text_embedding_dtype": "float32",
            "vae_latent_bytes": bytes(4 * math.prod(shape)),
            "vae_latent_shape": list(shape),
            "vae_latent_dtype": "float32",
        }
        for index in range(count)
    ]


def _damaged(data: bytes, in_footer: bool, draw: random.Random) -> bytes:
    """Bytes flipped, zeroed, cut off, repeated or inserted, anywhere or in the footer, which says where all lies."""
    length = int.from_bytes(data[-8:-4], "little") + 8
    first = len(data) - length if in_footer else 0
    at = draw.randrange(first, len(data))
    damaged = bytearray(data)
    how = draw.choice(["flip", "flip", "flip", "zero", "cut", "insert", "repeat"])
    if how == "flip":
        for _ in range(draw.choice([1, 1, 4, 64])):
            damaged[draw.randrange(first, len(data))] ^= 1 << draw.randrange(8)
    elif how == "zero":
        stop = min(len(data), at + draw.choice([1, 16, 4096]))
        damaged[at:stop] = bytes(stop - at)
    elif how == "cut":
        del damaged[at:]
    elif how == "insert":
        damaged[at:at] = draw.randbytes(draw.choice([1, 7, 100]))
    else:
        damaged[at:at] = damaged[max(0, at - 100) : at]
    return bytes(damaged)


def read_some(path: Path, *, max_bad_rows: int, num_workers: int, num_batches: int = 8) -> list[Batch] | str:
    """Batches as training would get them, or the sentence that ends it. Fails on anything else."""
    with bounded():
        try:
            dataset = ParquetDataset(path, max_bad_rows=max_bad_rows)
        except ValueError as error:
            assert_names(str(error), path)
            return str(error)
        batches = SampleLoader(
            dataset,
            global_batch_size=4,
            data_rank=0,
            data_world_size=1,
            seed=0,
            max_text_tokens=MAX_TEXT_TOKENS,
            num_workers=num_workers,
        )
        try:
            taken = list(itertools.islice(batches, num_batches))
        except RuntimeError as error:
            assert type(error) is RuntimeError
            assert_names(str(error), path)
            return str(error)
    assert len(dataset.bad_rows) <= max_bad_rows
    for batch in taken:
        assert batch.text_embeddings.isfinite().all()
        assert batch.latents is None or batch.latents.isfinite().all()
        assert all(caption.strip() for caption in batch.captions)
    return taken


def assert_names(message: str, folder: Path) -> None:
    """One printable line with a file, or, where it is about the whole, the folder; faults of cells with the row."""
    assert message.isprintable(), repr(message)
    assert len(message) < 2500, message
    assert str(folder) in message
    if "unreadable" not in message and re.search(r"_(shape|dtype|bytes)\b|caption|finite", message):
        assert re.search(r"\.parquet, row \d+|lacks the columns|column", message), message
