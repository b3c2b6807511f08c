"""The order of samples: every row once per epoch, a function of seed and data only, read with bounded memory."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from titan_distill.data import order, row_groups
from titan_distill.data.loader import SampleLoader
from titan_distill.data.order import WHOLE_ROWS, WINDOW_BYTES, GroupSizes, SampleOrder
from titan_distill.data.parquet import LatentRow, ParquetDataset, write_rows
from titan_distill.data.row_groups import RowGroups
from titan_distill.diffusion.noise import keyed_generator

NUM_ROWS = 20_000
BATCH_SIZE = 60


def sizes(num_rows: list[int], row_bytes: int = 1000) -> GroupSizes:
    rows = np.array(num_rows, np.int64)
    return GroupSizes(rows, rows * row_bytes)


def epoch_of(samples: SampleOrder, epoch: int = 0) -> list[int]:
    start = epoch * samples.num_rows
    return [samples.row(start + position) for position in range(samples.num_rows)]


@pytest.mark.parametrize("num_rows", [1, 10, 5000, WHOLE_ROWS])
def test_up_to_65536_rows_keep_the_permutation_of_version_1(num_rows: int) -> None:
    """Golden curves and runs of earlier releases depend on it."""
    groups = sizes([1000] * (num_rows // 1000) + [num_rows % 1000] * (num_rows % 1000 > 0))
    for epoch in (0, 3):
        expected = torch.randperm(num_rows, generator=keyed_generator(f"epoch permutation 7 {epoch}"))
        for samples in (
            SampleOrder(num_rows, 7, groups),
            SampleOrder(num_rows, 7),
            SampleOrder(num_rows, 7, groups, 1),
        ):
            positions = [0, num_rows // 2, num_rows - 1]
            assert [samples.row(epoch * num_rows + at) for at in positions] == expected[positions].tolist()


def test_version_1_and_rows_that_are_read_alone_are_permuted_as_a_whole() -> None:
    num_rows = 3 * WHOLE_ROWS
    expected = torch.randperm(num_rows, generator=keyed_generator("epoch permutation 0 0"))[:50].tolist()
    groups = sizes([1024] * 192)
    for samples in (SampleOrder(num_rows, 0, groups, version=1), SampleOrder(num_rows, 0, None)):
        assert [samples.row(position) for position in range(50)] == expected
    with pytest.raises(ValueError, match="version 3, but this titan_distill knows 1 to 2"):
        SampleOrder(num_rows, 0, groups, version=3)


@pytest.mark.parametrize("row_bytes", [3000, 200_000])
def test_each_row_once_per_epoch_and_each_group_in_one_window(row_bytes: int) -> None:
    num_rows = [1000 + 37 * (index % 11) for index in range(100)]
    groups, total = sizes(num_rows, row_bytes), sum(num_rows)
    samples = SampleOrder(total, 5, groups)
    first, second = epoch_of(samples, 0), epoch_of(samples, 1)
    assert sorted(first) == sorted(second) == list(range(total))
    assert first != second and first != epoch_of(SampleOrder(total, 6, groups))
    assert [SampleOrder(total, 5, groups).row(at) for at in (total - 1, 7, total // 2)] == [
        first[at] for at in (total - 1, 7, total // 2)
    ]

    group_of_row = np.repeat(np.arange(100), num_rows)
    positions = np.empty(total, np.int64)
    positions[first] = np.arange(total)
    largest = max(1408, WINDOW_BYTES // max(row_bytes, 2048) + 1408)
    spans = [np.ptp(positions[group_of_row == group]) for group in range(100)]
    assert max(spans) < largest, "a group's rows are farther apart than a window and a group"
    starts = [first[at] for at in range(0, total, total // 20)]
    assert np.corrcoef(starts, np.arange(len(starts)))[0, 1] < 0.8, "windows come in the order of the files"


def test_a_group_per_row_is_shuffled_over_the_whole_set() -> None:
    """Rows of 1 MiB or more, as `write_rows` stores them."""
    total = WHOLE_ROWS + 1000
    samples = SampleOrder(total, 0, sizes([1] * total, 2**20))
    rows = epoch_of(samples)
    assert sorted(rows) == list(range(total))
    correlation = np.corrcoef(rows, np.arange(total))[0, 1]
    assert abs(correlation) < 0.02  # 5 standard deviations
    assert np.abs(np.diff(rows)).mean() == pytest.approx(total / 3, rel=0.02)


def make_row(index: int) -> LatentRow:
    text, latent = torch.full((1 + index % 3, 4), index, dtype=torch.float32), torch.full((4, 1, 2, 2), float(index))
    return LatentRow(str(index), str(index), text, latent)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 rows in 5 files of 40 row groups."""
    folder = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_distill.data.parquet.MAX_GROUP_ROWS", 100)
        for start in range(0, NUM_ROWS, 4000):
            write_rows(folder / f"{start:05d}.parquet", map(make_row, range(start, start + 4000)))
    return folder


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes 20,000 rows a large set: windows have about 1000 rows."""
    monkeypatch.setattr(order, "WHOLE_ROWS", 1000)
    monkeypatch.setattr(order, "WINDOW_BYTES", 1000 * 1000)


def loader(dataset: ParquetDataset, rank: int = 0, world_size: int = 1, samples_seen: int = 0) -> SampleLoader:
    return SampleLoader(
        dataset,
        global_batch_size=BATCH_SIZE,
        data_rank=rank,
        data_world_size=world_size,
        seed=3,
        max_text_tokens=3,
        samples_seen=samples_seen,
    )


@pytest.mark.usefixtures("small_windows")
def test_each_row_once_on_1_2_and_3_ranks_and_resumed_on_others(folder: Path) -> None:
    dataset = ParquetDataset(folder, for_batches=True)
    num_steps = NUM_ROWS // BATCH_SIZE + 1
    seen = {}
    for world_size in (1, 2, 3):
        ranks = [loader(dataset, rank, world_size) for rank in range(world_size)]
        batches = [next(rank) for _ in range(num_steps) for rank in ranks]
        assert [number for batch in batches for number in batch.sample_ids] == list(range(num_steps * BATCH_SIZE))
        seen[world_size] = [int(caption) for batch in batches for caption in batch.captions]
        for batch in batches[::50]:
            rows = torch.tensor([float(caption) for caption in batch.captions])
            assert torch.equal(batch.latents[:, 0, 0, 0, 0], rows) and torch.equal(batch.text_embeddings[:, 0, 0], rows)
    assert seen[1] == seen[2] == seen[3]
    assert sorted(seen[1][:NUM_ROWS]) == list(range(NUM_ROWS))
    samples = SampleOrder(NUM_ROWS, 3, dataset.group_sizes)
    assert seen[1] == [samples.row(number) for number in range(len(seen[1]))]

    for step, world_size in ((1, 3), (17, 2), (18, 1), (num_steps - 1, 3)):
        ranks = [loader(ParquetDataset(folder), rank, world_size, step * BATCH_SIZE) for rank in range(world_size)]
        resumed = [int(caption) for _ in range(2) for rank in ranks for caption in next(rank).captions]
        start = step * BATCH_SIZE
        assert resumed[:BATCH_SIZE] == seen[1][start : start + BATCH_SIZE]


@pytest.mark.usefixtures("small_windows")
def test_footers_and_groups_are_read_once_and_memory_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, footers = Counter[int](), Counter[str]()
    load, read_footer = RowGroups._load, row_groups._read_footer

    def counted(groups: RowGroups, number: int) -> row_groups.Columns:
        loads[number] += 1
        return load(groups, number)

    def counted_footer(file: Path) -> object:
        footers[file.name] += 1
        return read_footer(file)

    monkeypatch.setattr(RowGroups, "_load", counted)
    monkeypatch.setattr(row_groups, "_read_footer", counted_footer)
    monkeypatch.setattr(row_groups.pq, "read_metadata", lambda file: pytest.fail(f"{file} is read again"))
    limit = 2_000_000  # two windows
    dataset = ParquetDataset(folder, for_batches=True, cache_bytes=limit)
    num_footer_bytes = dataset.held_bytes
    batches = loader(dataset)
    held = []
    for _ in range(NUM_ROWS // BATCH_SIZE):
        next(batches)
        held.append(dataset.held_bytes - num_footer_bytes)
        kept = [group.nbytes for group, _ in dataset._groups._groups._values.values()]
        assert held[-1] == sum(kept), "the running count is wrong"
    assert max(held) <= limit and min(held[len(held) // 2 :]) > 0
    assert set(footers.values()) == {1} and len(footers) == 5
    assert len(loads) >= 199 and set(loads.values()) == {1}

    one = ParquetDataset(folder, cache_bytes=1)
    for index in (0, 5000, 1, 19_999):
        assert one[index].caption == str(index)
        assert len(one._groups._groups._values) == 1


def test_footers_beyond_the_limit_are_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_groups, "FOOTER_BYTES", 1)
    dataset = ParquetDataset(folder)
    assert len(dataset._groups._footers._values) == 1
    assert [dataset[index].caption for index in (0, 8000, 4000, 0)] == ["0", "8000", "4000", "0"]


def test_a_window_is_larger_than_its_size_by_less_than_a_group() -> None:
    for row_bytes, group_rows in itertools.product((100, 2048, 50_000), (100, 5000)):
        groups = sizes([group_rows] * 400, row_bytes)
        windows = order._windows(groups, 0, 0)
        ends = np.concatenate([[0], windows.group_ends])
        assert ends[-1] == 400 and windows.row_ends[-1] == 400 * group_rows
        cost = max(row_bytes, 2048) * group_rows
        assert max(np.diff(ends)) * cost < WINDOW_BYTES + cost
