"""Mixtures: several sets with weights and buckets of several shapes, in an order that depends on no layout."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from titan_distill.config.sections import DataConfig, DataSource
from titan_distill.data import interleaving
from titan_distill.data.interleaving import Bucket, Interleaving, MixedOrder, Part
from titan_distill.data.loader import SampleLoader, open_dataset
from titan_distill.data.mixed import MixedDataset
from titan_distill.data.order import SampleOrder
from titan_distill.data.parquet import LatentRow, ParquetDataset, write_rows

SHAPES = ((2, 1, 2, 2), (2, 2, 2, 2), (2, 1, 4, 2))


def part(num_rows: int, weight: str = "1", first_row: int = 0) -> Part:
    return Part(SampleOrder(num_rows, f"0, part {first_row}"), None, first_row, Fraction(weight))


@pytest.mark.parametrize("block", [7, 65_536])
def test_labels_are_counted_exactly_per_epoch(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each occurrence once, in its order, whatever the blocks; also where an epoch has none of a label."""
    monkeypatch.setattr(interleaving, "BLOCK", block)
    interleaving._block.cache_clear()
    sizes = (40, 1, Fraction(1, 3), 13)

    def totals(epoch: int) -> tuple[int, ...]:
        return tuple(int(size * epoch) for size in sizes)

    labels = Interleaving(totals, "a key")
    found = [labels.locate(position) for position in range(sum(totals(6)))]
    for label in range(4):
        assert [number for at, number in found if at == label] == list(range(totals(6)[label]))
    for epoch in range(6):
        start, end = sum(totals(epoch)), sum(totals(epoch + 1))
        counts = Counter(label for label, _ in found[start:end])
        assert [counts[label] for label in range(4)] == [b - a for a, b in zip(totals(epoch), totals(epoch + 1))]
    if block == 7:  # a block has its share of each label, up to rounding
        for start in range(0, 49, 7):
            assert abs(sum(label == 0 for label, _ in found[start : start + 7]) - 7 * 40 / 54) <= 1
    assert found != [Interleaving(totals, "another").locate(position) for position in range(len(found))]
    interleaving._block.cache_clear()


def test_far_positions_need_no_count_of_what_came_before() -> None:
    bucket = Bucket((part(10), part(30, "0.5", 10)), "key")
    far = 10**12
    rows = [bucket.row(position) for position in range(far, far + 25)]
    assert rows == [bucket.row(position) for position in range(far, far + 25)] and len(set(rows)) > 10
    epoch = 25  # samples: 10 rows, and half of 30
    start = far // epoch * epoch
    assert sorted(row for row in map(bucket.row, range(start, start + epoch)) if row < 10) == list(range(10))


def test_weights_are_passes_per_epoch() -> None:
    bucket = Bucket((part(10), part(6, "2", 10), part(8, "0.5", 16)), "key")
    epochs = [[bucket.row(position) for position in range(26 * at, 26 * (at + 1))] for at in range(4)]
    for rows in epochs:
        counts = Counter(rows)
        assert all(counts[row] == 1 for row in range(10)) and all(counts[row] == 2 for row in range(10, 16))
        assert sum(counts[row] for row in range(16, 24)) == 4
    both = Counter(epochs[0] + epochs[1])
    assert all(both[row] == 1 for row in range(16, 24))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("batch_size", [4, 6, 50])
def test_left_over_samples_open_the_next_epochs_first_batch(batch_size: int) -> None:
    """Batch k of a bucket has its samples k N to (k + 1) N - 1, whatever the order of the buckets."""
    sizes, starts = (21, 10, 5), (0, 21, 31)
    buckets = tuple(Bucket((part(size, first_row=start),), f"{start}") for size, start in zip(sizes, starts))
    order = MixedOrder(buckets, batch_size, "key")
    num_batches = sum(order.totals(60))
    own: list[list[int]] = [[], [], []]
    labels = []
    for batch in range(num_batches):
        ids = range(batch * batch_size, (batch + 1) * batch_size)
        (bucket,) = {order.bucket(number) for number in ids}
        labels.append(bucket)
        own[bucket] += [order.row(number) for number in ids]
    for size, start, rows, bucket in zip(sizes, starts, own, buckets):
        assert rows == [bucket.row(position) for position in range(len(rows))], "a bucket's samples come out of order"
        assert len(rows) >= 60 * size - batch_size
        for epoch in range(len(rows) // size):
            assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(start, start + size))
    for epoch in range(60):
        before, after = order.totals(epoch), order.totals(epoch + 1)
        counts = Counter(labels[sum(before) : sum(after)])
        assert [counts[label] for label in range(3)] == [b - a for a, b in zip(before, after)]


