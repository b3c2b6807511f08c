"""Loader of batches. Its state is one number: the number of samples that the run has seen.

Samples of a run are counted over all ranks from 0, and `titan_distill.data.order` maps a sample's number to a row of
the dataset. A global batch consists of the next `global_batch_size` sample ids, and each rank takes a contiguous slice
of them. So any number of ranks sees the same samples with the same ids, and an epoch may end inside a batch. A run can
resume exactly on another number of ranks, because only the counter is saved.

Trade-off: ranks divide each batch, not the dataset, so every rank reads from all files; in return no sample is dropped
at the end of an epoch, and ranks have no state of their own. Workers read ahead, but the counter advances only when a
batch is returned, so a checkpoint never skips samples that were prefetched and not yet trained on. Each worker has a
cache of its own: parquet data needs up to `max(1, num_workers) * (CACHE_BYTES + FOOTER_BYTES)` per rank and set.

Shape legend: B samples of this rank, L max_text_tokens, D text width, C F H W latent channels, frames, height, width.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchdata.stateful_dataloader import StatefulDataLoader

from titan_distill.config.config import Config
from titan_distill.config.paths import of_key
from titan_distill.config.sections import DataConfig
from titan_distill.data.footage import VideoSize
from titan_distill.data.latents import Form, LatentStatistics
from titan_distill.data.manifest import MANIFEST_NAME, Size, check_manifest, stated_form
from titan_distill.data.mixed import MixedDataset
from titan_distill.data.parquet import LatentRow, ParquetDataset, RowCheck
from titan_distill.data.rows import BadRowError, RowDataset, RowOrder
from titan_distill.data.videos import ClipRow, VideoDataset
from titan_distill.diffusion.transfer import to_device

logger = logging.getLogger(__name__)

AnyDataset = RowDataset[LatentRow] | RowDataset[ClipRow]
DATA_PATH = "data.path"


@dataclass(frozen=True)
class Batch:
    """Samples of one rank in one step. `sample_ids` are unique over the run; every random draw is keyed by them."""

    sample_ids: list[int]
    captions: list[str]
    text_embeddings: Tensor  # [B, L, D] fp32, zero after each prompt's true length
    latents: Tensor | None  # [B, C, F, H, W] fp32, None for text-only data
    extra: dict[str, Tensor] = field(default_factory=dict)  # further tensors by column name, [B, ...] fp32
    clips: Tensor | None = None  # [B, T, H, W, 3] uint8, of which the latents are still to be made
    is_encoded: bool = True  # whether text_embeddings are there; otherwise they are empty, to be made from captions
    extra_on_host: dict[str, Tensor] = field(default_factory=dict)  # what `to` was given as extra, for `on_host`
    latent_shape: tuple[int, ...] | None = None  # (C, F, H, W) of the bucket; None for data of one shape
    encoded: dict[int, Batch] = field(default_factory=dict)  # this rank's part, where peers encode the rest

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with its tensors on `device`. Tensors of `extra` stay available on the host, too."""
        return replace(self._map(lambda tensor: to_device(tensor, device)), extra_on_host=self.extra)

    def on_host(self, name: str) -> Tensor:
        """Returns the tensor `name` of `extra` on the host, so that reading values does not wait for the device."""
        return self.extra_on_host.get(name, self.extra[name])

    def split(self, local_batch_size: int) -> list[Batch]:
        """Splits the batch into micro-batches of `local_batch_size` samples, in order. The last one may be smaller."""
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
    data: DataConfig,
    *,
    tensors: Sequence[str],
    video_size: tuple[int, int, int] | None,
    needs_latents: bool,
    buckets: Mapping[Size, Sequence[int]] | None = None,
    checks: Sequence[RowCheck] = (),
    encoders: Mapping[str, str] | None = None,
    statistics: LatentStatistics | None = None,
    key: str = DATA_PATH,
) -> AnyDataset:
    """The rows to train on. The first ones are read.

    Args:
        data: the section [data] of the configuration.
        tensors: further tensors that each row must have.
        video_size: (frames, height, width) of a sample in pixels; None for a family whose samples are not videos.
        needs_latents: whether each row must have a latent or a video.
        buckets: shapes of the latents of a run with several by the size of the video; empty for one shape.
        checks: further checks of each row of parquet data.
        encoders: digests of the run's encoders, to compare with the data's manifest (`manifest.check_manifest`).
        statistics: those of the run's VAE, with which raw latents are normalised; None for a family that has none.
        key: configuration key of the path, for messages. Bad rows are tolerated in training data only.

    Raises:
        ValueError: the data can't be read, lacks required latents or tensors, or has more bad rows among the first than
            data.max_bad_rows tolerates, or it is not clear whether its latents are raw.
    """
    dataset: AnyDataset
    sets: Sequence[ParquetDataset] = ()
    is_training = key == DATA_PATH
    keys, max_bad_rows = (data.keys, data.max_bad_rows) if is_training else ({key: data.path}, None)
    if data.holds_videos and buckets:
        raise ValueError(f"{key} = {data.path!r} is a table, whose clips have one size; preprocess it for buckets")
    if data.holds_videos:
        if video_size is None or tensors:
            lacking = f"the tensors {', '.join(tensors)}" if tensors else "samples of a family without videos"
            raise ValueError(f"{key} = {data.path!r} is a table of videos, which can't hold {lacking}; use parquet")
        size = VideoSize(*video_size, data.fps) if needs_latents else None
        with of_key(key, data.path):
            dataset = VideoDataset(data.path, size, max_bad_rows)
    else:
        own = (partial(check_text_tokens, data.max_text_tokens), *((_check_has_latent,) if needs_latents else ()))
        options: dict[str, Any] = {"tensors": tensors, "checks": (*own, *checks), "max_bad_rows": max_bad_rows}
        sets = [_open_set(key, path, options) for key, path in keys.items()]
        sizes = tuple(buckets or (() if video_size is None else (video_size,)))
        for (name, path), part in zip(keys.items(), sets, strict=True):
            with of_key(name, path):
                for folder in part.manifests:
                    check_manifest(folder, encoders=encoders or {}, sizes=sizes, needs_latents=needs_latents)
        _warn_of_rates(sets)
        if is_training:
            _check_stated_form(data, sets)
        shapes = tuple(map(tuple, (buckets or {}).values()))
        with nullcontext() if data.sources else of_key(key, data.path):
            dataset = _joined(data, sets, needs_latents, shapes, max_bad_rows)
            if isinstance(dataset, MixedDataset) and is_training:
                dataset.check_buckets()
    with nullcontext() if data.sources else of_key(key, data.path):
        dataset.check_first_rows()
    if needs_latents or data.latents:
        for (name, path), part in zip(keys.items(), sets, strict=False):
            with of_key(name, path):
                normalise_latents(part, statistics, data.latents)
    return dataset


