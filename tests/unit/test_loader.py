"""The loader: which samples a run sees depends on its seed and nothing else, and one number resumes it anywhere."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from titan_distill.data.loader import Batch, SampleLoader
from titan_distill.data.order import SampleOrder
from titan_distill.data.parquet import SCHEMA, LatentRow, ParquetDataset, write_rows
from titan_distill.data.rows import BadRowError

NUM_ROWS = 10
MAX_TEXT_TOKENS = 6


def make_row(index: int, shape: tuple[int, ...] | None = (2, 1, 2, 2), num_tokens: int | None = None) -> LatentRow:
    embedding = torch.full((num_tokens or 1 + index % MAX_TEXT_TOKENS, 3), index + 1.0, dtype=torch.float16)
    latent = None if shape is None else torch.full(shape, float(index), dtype=torch.bfloat16)
    return LatentRow(id=f"row-{index}", caption=f"caption {index}", text_embedding=embedding, vae_latent=latent)


@pytest.fixture
def dataset(tmp_path: Path) -> ParquetDataset:
    write_rows(tmp_path / "a.parquet", (make_row(index) for index in range(NUM_ROWS)))
    return ParquetDataset(tmp_path)


def loader(
    dataset: ParquetDataset,
    global_batch_size: int = 4,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 7,
    max_text_tokens: int = MAX_TEXT_TOKENS,
    samples_seen: int = 0,
    num_workers: int = 0,
) -> SampleLoader:
    return SampleLoader(
        dataset,
        global_batch_size=global_batch_size,
        data_rank=rank,
        data_world_size=world_size,
        seed=seed,
        max_text_tokens=max_text_tokens,
        samples_seen=samples_seen,
        num_workers=num_workers,
    )


def samples(batches: Iterator[Batch], num_batches: int) -> list[tuple[int, str]]:
    taken = list(itertools.islice(batches, num_batches))
    return [pair for batch in taken for pair in zip(batch.sample_ids, batch.captions, strict=True)]


def run(dataset: ParquetDataset, num_steps: int, world_size: int = 1, **options: int) -> list[tuple[int, str]]:
    """(sample id, caption) of `num_steps` global batches, the ranks' slices put together in rank order."""
    ranks = [loader(dataset, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    return [pair for _ in range(num_steps) for rank in ranks for pair in samples(rank, 1)]


def test_every_row_once_an_epoch_in_an_order_of_seed_and_epoch_only(dataset: ParquetDataset) -> None:
    seen = run(dataset, num_steps=15, global_batch_size=2)
    assert [sample_id for sample_id, _ in seen] == list(range(3 * NUM_ROWS))
    epochs = [[caption for _, caption in seen[start : start + NUM_ROWS]] for start in range(0, 3 * NUM_ROWS, NUM_ROWS)]
    in_order = [f"caption {index}" for index in range(NUM_ROWS)]
    assert all(sorted(epoch) == in_order for epoch in epochs)
    assert in_order not in epochs
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert run(dataset, num_steps=15, global_batch_size=2, seed=8) != seen


@pytest.mark.parametrize("global_batch_size", [4, 12, 32])
def test_any_number_of_ranks_sees_the_same_samples(dataset: ParquetDataset, global_batch_size: int) -> None:
    """4 does not divide the ten rows, so an epoch ends inside a batch; 12 and 32 exceed them."""
    num_steps = 96 // global_batch_size
    alone = run(dataset, num_steps, global_batch_size=global_batch_size)
    assert alone == run(dataset, 96, global_batch_size=1), "the batch size must not matter either"
    for world_size in (2, 4):
        assert run(dataset, num_steps, world_size, global_batch_size=global_batch_size) == alone


def test_a_rank_takes_a_contiguous_slice(dataset: ParquetDataset) -> None:
    second = loader(dataset, global_batch_size=8, rank=1, world_size=4)
    assert [next(second).sample_ids for _ in range(2)] == [[2, 3], [10, 11]]


def test_latents_and_text_belong_to_their_caption(dataset: ParquetDataset) -> None:
    batch = next(loader(dataset, global_batch_size=NUM_ROWS))
    assert batch.latents is not None
    assert batch.latents.dtype == batch.text_embeddings.dtype == torch.float32
    assert batch.latents.shape == (NUM_ROWS, 2, 1, 2, 2)
    assert batch.text_embeddings.shape == (NUM_ROWS, MAX_TEXT_TOKENS, 3)
    for position, caption in enumerate(batch.captions):
        index = int(caption.split()[1])
        num_tokens = 1 + index % MAX_TEXT_TOKENS
        assert (batch.latents[position] == index).all()
        assert (batch.text_embeddings[position, :num_tokens] == index + 1).all()
        assert (batch.text_embeddings[position, num_tokens:] == 0).all()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_resume_at_any_counter_on_another_world_size(dataset: ParquetDataset, num_steps: int, world_size: int) -> None:
    whole = run(dataset, 10)
    first = loader(dataset, rank=1, world_size=2)
    samples(first, num_steps)
    state = first.state_dict()
    assert state == {"samples_seen": 4 * num_steps}

    ranks = [loader(dataset, rank=rank, world_size=world_size) for rank in range(world_size)]
    samples(ranks[0], 3)  # a loader in use forgets where it was
    for rank in ranks:
        rank.load_state_dict(state)
    resumed = [pair for _ in range(3) for rank in ranks for pair in samples(rank, 1)]
    assert resumed == whole[4 * num_steps : 4 * num_steps + 12]
    assert run(dataset, 3, world_size, samples_seen=4 * num_steps) == resumed


def test_resume_with_another_global_batch_size(dataset: ParquetDataset) -> None:
    assert run(dataset, 2, global_batch_size=6, samples_seen=20) == run(dataset, 8)[20:]


def test_workers_change_nothing_and_reading_ahead_does_not_count(dataset: ParquetDataset) -> None:
    whole = run(dataset, 12)
    ahead = loader(dataset, num_workers=2)
    assert samples(ahead, 5) == whole[:20]
    assert ahead.state_dict() == {"samples_seen": 20}
    ahead.load_state_dict({"samples_seen": 8})
    assert samples(ahead, 2) == whole[8:16]

    resumed = loader(dataset)
    resumed.load_state_dict(ahead.state_dict())
    assert samples(resumed, 2) == whole[16:24]


def test_no_worker_outlives_a_failure_or_a_resume(dataset: ParquetDataset) -> None:
    batches = loader(dataset, num_workers=2)
    next(batches)
    batches.load_state_dict({"samples_seen": 0})
    assert not multiprocessing.active_children()
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    (dataset.path / "a.parquet").unlink()
    batches.load_state_dict({"samples_seen": 0})
    with pytest.raises(BadRowError, match="unreadable"):
        next(batches)
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_an_error_with_the_path(dataset: ParquetDataset) -> None:
    """As the kernel does it when memory runs out.

    PyTorch's SIGCHLD handler would raise at whatever line the main thread is at, in pytest for instance, so it stays
    blocked until the workers are forgotten; the loader's own look at them is what finds the dead one here.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        batches = loader(dataset, num_workers=1)
        next(batches)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        with pytest.raises(RuntimeError, match=rf"can't load from {dataset.path}: DataLoader worker .*(killed|exited)"):
            samples(batches, 20)
        del batches
        gc.collect()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_random_state_is_left_alone(dataset: ParquetDataset, num_workers: int) -> None:
    before = torch.get_rng_state()
    samples(loader(dataset, num_workers=num_workers), 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_row_is_one_sentence_from_every_process(tmp_path: Path, num_workers: int) -> None:
    write_rows(tmp_path / "a.parquet", (make_row(index) for index in range(NUM_ROWS)))
    records = pq.ParquetFile(tmp_path / "a.parquet").read().to_pylist()
    order = SampleOrder(NUM_ROWS, seed=7)
    damaged = order.row(9)
    records[damaged]["vae_latent_shape"] = [2]
    pq.write_table(pa.Table.from_pylist(records, SCHEMA), tmp_path / "a.parquet")

    batches = loader(ParquetDataset(tmp_path, max_bad_rows=0), num_workers=num_workers)
    samples(batches, 2)
    message = rf"{tmp_path}/a\.parquet, row {damaged}: vae_latent_shape is \[2\].*; data\.max_bad_rows = 0 allows no"
    with pytest.raises(BadRowError, match=message) as error:
        next(batches)
    assert "\n" not in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value), "as it travels to the other ranks"
    assert "_from_record" in str(error.value.__cause__), "the reader's own traceback is kept for developers"
    assert batches.state_dict() == {"samples_seen": 8}
    with pytest.raises(BadRowError, match=message):
        next(batches)


def test_tolerated_bad_rows_are_the_same_on_every_layout(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", (make_row(index) for index in range(NUM_ROWS)))
    records = pq.ParquetFile(tmp_path / "a.parquet").read().to_pylist()
    for index in (2, 3):
        records[index]["text_embedding_dtype"] = ""
    pq.write_table(pa.Table.from_pylist(records, SCHEMA), tmp_path / "a.parquet")

    alone = run(ParquetDataset(tmp_path, max_bad_rows=2), 5)
    assert sorted(caption for _, caption in alone[:NUM_ROWS]).count("caption 4") == 3
    assert run(ParquetDataset(tmp_path, max_bad_rows=2), 5, world_size=4) == alone


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_vanishes_is_named(dataset: ParquetDataset, num_workers: int) -> None:
    (dataset.path / "a.parquet").unlink()
    with pytest.raises(BadRowError, match=r"a\.parquet, rows 0 to 9: unreadable"):
        next(loader(dataset, num_workers=num_workers))


UNEQUAL_ROWS = {
    "latents": ([make_row(0), make_row(1, shape=(2, 1, 2, 4))], r"a latent of \[2, 1, 2, \d\], row 'row-\d' of"),
    "text only": ([make_row(0), make_row(1, shape=None)], "row 'row-1' has no latent, others have"),
    "text": ([make_row(0), make_row(1, num_tokens=7)], "row 'row-1': 7 text tokens, but data.max_text_tokens is 6"),
}


@pytest.mark.parametrize("case", list(UNEQUAL_ROWS))
def test_rows_that_do_not_fit_together_are_named(tmp_path: Path, case: str) -> None:
    rows, message = UNEQUAL_ROWS[case]
    write_rows(tmp_path / "a.parquet", rows)
    with pytest.raises(BadRowError, match=message):
        next(loader(ParquetDataset(tmp_path)))


def test_text_only_batches(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", [make_row(index, shape=None) for index in range(3)])
    batch = next(loader(ParquetDataset(tmp_path)))
    assert batch.latents is None
    assert batch.to("cpu").latents is None
    assert [part.latents for part in batch.split(2)] == [None, None]


def test_batch_splits_into_micro_batches_in_order(dataset: ParquetDataset) -> None:
    batch = next(loader(dataset, global_batch_size=8))
    parts = batch.split(2)
    assert [len(part.sample_ids) for part in parts] == [2] * 4
    assert [part.text_embeddings.shape[0] for part in parts] == [2] * 4
    assert [sample_id for part in parts for sample_id in part.sample_ids] == batch.sample_ids
    assert [caption for part in parts for caption in part.captions] == batch.captions
    assert torch.equal(torch.cat([part.latents for part in parts]), batch.latents)
    assert torch.equal(torch.cat([part.text_embeddings for part in parts]), batch.text_embeddings)
    assert batch.to("meta").latents.device.type == batch.to("meta").text_embeddings.device.type == "meta"


def test_global_batch_must_divide_over_the_ranks(dataset: ParquetDataset) -> None:
    """The configuration says so to users; here it is an invariant."""
    with pytest.raises(AssertionError, match="6 samples over 4 data ranks"):
        loader(dataset, global_batch_size=6, world_size=4)


def test_further_tensors_travel_with_their_samples(tmp_path: Path) -> None:
    def row(index: int, length: int = 3) -> LatentRow:
        return dataclasses.replace(make_row(index), extra={"states": torch.full((length, 2), index, dtype=torch.half)})

    write_rows(tmp_path / "a.parquet", (row(index) for index in range(NUM_ROWS)))
    batch = next(loader(ParquetDataset(tmp_path, tensors=("states",))))
    assert batch.extra["states"].shape == (4, 3, 2) and batch.extra["states"].dtype == torch.float32
    expected = [float(caption.split()[1]) for caption in batch.captions]
    assert batch.extra["states"][:, 0, 0].tolist() == expected
    parts = batch.to("cpu").split(3)
    assert [part.extra["states"].shape[0] for part in parts] == [3, 1]
    assert torch.equal(torch.cat([part.extra["states"] for part in parts]), batch.extra["states"])
    assert next(loader(ParquetDataset(tmp_path))).extra == {}

    write_rows(tmp_path / "a.parquet", (row(index, length=3 + index % 2) for index in range(NUM_ROWS)))
    with pytest.raises(BadRowError, match=r"row 'row-\d' has a states of \[\d, 2\], row 'row-\d' of .*the same shape"):
        next(loader(ParquetDataset(tmp_path, tensors=("states",))))
