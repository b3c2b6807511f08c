"""Parquet rows: what is written comes back, and every kind of damage is named."""

from __future__ import annotations

import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from titan_distill.config.dtypes import DTYPES
from titan_distill.data import parquet
from titan_distill.data.parquet import BadRowError, LatentRow, ParquetDataset, write_rows
from titan_distill.data.summary import inspect


def make_row(index: int, dtype: torch.dtype = torch.float32, **facts: Any) -> LatentRow:
    generator = torch.Generator().manual_seed(index)
    values = {
        "id": f"row-{index}",
        "caption": f"caption {index}",
        "text_embedding": torch.randn(3 + index % 4, 8, generator=generator).to(dtype),
        "vae_latent": torch.randn(4, 2, 3, 5, generator=generator).to(dtype),
        "file_name": f"{index}.mp4",
        "width": 40,
        "height": 24,
        "num_frames": 5,
        "duration_sec": 0.625,
        "fps": 8.0,
    }
    return LatentRow(**{**values, **facts})


def assert_same(row: LatentRow, expected: LatentRow) -> None:
    for name in LatentRow.__dataclass_fields__:
        value, wanted = getattr(row, name), getattr(expected, name)
        if isinstance(wanted, torch.Tensor):
            assert value.dtype == wanted.dtype
            assert torch.equal(value, wanted), name
        else:
            assert value == wanted, name


def write_records(path: Path, records: list[dict[str, Any]], schema: pa.Schema = parquet.SCHEMA) -> None:
    pq.write_table(pa.Table.from_pylist(records, schema), path, row_group_size=4)


def records_of(path: Path) -> list[dict[str, Any]]:
    return pq.ParquetFile(path).read().to_pylist()


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_rows_come_back_bitwise_in_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = [make_row(index, dtype) for index in range(5)]
    assert write_rows(tmp_path / "a.parquet", iter(rows)) == 5
    dataset = ParquetDataset(tmp_path / "a.parquet")
    assert len(dataset) == 5
    for index, row in enumerate(rows):
        assert_same(dataset[index], row)


def test_column_scheme_is_fastvideos(tmp_path: Path) -> None:
    """A literal of the scheme: a row in it, written by plain pyarrow and numpy-style bytes, is read."""
    record = {
        "id": "v",
        "vae_latent_bytes": b"\x00\x3c" * 2,  # float16 ones
        "vae_latent_shape": [1, 1, 1, 2],
        "vae_latent_dtype": "float16",
        "text_embedding_bytes": b"\x80\x3f",  # a bfloat16 one: the upper half of float32's
        "text_embedding_shape": [1, 1],
        "text_embedding_dtype": "bfloat16",
        "file_name": "v.mp4",
        "caption": "c",
        "media_type": "video",
        "width": 16,
        "height": 8,
        "num_frames": 1,
        "duration_sec": 0.5,
        "fps": 2.0,
    }
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    row = ParquetDataset(tmp_path)[0]
    assert row.vae_latent is not None
    assert row.vae_latent.tolist() == [[[[1.0, 1.0]]]]
    assert row.text_embedding.tolist() == [[1.0]]
    assert (row.width, row.height, row.num_frames, row.duration_sec, row.fps) == (16, 8, 1, 0.5, 2.0)

    write_rows(tmp_path / "b.parquet", [row])
    assert records_of(tmp_path / "b.parquet") == [record]


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.parquet", [make_row(index) for index in range(40, 50)])
    write_rows(tmp_path / "a.parquet", [make_row(index) for index in range(40)])
    dataset = ParquetDataset(tmp_path)
    assert [dataset[index].id for index in range(50)] == [f"row-{index}" for index in range(50)]
    with pytest.raises(IndexError):
        dataset.read(50)