def normalise_latents(
    dataset: ParquetDataset, statistics: LatentStatistics | None, stated: Form | None, stated_by: str = "data.latents"
) -> None:
    """Normalises the latents of a set whose latents are raw.

    Args:
        dataset: the set.
        statistics: those of the run's VAE; None for a family that has none.
        stated: the form, for a set whose manifest does not state it.
        stated_by: configuration key or option that states it, for messages.

    Raises:
        ValueError: as `ParquetDataset.normalise_latents`, or for a form that has no effect.
    """
    if statistics is None:
        if stated is not None:
            raise ValueError(f"{stated_by} = {stated!r} has no effect on this family's latents; remove it")
        return
    if (form := stated_form(dataset.manifests)) is not None:
        dataset.normalise_latents(statistics, form, f"latents of {MANIFEST_NAME}")
    else:
        dataset.normalise_latents(statistics, stated, stated_by)


def _check_stated_form(data: DataConfig, sets: Sequence[ParquetDataset]) -> None:
    """Raises ValueError if `data.latents` contradicts the manifests of all sets, and so has no effect."""
    forms = [stated_form(part.manifests) for part in sets]
    if data.latents is not None and not {None, data.latents} & set(forms):
        raise ValueError(
            f"data.latents = {data.latents!r}, but {MANIFEST_NAME} in {sets[0].path} says {forms[0]!r}; remove "
            "data.latents, or the line in the file if it is wrong"
        )