def make_row(index: int, shape: tuple[int, ...] | None) -> LatentRow:
    latent = None if shape is None else torch.full(shape, float(index))
    return LatentRow(str(index), str(index), torch.full((2, 3), float(index)), latent)


def write_sets(folder: Path) -> tuple[Path, Path]:
    """60 rows of three shapes in two folders, 9 of them without latents."""
    shapes = [SHAPES[(index * 7) % 3] if index % 7 else None for index in range(60)]
    rows = [make_row(index, shape) for index, shape in enumerate(shapes)]
    write_rows(folder / "a" / "1.parquet", rows[:25])
    write_rows(folder / "a" / "2.parquet", rows[25:40])
    write_rows(folder / "b" / "1.parquet", rows[40:])
    return folder / "a", folder / "b"


def opened(folder: Path, *, weight: float = 1.0, max_bad_rows: int = 0) -> MixedDataset:
    sets = [ParquetDataset(path, for_batches=True) for path in (folder / "a", folder / "b")]
    return MixedDataset(sets, (1.0, weight), SHAPES, max_bad_rows)


def run(dataset: MixedDataset, num_steps: int, world_size: int = 1, start: int = 0) -> list[tuple[int, str, int]]:
    """Sample ids, captions and frames, of all ranks."""
    size = 6
    ranks = [
        SampleLoader(
            dataset, global_batch_size=size, data_rank=rank, data_world_size=world_size, seed=3, max_text_tokens=2,
            samples_seen=start * size,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    found = []
    for _ in range(num_steps):
        batches = [next(rank) for rank in ranks]
        (shape,) = {batch.latent_shape for batch in batches}
        assert shape in SHAPES
        for batch in batches:
            found += [(number, text, SHAPES.index(shape)) for number, text in zip(batch.sample_ids, batch.captions)]
    return found


def test_a_global_batch_has_one_shape_on_1_2_and_3_ranks_and_resumed_on_others(tmp_path: Path) -> None:
    write_sets(tmp_path)
    for part_of_mix in (dataset := opened(tmp_path)).sets:
        part_of_mix.drop_latents()
    alone = run(dataset, 40)
    assert [number for number, _, _ in alone] == list(range(240))
    assert run(opened_without(tmp_path), 40, 2) == run(opened_without(tmp_path), 40, 3) == alone
    for step, world_size in ((1, 3), (7, 2), (23, 1)):
        assert run(opened_without(tmp_path), 3, world_size, step) == alone[6 * step : 6 * (step + 3)]
    for index in range(60):
        expected = (index * 7) % 3 if index % 7 else 0
        assert {bucket for _, text, bucket in alone if int(text) == index} <= {expected}
    counts = Counter(text for _, text, _ in alone)
    assert len(counts) == 60 and set(counts.values()) <= {3, 4, 5}


def opened_without(folder: Path) -> MixedDataset:
    dataset = opened(folder)
    for part_of_mix in dataset.sets:
        part_of_mix.drop_latents()
    return dataset


def test_shapes_of_rows_are_those_of_their_latents(tmp_path: Path) -> None:
    for path in write_sets(tmp_path):
        dataset = ParquetDataset(path)
        shapes = dataset.latent_shapes()
        assert shapes.shape == (len(dataset), 4)
        for index in range(len(dataset)):
            latent = dataset[index].vae_latent
            assert shapes[index].tolist() == ([0] * 4 if latent is None else list(latent.shape))


def test_text_only_beside_latents(tmp_path: Path) -> None:
    """A run that needs no latents takes both and reads none; one that needs them names the set without."""
    write_rows(tmp_path / "latents.parquet", (make_row(index, SHAPES[0]) for index in range(8)))
    write_rows(tmp_path / "text.parquet", (make_row(index, None) for index in range(8, 12)))
    sources = tuple(DataSource(path=str(tmp_path / f"{name}.parquet")) for name in ("latents", "text"))
    data = DataConfig(sources=sources, max_text_tokens=2)
    dataset = open_dataset(data, tensors=(), video_size=None, needs_latents=False)
    loader = SampleLoader(
        dataset, global_batch_size=12, data_rank=0, data_world_size=1, seed=0, max_text_tokens=2
    )  # fmt: skip
    batch = next(loader)
    assert batch.latents is None and sorted(map(int, batch.captions)) == list(range(12))
    with pytest.raises(ValueError, match=r"text\.parquet, row 0: holds only text, but this job trains on latents"):
        open_dataset(data, tensors=(), video_size=None, needs_latents=True)


def test_a_bad_row_is_replaced_by_one_of_its_set_and_bucket(tmp_path: Path) -> None:
    write_sets(tmp_path)
    dataset = opened(tmp_path)
    for index in range(60):
        rows = list(dataset.replacements(index))
        assert rows[0] == index and len(set(rows)) == len(rows)
        assert {dataset.shape(row) for row in rows} == {dataset.shape(index)}
        assert all((row < 40) == (index < 40) for row in rows)


def test_other_shapes_are_bad_rows_and_an_empty_bucket_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", (make_row(index, SHAPES[index % 3]) for index in range(9)))
    sets = [ParquetDataset(tmp_path / "a.parquet")]
    with pytest.raises(
        ValueError, match=r"a\.parquet, row 8: latents of \[2, 1, 4, 2\], but the buckets have \[2, 1, 2"
    ):
        MixedDataset(sets, [1.0], SHAPES[:2], max_bad_rows=2)
    tolerant = MixedDataset(sets, [1.0], SHAPES[:2], max_bad_rows=3)
    assert sorted(tolerant.bad_rows) == [2, 5, 8]
    order = tolerant.order(0, 2)
    assert {order.row(number) for number in range(40)} == {0, 1, 3, 4, 6, 7}
    with pytest.raises(ValueError, match=r"no row of .* has latents of \[2, 9, 9, 9\]"):
        MixedDataset(sets, [1.0], (*SHAPES, (2, 9, 9, 9))).check_buckets()


def test_identity_depends_on_sets_weights_and_buckets(tmp_path: Path) -> None:
    write_sets(tmp_path)
    digests = [
        opened(tmp_path).digest,
        opened(tmp_path, weight=2.0).digest,
        MixedDataset(opened(tmp_path).sets[::-1], (1.0, 1.0), SHAPES).digest,
        MixedDataset(opened(tmp_path).sets, (1.0, 1.0), SHAPES[::-1]).digest,
    ]
    assert len(set(digests)) == 4 and opened(tmp_path).digest == digests[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "path is required but missing"),
        ({"path": "a", "sources": ("b", "c")}, "path = 'a' and sources name data; keep one of the two"),
        ({"sources": ("b",)}, "sources has one set, 'b'; set data.path to it"),
        ({"sources": ("b", "b")}, "sources names one set twice"),
        ({"sources": ("b", "c.csv")}, "path = 'c.csv' is no parquet"),
    ],
)
def test_contradictory_sources(keys: dict[str, object], message: str) -> None:
    def build() -> DataConfig:
        sources = tuple(DataSource(path=path) for path in keys.get("sources", ()))
        return DataConfig(path=str(keys.get("path", "")), sources=sources)

    with pytest.raises(ValueError, match=message):
        build()


def test_windows_of_a_part_have_its_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of more rows than are permuted as a whole, whose groups hold rows of all buckets."""
    monkeypatch.setattr("titan_distill.data.order.WHOLE_ROWS", 50)
    monkeypatch.setattr("titan_distill.data.order.WINDOW_BYTES", 20_000)
    monkeypatch.setattr("titan_distill.data.parquet.MAX_GROUP_ROWS", 20)
    write_rows(tmp_path / "a.parquet", (make_row(index, SHAPES[index % 3]) for index in range(600)))
    dataset = MixedDataset([ParquetDataset(tmp_path / "a.parquet")], [1.0], SHAPES)
    order = dataset.order(0, 10)
    rows = [order.row(number) for number in range(600)]
    assert sorted(rows) == list(range(600)), "200 rows a bucket, 10 a batch: an epoch ends with a batch"
    for start in range(0, 600, 10):
        assert len({row % 3 for row in rows[start : start + 10]}) == 1
    assert np.mean([abs(a - b) for a, b in itertools.pairwise(rows[:10])]) > 3