def test_row_groups_have_about_a_mebibyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def group_sizes() -> list[int]:
        metadata = pq.ParquetFile(tmp_path / "a.parquet").metadata
        return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]

    write_rows(tmp_path / "a.parquet", (make_row(index) for index in range(70)))
    assert group_sizes() == [70]
    large = [make_row(index, vae_latent=torch.zeros(1, 1, 400, 1000)) for index in range(4)]  # 1.6 MB each
    write_rows(tmp_path / "a.parquet", large)
    assert group_sizes() == [1, 1, 1, 1]
    monkeypatch.setattr(parquet, "MAX_GROUP_ROWS", 32)
    write_rows(tmp_path / "a.parquet", (make_row(index) for index in range(70)))
    assert group_sizes() == [32, 32, 6]
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 1500)  # three rows of 480 bytes of latent and 96 to 192 of text
    write_rows(tmp_path / "a.parquet", (make_row(index) for index in range(7)))
    assert group_sizes() == [3, 3, 1]


def test_a_row_may_be_changed(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", (make_row(index) for index in range(3)))
    dataset = ParquetDataset(tmp_path)
    for tensor in (dataset[1].text_embedding, dataset[1].vae_latent):
        tensor.zero_()
    assert_same(dataset[1], make_row(1))
    row = ParquetDataset(tmp_path, for_batches=True)[1]
    assert_same(row, LatentRow("row-1", "caption 1", make_row(1).text_embedding, make_row(1).vae_latent))


def test_values_that_do_not_repeat_have_no_dictionary(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", (make_row(index) for index in range(70)))
    group = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    plain = {column.path_in_schema for column in columns if not column.has_dictionary_page}
    assert plain == {"id", "vae_latent_bytes", "text_embedding_bytes"}


def test_cache_is_bounded_and_not_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_GROUP_ROWS", 32)
    write_rows(tmp_path / "a.parquet", (make_row(index) for index in range(128)))
    everything, one_group = ParquetDataset(tmp_path), ParquetDataset(tmp_path, cache_bytes=1)
    for index in (0, 100, 40, 70, 1):
        assert_same(one_group[index], make_row(index))
        assert_same(everything[index], make_row(index))
    assert len(everything._groups._groups._values) == 4
    assert len(one_group._groups._groups._values) == 1
    assert everything.held_bytes > one_group.held_bytes > 0
    copy = pickle.loads(pickle.dumps(everything))
    assert copy.held_bytes == 0
    assert_same(copy[100], make_row(100))


def test_rows_are_consumed_lazily(tmp_path: Path) -> None:
    """A failing source leaves neither the file nor a temporary, and an earlier file stays whole."""
    write_rows(tmp_path / "a.parquet", [make_row(0)])

    def failing_source() -> Any:
        yield from (make_row(index) for index in range(40))
        assert any("tmp" in path.name for path in tmp_path.iterdir()), "the first group is on disk by now"
        raise RuntimeError("camera broke")

    with pytest.raises(RuntimeError, match="camera broke"):
        write_rows(tmp_path / "a.parquet", failing_source())
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    assert_same(ParquetDataset(tmp_path)[0], make_row(0))


def test_text_only_rows(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    write_rows(tmp_path / "ours" / "a.parquet", [make_row(0, vae_latent=None)])
    assert ParquetDataset(tmp_path / "ours")[0].vae_latent is None

    columns = ["caption", "text_embedding_bytes", "text_embedding_shape", "text_embedding_dtype"]
    record = {name: records_of(tmp_path / "ours" / "a.parquet")[0][name] for name in columns}
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "b.parquet")
    row = ParquetDataset(tmp_path / "b.parquet")[0]
    assert row.vae_latent is None
    assert row.caption == "caption 0"
    assert torch.equal(row.text_embedding, make_row(0).text_embedding)


def test_writer_refuses_what_the_reader_would(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    with pytest.raises(ValueError, match="'row-0': vae_latent has non-finite values"):
        write_rows(file, [make_row(0, vae_latent=torch.full((1, 1, 1, 1), torch.inf))])
    with pytest.raises(ValueError, match=r"text_embedding has dtype torch.float64: use one of float32"):
        write_rows(file, [make_row(0, dtype=torch.float64, vae_latent=None)])
    with pytest.raises(ValueError, match="'row-0': caption is empty"):
        write_rows(file, [make_row(0, caption=" ")])
    with pytest.raises(ValueError, match="no rows to write"):
        write_rows(file, [])
    assert not list(tmp_path.iterdir())


FAULTS = {
    "dtype": ({"vae_latent_dtype": "float64"}, "vae_latent_dtype is 'float64'"),
    "shape and bytes": ({"vae_latent_shape": [4, 2, 3, 6]}, r"holds 480 bytes: \[4, 2, 3, 6\] in float32 takes 576"),
    "dimensions": ({"text_embedding_shape": [24]}, r"text_embedding_shape is \[24\]: expected 2 positive sizes"),
    "negative size": ({"vae_latent_shape": [-4, -2, 3, 5]}, "expected 4 positive sizes"),
    "no shape": ({"vae_latent_shape": None}, "expected 4 positive sizes"),
    "a size that is missing": ({"vae_latent_shape": [4, None, 3, 5]}, r"is \[4, None, 3, 5\]: expected 4 positive"),
    "bytes that are missing": ({"vae_latent_bytes": None}, r"vae_latent_bytes holds 0 bytes: \[4, 2, 3, 5\]"),
    "not finite": ({"vae_latent_bytes": b"\x00\x00\xc0\x7f" * 120}, "vae_latent has non-finite values"),
    "no embedding": (
        {"text_embedding_bytes": b"", "text_embedding_shape": []},
        "no text embedding for caption 'caption 0'",
    ),
    "empty prompt": ({"caption": " \n"}, "caption is empty"),
    "no prompt": ({"caption": None}, "caption is empty"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_bad_row_is_named_with_file_and_row(tmp_path: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    write_rows(tmp_path / "a.parquet", [make_row(0)] * 3)
    write_rows(tmp_path / "good.parquet", [make_row(0)] * 7)
    records = records_of(tmp_path / "good.parquet")
    records[5].update(damage)
    write_records(tmp_path / "b.parquet", records)
    dataset = ParquetDataset(tmp_path)
    assert_same(dataset[3 + 4], make_row(0))
    with pytest.raises(BadRowError, match=rf"b\.parquet, row 5: .*{message}"):
        dataset[3 + 5]


def bad_dataset(folder: Path, bad: set[int], **options: Any) -> ParquetDataset:
    write_rows(folder / "a.parquet", [make_row(index) for index in range(10)])
    records = records_of(folder / "a.parquet")
    for index in bad:
        records[index]["vae_latent_dtype"] = "int8"
    write_records(folder / "a.parquet", records)
    return ParquetDataset(folder, **options)


def test_bad_rows_are_replaced_by_the_next_good_one_up_to_the_cap(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = bad_dataset(tmp_path, {3, 4, 9}, max_bad_rows=3)
    assert dataset[3].id == dataset[4].id == "row-5"
    assert dataset[9].id == "row-0"
    assert dataset[3].id == "row-5", "met again, a bad row is not counted again"
    assert sorted(dataset.bad_rows) == [3, 4, 9]
    assert caplog.text.count("a.parquet, row 9: vae_latent_dtype") == 1

    strict = ParquetDataset(tmp_path, max_bad_rows=2)
    assert strict[3].id == "row-5"
    with pytest.raises(BadRowError, match="row 9"):
        strict[9]


def test_a_dataset_of_bad_rows_ends(tmp_path: Path) -> None:
    dataset = bad_dataset(tmp_path, set(range(10)), max_bad_rows=100)
    with pytest.raises(BadRowError, match=r"all 10 rows of .* are bad"):
        dataset[7]


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_truncated_file_is_named_in_one_sentence(tmp_path: Path, kept: float) -> None:
    write_rows(tmp_path / "a.parquet", [make_row(index) for index in range(10)])
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=r"a\.parquet is not a complete parquet file .*: copy it again") as error:
        ParquetDataset(tmp_path)
    assert "\n" not in str(error.value)


def test_flipped_bytes_in_a_row_group_are_bad_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_GROUP_ROWS", 32)
    write_rows(tmp_path / "a.parquet", [make_row(index) for index in range(40)])
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    column = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (tmp_path / "a.parquet").write_bytes(data)
    dataset = ParquetDataset(tmp_path)
    assert_same(dataset[31], make_row(31))
    with pytest.raises(BadRowError, match=r"a\.parquet, rows 32 to 39: unreadable"):
        dataset[32]


def test_a_changed_byte_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    """Our own files carry checksums: no flipped bit of a page is taken for data."""
    row = make_row(0, vae_latent=torch.randint(0, 255, (4, 2, 3, 5)).float())
    write_rows(tmp_path / "a.parquet", [row])
    data = (tmp_path / "a.parquet").read_bytes()
    column = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    for at in range(start, start + column.total_compressed_size, 37):
        (tmp_path / "a.parquet").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        try:
            assert_same(ParquetDataset(tmp_path)[0], row)  # a byte that nothing reads, such as a statistic
        except BadRowError as error:
            assert "a.parquet, row" in str(error) and "\n" not in str(error)


WRONG_TYPES = {
    "caption": pa.binary(),
    "id": pa.int64(),
    "text_embedding_bytes": pa.list_(pa.uint8()),
    "text_embedding_shape": pa.list_(pa.float64()),
    "vae_latent_shape": pa.string(),
    "vae_latent_dtype": pa.list_(pa.string()),
    "width": pa.float64(),
}


@pytest.mark.parametrize("name", list(WRONG_TYPES))
def test_column_of_another_type_is_named(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / "a.parquet", [make_row(0)])
    table = pq.ParquetFile(tmp_path / "a.parquet").read()
    empty = pa.nulls(1, WRONG_TYPES[name])
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, empty), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a\.parquet has the column {name} as .*: a dataset has it as"):
        ParquetDataset(tmp_path)


def test_other_spellings_of_the_types_are_read(tmp_path: Path) -> None:
    """As pandas, polars and DuckDB write them."""
    write_rows(tmp_path / "a.parquet", [make_row(0)])
    others = {
        "caption": pa.dictionary(pa.int32(), pa.string()),
        "id": pa.large_string(),
        "text_embedding_bytes": pa.large_binary(),
        "vae_latent_shape": pa.large_list(pa.int32()),
        "fps": pa.float32(),
    }
    table = pq.ParquetFile(tmp_path / "a.parquet").read()
    for name, kind in others.items():
        index = table.schema.get_field_index(name)
        column = table.column(name)
        changed = column.dictionary_encode() if name == "caption" else column.cast(kind)
        table = table.set_column(index, name, changed)
    pq.write_table(table, tmp_path / "a.parquet")
    assert_same(ParquetDataset(tmp_path)[0], make_row(0))


@pytest.mark.nightly
def test_a_row_group_of_more_than_two_gibibytes_is_read(tmp_path: Path) -> None:
    """Arrow's reader gives such a column in several chunks, which don't fit into one array."""
    row, size = make_row(0), 3 * 2**28
    write_rows(tmp_path / "a.parquet", [row] * 3)
    table = pq.ParquetFile(tmp_path / "a.parquet").read()
    values = pa.array([b"\0" * size], pa.binary())
    large = {
        "vae_latent_bytes": pa.chunked_array([values] * 3),
        "vae_latent_shape": pa.chunked_array([[[1, 1, 1, size // 4]] * 3], pa.list_(pa.int64())),
    }
    for name, column in large.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3, use_dictionary=False, write_statistics=False)
    dataset = ParquetDataset(tmp_path, for_batches=True)
    for index in (0, 2):
        found = dataset[index]
        assert found.vae_latent is not None and list(found.vae_latent.shape) == [1, 1, 1, size // 4]
        assert torch.equal(found.text_embedding, row.text_embedding)


def test_text_that_is_no_utf8_is_one_bad_row(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", [make_row(index) for index in range(3)])
    table = pq.ParquetFile(tmp_path / "a.parquet").read()
    bad = pa.array([b"caption 0", b"caf\xe9", b"caption 2"]).view(pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index("caption"), "caption", bad), tmp_path / "a.parquet")
    dataset = ParquetDataset(tmp_path)
    assert_same(dataset[2], make_row(2))
    with pytest.raises(BadRowError, match=r"a\.parquet, row 1: caption is not valid UTF-8"):
        dataset[1]


def test_footer_that_miscounts_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", [make_row(index) for index in range(40)])
    data = (tmp_path / "a.parquet").read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    total = data.index(b"\x16\x50", footer)  # thrift's zigzag of 40, the file's number of rows
    (tmp_path / "a.parquet").write_bytes(data[:total] + b"\x16\x52" + data[total + 2 :])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged: its row groups do not add up to 41 rows"):
        ParquetDataset(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no dataset at .*absent"):
        ParquetDataset(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no \*\.parquet file in"):
        ParquetDataset(tmp_path)
    write_records(tmp_path / "a.parquet", [])
    with pytest.raises(ValueError, match="holds no rows"):
        ParquetDataset(tmp_path)


@pytest.mark.parametrize("absent", ["caption", "text_embedding_shape", "vae_latent_dtype"])
def test_missing_column_is_named(tmp_path: Path, absent: str) -> None:
    write_rows(tmp_path / "a.parquet", [make_row(0)])
    pq.write_table(pq.ParquetFile(tmp_path / "a.parquet").read().drop_columns([absent]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a\.parquet lacks the columns {absent}: a dataset has caption, "):
        ParquetDataset(tmp_path)


def test_summary_counts_everything_and_lists_bad_rows(tmp_path: Path) -> None:
    bad_dataset(tmp_path, {3})
    latents = torch.stack([make_row(index).vae_latent for index in range(10) if index != 3]).double()
    summary = inspect(tmp_path)
    assert (summary.num_files, summary.num_rows) == (1, 10)
    assert summary.latents == {"[4, 2, 3, 5] float32": 9}
    assert (min(summary.text_tokens), max(summary.text_tokens)) == (3, 6)
    assert summary.latent_mean == pytest.approx(latents.mean().item(), abs=1e-12)
    assert summary.latent_std == pytest.approx(latents.std(correction=0).item(), rel=1e-9)
    assert [fault for fault in summary.bad_rows if "a.parquet, row 3" in fault] == summary.bad_rows != []
    for line in ("10 rows in 1 file(s), 1 bad", "[4, 2, 3, 5] float32: 9 rows", "9 distinct captions", "row 3"):
        assert line in str(summary)


# --- further tensors


def row_with_extra(index: int, dtype: torch.dtype = torch.float16) -> LatentRow:
    generator = torch.Generator().manual_seed(100 + index)
    states = torch.randn(3, 4, 2, 3, 5, generator=generator).to(dtype)
    return make_row(index, extra={"trajectory": states, "timesteps": torch.tensor([1000.0, 833.3333, 0.0])})


def test_further_tensors_come_back_when_they_are_asked_for(tmp_path: Path) -> None:
    rows = [row_with_extra(index) for index in range(3)]
    write_rows(tmp_path / "a.parquet", rows)
    dataset = ParquetDataset(tmp_path, tensors=("trajectory", "timesteps"))
    for index, row in enumerate(rows):
        found = dataset[index].extra
        assert list(found) == ["trajectory", "timesteps"]
        for name, tensor in row.extra.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert list(ParquetDataset(tmp_path, tensors=("timesteps",))[1].extra) == ["timesteps"]
    unasked = ParquetDataset(tmp_path)
    assert_same(unasked[1], make_row(1))
    (group,) = (group for group, _ in unasked._groups._groups._values.values())
    assert group.tensors.keys() == {"text_embedding", "vae_latent"}
    assert not any("trajectory" in name for name in group.columns)
    assert parquet.read_ids(tmp_path) == ["row-0", "row-1", "row-2"]


def test_old_files_have_no_further_tensors(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", [make_row(0)])
    assert records_of(tmp_path / "a.parquet")[0].keys() == set(parquet.SCHEMA.names)
    with pytest.raises(ValueError, match=r"a\.parquet lacks the columns trajectory_bytes, trajectory_shape, traj"):
        ParquetDataset(tmp_path, tensors=("trajectory",))


def test_rows_of_a_file_have_the_same_further_tensors(tmp_path: Path) -> None:
    for rows in ([row_with_extra(0), make_row(1)], [make_row(0), row_with_extra(1)]):
        with pytest.raises(ValueError, match=r"row 'row-1' has the tensors .*: use the same in all"):
            write_rows(tmp_path / "a.parquet", rows)
    broken = dataclasses.replace(row_with_extra(0), extra={"trajectory": torch.tensor([torch.nan])})
    with pytest.raises(ValueError, match="trajectory has non-finite values"):
        write_rows(tmp_path / "a.parquet", [broken])
    assert not list(tmp_path.iterdir())


EXTRA_FAULTS = {
    "dtype": ({"trajectory_dtype": "float64"}, "trajectory_dtype is 'float64'"),
    "shape and bytes": ({"trajectory_shape": [3, 4, 2, 3, 6]}, "trajectory_bytes holds 720 bytes: .* takes 864"),
    "negative size": ({"trajectory_shape": [-3, -4, 2, 3, 5]}, "expected positive sizes"),
    "no shape": ({"trajectory_shape": None}, "expected positive sizes"),
    "not finite": ({"trajectory_bytes": b"\x00\x7e" * 360}, "trajectory has non-finite values"),
    "absent": ({"trajectory_bytes": None, "trajectory_shape": None}, "no trajectory"),
}


@pytest.mark.parametrize("fault", list(EXTRA_FAULTS))
def test_bad_further_tensor_is_named_with_file_and_row(tmp_path: Path, fault: str) -> None:
    damage, message = EXTRA_FAULTS[fault]
    write_rows(tmp_path / "a.parquet", [row_with_extra(index) for index in range(6)])
    records = records_of(tmp_path / "a.parquet")
    records[5].update(damage)
    write_records(tmp_path / "a.parquet", records, parquet.schema_with(["trajectory", "timesteps"]))
    dataset = ParquetDataset(tmp_path, tensors=("trajectory",))
    assert torch.equal(dataset[4].extra["trajectory"], row_with_extra(4).extra["trajectory"])
    with pytest.raises(BadRowError, match=rf"a\.parquet, row 5: .*{message}"):
        dataset[5]
    summary = inspect(tmp_path)
    assert summary.extra == {"trajectory [3, 4, 2, 3, 5] float16": 5, "timesteps [3] float32": 5}
    assert len(summary.bad_rows) == 1 and re.search(message, summary.bad_rows[0])
    assert "trajectory [3, 4, 2, 3, 5] float16: 5 rows" in str(summary)


def test_first_rows_that_are_all_bad_are_no_data_of_this_run(tmp_path: Path) -> None:
    """However many are tolerated: training would end at the first bad row beyond them."""
    with pytest.raises(BadRowError, match=r"a\.parquet, row 0: vae_latent_dtype"):
        bad_dataset(tmp_path, set(range(10)), max_bad_rows=100).check_first_rows()
    most = bad_dataset(tmp_path, {0, 1, 2}, max_bad_rows=3)
    most.check_first_rows()
    assert sorted(most.bad_rows) == [0, 1, 2]
