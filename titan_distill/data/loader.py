"""The loader makes batches; its whole state is one number, the samples that the run has seen.

Sample `g` of a run, counted over all ranks from 0, is row `permutation(seed, g // len)[g % len]` of the dataset.
Nothing else decides what is trained on. A global batch is the next `global_batch_size` ids, and a rank takes its
contiguous slice of them, so any number of ranks sees the same samples under the same ids, an epoch may end inside a
batch, and resuming on another cluster is exact: the counter is all there is to save.

Trade-off: a slice is cut from the batch, not from the dataset, so that every rank reads the whole dataset's files;
in return no sample is dropped at an epoch's end and no per-rank state exists. Workers read ahead, yet the counter moves
only when a batch is handed out, so a checkpoint never skips what was prefetched and not trained on.

Shape legend: B samples of this rank, L max_text_tokens, D text width, C F H W latent channels, frames, height, width.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchdata.stateful_dataloader import StatefulDataLoader

from titan_distill.config.sections import DataConfig
from titan_distill.data.footage import VideoSize
from titan_distill.data.parquet import LatentRow, ParquetDataset
from titan_distill.data.rows import RowDataset
from titan_distill.data.videos import ClipRow, VideoDataset
from titan_distill.diffusion.noise import keyed_generator
from titan_distill.diffusion.transfer import to_device


@dataclass(frozen=True)
class Batch:
    """Samples of one rank and step; `sample_ids` are unique over the run and key every random draw."""

    sample_ids: list[int]
    captions: list[str]
    text_embeddings: Tensor  # [B, L, D] fp32, zero after each prompt's true length
    latents: Tensor | None  # [B, C, F, H, W] fp32, None for text-only data
    extra: dict[str, Tensor] = field(default_factory=dict)  # further tensors by column name, [B, ...] fp32
    clips: Tensor | None = None  # [B, T, H, W, 3] uint8, of which the latents are still to be made
    is_encoded: bool = True  # whether text_embeddings are there; otherwise they are empty, to be made from captions
    extra_on_host: dict[str, Tensor] = field(default_factory=dict)  # what `to` was given as extra, for `on_host`

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`, and its further tensors on the host as well."""
        return replace(self._map(lambda tensor: to_device(tensor, device)), extra_on_host=self.extra)

    def on_host(self, name: str) -> Tensor:
        """A further tensor where values can be looked at without waiting for the device."""
        return self.extra_on_host.get(name, self.extra[name])

    def split(self, local_batch_size: int) -> list[Batch]:
        """Micro-batches of `local_batch_size` samples, in order; the last one is smaller where it does not divide."""
        return [self._slice(slice(i, i + local_batch_size)) for i in range(0, len(self.sample_ids), local_batch_size)]

    def _slice(self, part: slice) -> Batch:
        batch = self._map(lambda tensor: tensor[part])
        on_host = {name: tensor[part] for name, tensor in self.extra_on_host.items()}
        return replace(batch, sample_ids=self.sample_ids[part], captions=self.captions[part], extra_on_host=on_host)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            text_embeddings=change(self.text_embeddings),
            latents=None if self.latents is None else change(self.latents),
            extra={name: change(tensor) for name, tensor in self.extra.items()},
            clips=None if self.clips is None else change(self.clips),
        )


def open_dataset(
    data: DataConfig, *, tensors: Sequence[str], video_size: tuple[int, int, int] | None, needs_latents: bool
) -> RowDataset[LatentRow] | RowDataset[ClipRow]:
    """The rows to train on.

    Args:
        data: where they are.
        tensors: further tensors that each row must have.
        video_size: (frames, height, width) of a sample in pixels; None for families whose samples are no videos.
        needs_latents: whether rows without a latent, or a video, can't be trained on.

    Raises:
        ValueError: data that can't be read, or that lacks what is needed.
    """
    dataset: RowDataset[LatentRow] | RowDataset[ClipRow]
    if data.holds_videos:
        if video_size is None or tensors:
            lacking = f"the tensors {', '.join(tensors)}" if tensors else "samples of a family without videos"
            raise ValueError(f"data.path = {data.path!r} is a .csv, which can't hold {lacking}; use parquet")
        size = VideoSize(*video_size, data.fps) if needs_latents else None
        return VideoDataset(data.path, size, data.max_bad_rows)
    dataset = ParquetDataset(data.path, tensors=tensors, max_bad_rows=data.max_bad_rows)
    if needs_latents and not dataset.has_latents:
        raise ValueError(
            f"data.path = {data.path!r} holds only text, but this job trains on latents; make them with "
            "`titan-distill data preprocess`"
        )
    return dataset