def _open_set(key: str, path: str, options: dict[str, Any]) -> ParquetDataset:
    with of_key(key, path):
        return ParquetDataset(path, for_batches=True, **options)


def _joined(
    data: DataConfig,
    sets: Sequence[ParquetDataset],
    needs_latents: bool,
    shapes: Sequence[tuple[int, ...]],
    max_bad_rows: int | None,
) -> RowDataset[LatentRow]:
    """Returns the sets of a run as one. If one of them has only text, a run that needs no latents reads none."""
    if len(sets) == 1 and not shapes:
        return sets[0]
    if not needs_latents and not all(part.has_latents for part in sets):
        for part in sets:
            part.drop_latents()
    weights = [source.weight for source in data.sources] or [1.0]
    return MixedDataset(sets, weights, shapes, max_bad_rows)


def _warn_of_rates(sets: Sequence[ParquetDataset]) -> None:
    manifests = [item for part in sets for item in part.manifests.items()]
    rates = {str(folder): manifest.fps for folder, manifest in manifests if manifest.latents}
    if len(set(rates.values())) > 1:
        shown = ", ".join(f"{rate or 'no'} in {path}" for path, rate in rates.items())
        logger.warning("the clips of the run have different frames per second: %s", shown)


def check_text_tokens(max_text_tokens: int, row: LatentRow) -> None:
    """Raises ValueError for a row with more text tokens than the run's batches have."""
    if row.text_embedding.shape[0] > max_text_tokens:  # len() of a tensor takes longer
        raise ValueError(
            f"{row.text_embedding.shape[0]} text tokens, but data.max_text_tokens is {max_text_tokens}; raise it, or "
            "preprocess the captions with this limit"
        )


def _check_has_latent(row: LatentRow) -> None:
    if row.vae_latent is None:
        raise ValueError(
            "holds only text, but this job trains on latents; make them with `titan-distill data preprocess`"
        )