@dataclass(frozen=True)
class SampleOrder:
    """Maps each sample id of the run to a dataset row."""

    num_rows: int
    seed: int

    def row(self, sample_id: int) -> int:
        """Row of `sample_id`: every row once an epoch, in an order keyed by (seed, epoch)."""
        epoch, position = divmod(sample_id, self.num_rows)
        return int(_permutation(self.num_rows, self.seed, epoch)[position])


class SampleLoader(Iterator[Batch]):
    """Endless iterator over this rank's slices of the global batches.

    Args:
        dataset: its rows all have latents of one shape, or all none.
        global_batch_size: samples per step over all data ranks; a multiple of `data_world_size`.
        data_rank: index of this rank's data group, in [0, data_world_size).
        data_world_size: number of data groups.
        seed: of the epoch permutations.
        max_text_tokens: length to which text embeddings are zero-padded.
        samples_seen: samples that the run has consumed, over all ranks.
        num_workers: reader processes; 0 reads in this process. It changes when rows are read, not which.

    Raises:
        RuntimeError: from iterating, with the path and the fault, whatever went wrong in whichever process.
    """

    def __init__(
        self,
        dataset: RowDataset[LatentRow] | RowDataset[ClipRow],
        *,
        global_batch_size: int,
        data_rank: int,
        data_world_size: int,
        seed: int,
        max_text_tokens: int,
        samples_seen: int = 0,
        num_workers: int = 0,
    ) -> None:
        assert global_batch_size % data_world_size == 0, (
            f"{global_batch_size} samples over {data_world_size} data ranks"
        )
        assert 0 <= data_rank < data_world_size
        self._path = dataset.path
        self.order = SampleOrder(len(dataset), seed)
        self._ids = _RankSampleIds(global_batch_size, data_rank, data_world_size)
        self._loader: StatefulDataLoader[Batch | _Failure] = StatefulDataLoader(
            _BatchReader(dataset, self.order, max_text_tokens),
            sampler=self._ids,
            batch_size=None,  # one index, a list of sample ids, is one batch
            num_workers=num_workers,
            # Without a generator of its own, each new iterator would draw from torch's global one.
            generator=torch.Generator().manual_seed(seed),
        )
        self._batches: Iterator[Batch | _Failure] | None = None
        self.load_state_dict({"samples_seen": samples_seen})

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = iter(self._loader)
        try:
            batch = next(self._batches)
        except RuntimeError as error:  # a worker was killed, most often for its memory, and could not say where it was
            raise RuntimeError(f"can't load from {self._path}: {' '.join(str(error).split())}") from error
        if isinstance(batch, _Failure):
            # Ends the workers now: left to the garbage collector, each would block it for seconds.
            self.load_state_dict(self.state_dict())
            raise RuntimeError(batch.message) from RuntimeError(f"in the reader:\n{batch.traceback}")
        self._samples_seen += self._ids.global_batch_size
        return batch

    def state_dict(self) -> dict[str, int]:
        """`{"samples_seen": n}`: what all ranks together were handed, not what was read ahead."""
        return {"samples_seen": self._samples_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after `state["samples_seen"]` samples, saved with any number of ranks and workers."""
        self._samples_seen = self._ids.first = state["samples_seen"]
        # StatefulDataLoader takes an empty state as "start anew": it drops its iterator and what workers read ahead.
        self._loader.load_state_dict({})
        self._batches = None


@dataclass
class _RankSampleIds:
    """Sampler: the sample ids of one rank, one list per step, from global sample number `first` on."""

    global_batch_size: int
    data_rank: int
    data_world_size: int
    first: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        per_rank = self.global_batch_size // self.data_world_size
        start = self.first + self.data_rank * per_rank
        while True:
            yield list(range(start, start + per_rank))
            start += self.global_batch_size


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker: text survives pickling, many exceptions of pyarrow and torch do not."""

    message: str
    traceback: str


@dataclass(frozen=True)
class _BatchReader(torch.utils.data.Dataset["Batch | _Failure"]):
    """Map-style dataset from a list of sample ids to the batch that holds them."""

    dataset: RowDataset[LatentRow] | RowDataset[ClipRow]
    order: SampleOrder
    max_text_tokens: int

    def __getitem__(self, sample_ids: list[int]) -> Batch | _Failure:
        try:
            rows = [self.dataset[self.order.row(sample_id)] for sample_id in sample_ids]
            if isinstance(rows[0], ClipRow):
                return collate_clips(sample_ids, [row for row in rows if isinstance(row, ClipRow)])
            return collate(sample_ids, [row for row in rows if isinstance(row, LatentRow)], self.max_text_tokens)
        except Exception as error:  # raised again, as RuntimeError, by SampleLoader in the main process
            where = f"samples {sample_ids[0]} to {sample_ids[-1]} from {self.dataset.path}"
            return _Failure(f"can't load {where}: {type(error).__name__}: {error}", traceback.format_exc())


def collate(sample_ids: list[int], rows: Sequence[LatentRow], max_text_tokens: int) -> Batch:
    """One batch of dataset rows. Raises ValueError for a row that does not fit the others or `max_text_tokens`."""
    embeddings = [row.text_embedding.float() for row in rows]
    for row, embedding in zip(rows, embeddings, strict=True):
        if len(embedding) > max_text_tokens:
            raise ValueError(
                f"row {row.id!r} has {len(embedding)} text tokens, data.max_text_tokens is {max_text_tokens}: "
                "raise it, or preprocess the captions with this limit"
            )
    padded = [pad(embedding, (0, 0, 0, max_text_tokens - len(embedding))) for embedding in embeddings]
    return Batch(
        sample_ids=sample_ids,
        captions=[row.caption for row in rows],
        text_embeddings=_stack(rows, padded, "text embedding"),
        latents=_stack_latents(rows),
        extra={name: _stack(rows, [row.extra[name].float() for row in rows], name) for name in rows[0].extra},
    )


def collate_clips(sample_ids: list[int], rows: Sequence[ClipRow]) -> Batch:
    """One batch of rows that the adapter is to encode."""
    clips = [row.pixels for row in rows if row.pixels is not None]
    return Batch(
        sample_ids=sample_ids,
        captions=[row.caption for row in rows],
        text_embeddings=torch.empty(len(rows), 0, 0),
        latents=None,
        clips=torch.stack(clips) if clips else None,
        is_encoded=False,
    )


def _stack_latents(rows: Sequence[LatentRow]) -> Tensor | None:
    latents = [row.vae_latent.float() for row in rows if row.vae_latent is not None]
    if 0 < len(latents) < len(rows):
        text_only = next(row for row in rows if row.vae_latent is None)
        raise ValueError(
            f"row {text_only.id!r} has no latent, others have: keep text-only rows in a folder of their own"
        )
    return _stack(rows, latents, "latent") if latents else None


def _stack(rows: Sequence[LatentRow], tensors: Sequence[Tensor], what: str) -> Tensor:
    for row, tensor in zip(rows, tensors, strict=True):
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"row {row.id!r} has a {what} of {list(tensor.shape)}, row {rows[0].id!r} of {list(tensors[0].shape)}: "
                "a dataset has one size"
            )
    return torch.stack(list(tensors))


# Two epochs meet in a batch; a dataset smaller than the batch spans a few more.
@functools.lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_rows, generator=keyed_generator(f"epoch permutation {seed} {epoch}"))