class SampleLoader(Iterator[Batch]):
    """Endless iterator over this rank's slices of the global batches.

    Args:
        dataset: rows that all have latents of one shape, or all have none.
        global_batch_size: samples per step over all data ranks; a multiple of `data_world_size`.
        data_rank: index of this rank's data group, in [0, data_world_size).
        data_world_size: number of data groups.
        seed: seed of the order of samples.
        max_text_tokens: length to which text embeddings are zero-padded.
        samples_seen: number of samples that the run has already consumed, over all ranks.
        num_workers: number of reader processes; 0 reads in this process. The batches do not depend on it.

    Raises:
        BadRowError: during iteration, for more bad rows than the dataset tolerates, or rows that do not fit together.
        RuntimeError: during iteration, for any other error in any process; the message has the path and the error.
    """

    def __init__(
        self,
        dataset: AnyDataset,
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
        self.order = dataset.order(seed, global_batch_size)
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

    @classmethod
    def of_run(
        cls, config: Config, dataset: AnyDataset, data_rank: int, data_world_size: int, samples_seen: int
    ) -> SampleLoader:
        """Returns the loader of a configuration's batches, seed and workers."""
        return cls(
            dataset,
            global_batch_size=config.training.global_batch_size,
            data_rank=data_rank,
            data_world_size=data_world_size,
            seed=config.job.seed,
            max_text_tokens=config.data.max_text_tokens,
            samples_seen=samples_seen,
            num_workers=config.data.num_workers,
        )

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
            kind = BadRowError if batch.is_bad_row else RuntimeError
            raise kind(batch.message) from RuntimeError(f"in the reader:\n{batch.traceback}")
        self._samples_seen += self._ids.global_batch_size
        return batch

    def state_dict(self) -> dict[str, int]:
        """Returns `{"samples_seen": n}`: the samples returned to all ranks together, without those read ahead."""
        return {"samples_seen": self._samples_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues after `state["samples_seen"]` samples. The number of ranks and workers may have changed."""
        self._samples_seen = self._ids.first = state["samples_seen"]
        # StatefulDataLoader takes an empty state as "start anew": it drops its iterator and what workers read ahead.
        self._loader.load_state_dict({})
        self._batches = None


@dataclass
class _RankSampleIds:
    """Sampler of the ids of one rank: one list per step, beginning at global sample number `first`."""

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
    """Error message from a worker process. Text can be pickled; many exceptions of pyarrow and torch cannot."""

    message: str
    traceback: str
    is_bad_row: bool = False


@dataclass(frozen=True)
class _BatchReader(torch.utils.data.Dataset["Batch | _Failure"]):
    """Map-style dataset whose index is a list of sample ids and whose item is their batch."""

    dataset: AnyDataset
    order: RowOrder
    max_text_tokens: int

    def __getitem__(self, sample_ids: list[int]) -> Batch | _Failure:
        try:
            numbers = [self.order.row(sample_id) for sample_id in sample_ids]
            batch = collate_rows(sample_ids, [self.dataset[number] for number in numbers], self.max_text_tokens)
            return replace(batch, latent_shape=self.dataset.shape(numbers[0]))
        except BadRowError as error:
            return _Failure(str(error), traceback.format_exc(), is_bad_row=True)
        except Exception as error:  # raised again, as RuntimeError, by SampleLoader in the main process
            where = f"samples {sample_ids[0]} to {sample_ids[-1]} from {self.dataset.path}"
            return _Failure(f"can't load {where}: {type(error).__name__}: {error}", traceback.format_exc())


def collate_rows(sample_ids: list[int], rows: Sequence[LatentRow | ClipRow], max_text_tokens: int) -> Batch:
    """Makes a batch of dataset rows of one kind. Raises as `collate`."""
    if isinstance(rows[0], ClipRow):
        return collate_clips(sample_ids, [row for row in rows if isinstance(row, ClipRow)])
    return collate(sample_ids, [row for row in rows if isinstance(row, LatentRow)], max_text_tokens)


def collate(sample_ids: list[int], rows: Sequence[LatentRow], max_text_tokens: int) -> Batch:
    """Makes a batch of dataset rows. Raises BadRowError for a row whose shapes differ from the others, or with more
    than `max_text_tokens`."""
    for row in rows:
        try:
            check_text_tokens(max_text_tokens, row)
        except ValueError as error:
            raise BadRowError(f"row {row.id!r}: {error}") from error
    padded = [_pad(row.text_embedding, max_text_tokens) for row in rows]
    return Batch(
        sample_ids=sample_ids,
        captions=[row.caption for row in rows],
        text_embeddings=_stack(rows, padded, "text embedding"),
        latents=_stack_latents(rows),
        extra={name: _stack(rows, [row.extra[name] for row in rows], name) for name in rows[0].extra},
    )


def collate_clips(sample_ids: list[int], rows: Sequence[ClipRow]) -> Batch:
    """Makes a batch of videos and prompts, which the adapter will encode."""
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
    latents = [row.vae_latent for row in rows if row.vae_latent is not None]
    if 0 < len(latents) < len(rows):
        text_only = next(row for row in rows if row.vae_latent is None)
        raise BadRowError(
            f"row {text_only.id!r} has no latent, others have: keep text-only rows in a folder of their own"
        )
    return _stack(rows, latents, "latent") if latents else None


def _stack(rows: Sequence[LatentRow], tensors: Sequence[Tensor], what: str) -> Tensor:
    shape = tensors[0].shape
    for row, tensor in zip(rows, tensors, strict=True):
        if tensor.shape != shape:
            raise BadRowError(
                f"row {row.id!r} has a {what} of {list(tensor.shape)}, row {rows[0].id!r} of {list(shape)}: "
                "all rows of a dataset must have the same shape"
            )
    return torch.stack(list(tensors)).float()


def _pad(embedding_LD: Tensor, length: int) -> Tensor:
    missing = length - embedding_LD.shape[0]
    return pad(embedding_LD, (0, 0, 0, missing)) if missing else embedding_LD
