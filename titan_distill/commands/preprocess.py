"""Footage to a training set: a folder of videos and a file of captions in, latents and text embeddings out.

A first pass probes every video, and names each one that cannot be used before anything is encoded. It gives the list of
all clips, and `clip_plan` cuts this list into batches. Ranks take the batches in turn. Each video is resampled and cut
into clips of equal size; the encoders of the model family encode each clip (Wan: the VAE's posterior *mean*, because
training adds noise of its own and the mean is reproducible, normalised to the space in which the transformer works).
Videos are decoded by threads, some batches ahead, while the encoder works.

A fault in any video stops the job: a data set that silently lacks clips is worse than none. With `--on-error skip` the
clip is left out instead, and listed in `skipped.csv`. A job that was stopped goes on with the batches that are not
there (`clip_files`); the rows are the same bytes as those of a job that was not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import tyro

from titan_distill.commands.clip_files import SKIPPED, OutputFolder, SkippedClip
from titan_distill.commands.clip_plan import (
    Batch,
    Crop,
    PlannedClip,
    Shard,
    Video,
    crop_position,
    make_shards,
    parse_sizes,
    probe_videos,
)
from titan_distill.config.dtypes import DTYPES
from titan_distill.config.paths import of_key
from titan_distill.config.sections import MAX_FPS, CommConfig, RecipeConfig
from titan_distill.data import tables
from titan_distill.data.folders import files_below, plain_name
from titan_distill.data.footage import SUFFIXES, Clip, VideoSize, read_clips
from titan_distill.data.manifest import DataManifest, write_manifest
from titan_distill.data.parquet import LatentRow
from titan_distill.data.tables import listed
from titan_distill.fault_tolerance.files import fingerprint
from titan_distill.fault_tolerance.outputs import probe_folder
from titan_distill.fault_tolerance.ranks import Ranks
from titan_distill.fault_tolerance.run_lock import RunLock
from titan_distill.models.base import EncoderFolders, FootageEncoder, model_family
from titan_distill.observability.progress import ProgressBar
from titan_distill.parallelisms.mesh import is_main_process, named_device, num_ranks, start_world

logger = logging.getLogger(__name__)

MAX_READERS = 4
"""Threads per rank that decode videos, at most. A clip of 81 × 480 × 832 in memory has 97 MB."""
PATIENCE_SECONDS = 7 * 24 * 3600.0
"""Time for which ranks wait for the slowest one. If one dies, torchrun ends them."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(EncoderFolders):
    """Options of `titan-distill data preprocess`. Start it with torchrun to share the clips among ranks."""

    folder: tyro.conf.Positional[Path]
    """Folder of videos, subfolders included."""
    captions: Path
    """Captions: a table (.csv, .tsv, .jsonl, .json) of captions and videos, named from the folder or from the table on;
    or the folder itself, with a .txt beside each video or a metadata.csv, metadata.jsonl or videos2caption.json."""
    out: Path
    """Folder for the parquet files; data.path of the training job. A job that was stopped goes on there."""
    family: str = RecipeConfig.family
    """Model family whose encoders make the data; recipe.family of the training job."""
    height: int = 96
    """Height of the clips in pixels, a multiple of twice the VAE's compression; videos are scaled to cover height ×
    width and cropped."""
    width: int = 96
    """Width of the clips in pixels, likewise."""
    sizes: tuple[str, ...] = ()
    """Aspect buckets, height x width, such as 480x832 832x480. Each video gets the one that is nearest to its aspect
    ratio. Default: height and width alone."""
    crop: Crop = "centre"
    """Place of the crop. A random one is drawn for each clip."""
    seed: int = 0
    """Seed of random crops."""
    num_frames: int = 17
    """Frames per clip, 4 n + 1 for a VAE that compresses time by 4."""
    fps: float | None = 8.0
    """Frames per second after resampling (a rate above the video's repeats frames); None uses every frame."""
    stride: int | None = None
    """Frames between the starts of two clips of a video. Default: num_frames, so no overlap."""
    clips_per_video: int | None = None
    """Clips per video, the first ones. Default: all."""
    batch_size: int = 1
    """Clips per call of the VAE. More are faster only for small clips. The stored values depend on it in their last
    digits."""
    max_text_tokens: int = 64
    """Longest caption in tokens; longer ones are cut, with a warning. Wan's own limit is 512."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Dtype of the stored latents and text embeddings. The VAE computes in bfloat16 on GPUs that support it, else in
    float32."""
    device: str | None = None
    """Device of the encoders, such as cpu or cuda:1. Default: the rank's GPU, or the CPU where there is none."""
    on_error: Literal["stop", "skip"] = "stop"
    """Reaction to a video that cannot be used: stop, or leave it out and list it in skipped.csv."""
    max_skipped: int = 100
    """Largest number of videos and clips that --on-error skip leaves out; more stop the job."""

    def video_size(self, height: int, width: int) -> VideoSize:
        """Returns the size of a clip of one aspect bucket."""
        return VideoSize(self.num_frames, height, width, self.fps)


def preprocess(config: PreprocessConfig) -> str:
    """Encode the clips that are missing in `out`. Returns a sentence about the folder.

    Raises:
        ValueError: a missing folder, a video without caption or caption without video, sizes that the encoders can't
            take, videos that are damaged or too short and not to be skipped, output of other settings, that cannot be
            written, or is in use.
    """
    with of_key("--captions", config.captions):
        captions = read_captions(config.captions, config.folder)
    with of_key("FOLDER", config.folder):
        videos = find_videos(config.folder, captions, config.captions)
    sizes = _check(config)
    device = named_device(config.device)
    output = OutputFolder(config.out)
    output.check_origin()
    if is_main_process():
        probe_folder(config.out, "--out")
    with _all_ranks() as ranks, RunLock(config.out) if ranks.rank == 0 else nullcontext():
        encoder = model_family(config.family).footage_encoder(config, device)
        for height, width in sizes:
            encoder.check_size(config.num_frames, height, width)
        settings = _identity(config, sizes, captions, videos, encoder, device)
        ranks.on_rank_zero(lambda: output.check_identity(settings))
        if output.is_finished:
            return f"{config.out}: all {output.num_rows()} clips are there"
        found = ranks.on_rank_zero(output.stored_videos) or _first_pass(config, videos, sizes, ranks)
        _check_faults(found, config)
        shards = make_shards(found, config.video_size, config.batch_size)
        ranks.on_rank_zero(lambda: output.start(settings, found))
        stored = dict.fromkeys(batch.size for shard in shards for batch in shard.batches)
        manifest = DataManifest(
            latents="normalised",
            sizes=tuple((size.num_frames, size.height, size.width) for size in stored),
            fps=config.fps,
        ).with_encoders(encoder.digests())
        ranks.on_rank_zero(lambda: write_manifest(config.out, manifest))
        job = Preprocessing(config, videos, captions, encoder, output, ranks, _num_faults(found))
        return job.run(shards, found)


def _check(config: PreprocessConfig) -> list[tuple[int, int]]:
    """Checks the options that need no file, and returns the aspect buckets. Raises ValueError."""
    if config.image_encoder and not config.images:
        raise ValueError(f"--image-encoder {config.image_encoder} has no effect without --images; add it")
    for name in ("fps", "stride", "clips_per_video"):
        value = getattr(config, name)
        if value is not None and not value > 0:  # nan is neither
            raise ValueError(f"--{name.replace('_', '-')} {value:g} is not positive: leave it out for the default")
    if config.fps is not None and config.fps > MAX_FPS:
        raise ValueError(f"--fps {config.fps:g} repeats every frame without end; choose at most {MAX_FPS}")
    if config.max_text_tokens < 1:
        raise ValueError(f"--max-text-tokens {config.max_text_tokens} leaves no text; choose 1 or more")
    if config.batch_size < 1 or config.max_skipped < 0:
        raise ValueError(
            f"--batch-size {config.batch_size} and --max-skipped {config.max_skipped} must be at least 1 and 0"
        )
    if num_ranks() > 1 and (config.device or "").startswith("cuda:"):
        raise ValueError(f"--device {config.device} is one GPU for {num_ranks()} ranks; leave it out, or name cpu")
    return parse_sizes(config.sizes) or [(config.height, config.width)]


@contextmanager
def _all_ranks() -> Iterator[Ranks]:
    """All ranks of torchrun, or this process alone."""
    if num_ranks() == 1:
        yield Ranks()
        return
    start_world(CommConfig.init_timeout_seconds)
    try:
        yield Ranks(PATIENCE_SECONDS)
    finally:
        dist.destroy_process_group()


def _identity(
    config: PreprocessConfig,
    sizes: Sequence[tuple[int, int]],
    captions: Mapping[str, str],
    videos: Mapping[str, Path],
    encoder: FootageEncoder,
    device: torch.device,
) -> dict[str, Any]:
    """Returns all that the rows depend on, by name, in the form in which JSON stores it."""
    names = ("family", "num_frames", "fps", "stride", "clips_per_video", "batch_size", "crop", "seed", "dtype")
    identity = {name: getattr(config, name) for name in (*names, "max_text_tokens", "images")}
    identity |= {"sizes": [f"{height}x{width}" for height, width in sizes], "device": device.type, **encoder.digests()}
    if config.image_encoder:
        identity["image_encoder"] = fingerprint(config.image_encoder)
    facts = {"captions": captions, "videos": {name: path.stat().st_size for name, path in videos.items()}}
    for name, values in facts.items():
        identity[name] = hashlib.sha256(json.dumps(sorted(values.items())).encode()).hexdigest()
    return identity


def _first_pass(
    config: PreprocessConfig, videos: Mapping[str, Path], sizes: Sequence[tuple[int, int]], ranks: Ranks
) -> list[Video]:
    """Probes all videos, each on one rank, and returns the results in order."""
    mine = {name: videos[name] for name in list(videos)[ranks.rank :: ranks.size]}
    pass_over = partial(probe_videos, mine, sizes, config.video_size, config.stride, config.clips_per_video)
    found = {video.name: video for part in ranks.gather(partial(pass_over, is_shown=ranks.rank == 0)) for video in part}
    results = [found[name] for name in videos]
    if ranks.rank == 0:
        for video in results:
            if video.fault:
                logger.warning("%s", video.fault)
    return results


def _num_faults(videos: Iterable[Video]) -> int:
    return sum(video.fault is not None for video in videos)


def _check_faults(videos: Sequence[Video], config: PreprocessConfig) -> None:
    """Raises ValueError for videos that cannot be used, unless they are to be skipped."""
    faults = [video.fault for video in videos if video.fault]
    if not faults:
        return
    found = f"{len(faults)} of {len(videos)} videos cannot be used: {listed(faults, '; ')}"
    if config.on_error == "stop":
        raise ValueError(f"{found}. Correct or remove them, or add --on-error skip")
    if len(faults) == len(videos):
        raise ValueError(f"{found}. None is left")
    _check_cap(len(faults), found, config)


def _check_cap(num_skipped: int, found: str, config: PreprocessConfig) -> None:
    if num_skipped > config.max_skipped:
        raise ValueError(f"{found}; --max-skipped {config.max_skipped} allows no more: correct them or raise it")


@dataclass
class Preprocessing:
    """One rank's part of the work after the first pass.

    Attributes:
        num_faults: videos that the first pass left out.
    """

    config: PreprocessConfig
    videos: Mapping[str, Path]
    captions: Mapping[str, str]
    encoder: FootageEncoder
    output: OutputFolder
    ranks: Ranks
    num_faults: int

    def run(self, shards: Sequence[Shard], videos: Sequence[Video]) -> str:
        """Makes this rank's batches, merges its shards and finishes the folder. Returns a sentence about it."""
        rank, size, output = self.ranks.rank, self.ranks.size, self.output
        own = [(shard, batch) for shard in shards for batch in shard.batches][rank::size]
        merged = {shard.name for shard in shards if output.has_shard(shard)}
        missing = [batch for shard, batch in own if shard.name not in merged and not output.has_batch(batch)]
        to_merge = deque(shard for shard in shards[rank::size] if shard.name not in merged)
        self.ranks.wait()  # until the damaged files of all ranks are removed
        started, num_made = time.perf_counter(), 0
        with self._progress(missing) as progress:
            for batch, decoded, faults in _ahead(self._decode, missing, _num_readers()):
                num_made += self._make(batch, decoded, faults)
                progress.advance(len(batch.clips) * size)
                while to_merge and output.is_complete(to_merge[0]):
                    output.merge(to_merge.popleft())
        total = sum(self.ranks.gather(lambda: num_made))
        seconds = time.perf_counter() - started
        self.ranks.together(partial(output.merge_all, to_merge))
        num_skipped = len(self.ranks.on_rank_zero(output.skipped_clips))
        self.ranks.on_rank_zero(lambda: output.finish(shards, videos))
        skipped = self.num_faults + num_skipped
        left_out = f"; {skipped} videos and clips were left out, see {SKIPPED}" if skipped else ""
        return (
            f"{output.out}: {output.num_rows()} clips of {len(videos)} videos, {total} of them made now, "
            f"{total / seconds:.3g} per second{left_out}"
        )

    def _progress(self, missing: Sequence[Batch]) -> ProgressBar:
        """Returns a bar of the clips and the time left, of all ranks, judged by rank 0."""
        total = sum(len(batch.clips) for batch in missing) * self.ranks.size
        return ProgressBar("encoding", total, "clips", is_shown=self.ranks.rank == 0)

    def _decode(self, batch: Batch) -> tuple[Batch, list[tuple[PlannedClip, Clip]], list[SkippedClip]]:
        """Returns the clips of a batch, and those that cannot be decoded."""
        decoded: list[tuple[PlannedClip, Clip]] = []
        faults: list[SkippedClip] = []
        for name, group in groupby(batch.clips, lambda clip: clip.name):
            clips = list(group)
            position = partial(crop_position, name, crop=self.config.crop, seed=self.config.seed)
            path, first = self.videos[name], clips[0].start
            reader = read_clips(path, batch.size, self.config.stride, start=first, position=position)
            num_before = len(decoded)
            try:
                for clip in clips:
                    pixels = next(reader, None)
                    if pixels is None:
                        raise ValueError(f"{path} is damaged: its clip {clip.start.number} has no end")
                    decoded.append((clip, pixels))
            except ValueError as error:
                rest = clips[len(decoded) - num_before :]
                faults += [SkippedClip(clip.name, clip.start.number, str(error)) for clip in rest]
            finally:
                reader.close()
        return batch, decoded, faults

    def _make(self, batch: Batch, decoded: Sequence[tuple[PlannedClip, Clip]], faults: list[SkippedClip]) -> int:
        """Encodes and writes a batch. Returns the number of its rows."""
        rows = self._encode(batch.size, decoded) if decoded else []
        for row, (clip, _) in zip(rows, decoded, strict=True):
            if row.vae_latent is not None and not row.vae_latent.isfinite().all():
                reason = f"{self.videos[clip.name]}: latents of clip {clip.start.number} are not finite"
                faults.append(SkippedClip(clip.name, clip.start.number, f"{reason} in {self.config.dtype}"))
        self._tolerate(faults)
        left_out = {f"{fault.name}-{fault.index:04d}" for fault in faults}
        rows = [row for row in rows if row.id not in left_out]
        self.output.write_batch(batch, rows, faults)
        return len(rows)

    def _tolerate(self, faults: Sequence[SkippedClip]) -> None:
        if not faults:
            return
        if self.config.on_error == "stop":
            raise ValueError(
                f"{faults[0].reason}. All that is made stays; go on with --on-error skip (a corrected copy needs "
                "another --out)"
            )
        for fault in faults:
            logger.warning("clip %d of %s is left out: %s", fault.index, fault.name, fault.reason)
        num_skipped = self.num_faults + len(self.output.skipped_clips()) + len(faults)
        _check_cap(num_skipped, faults[-1].reason, self.config)

    def _encode(self, size: VideoSize, decoded: Sequence[tuple[PlannedClip, Clip]]) -> list[LatentRow]:
        config, dtype = self.config, DTYPES[self.config.dtype]
        pixels_BTHW3 = torch.stack([clip.pixels for _, clip in decoded]).permute(0, 1, 3, 4, 2)
        latents = self.encoder.encode_video(pixels_BTHW3).to("cpu", dtype)
        pictures = self.encoder.encode_pictures(pixels_BTHW3[:, 0], config.num_frames)
        extra = {name: tensor.to("cpu", dtype) for name, tensor in pictures.items()}
        return [
            LatentRow(
                id=planned.id,
                caption=self.captions[planned.name],
                text_embedding=self.encoder.embed_prompt(self.captions[planned.name], config.max_text_tokens).to(dtype),
                vae_latent=latents[index],
                extra={name: tensor[index] for name, tensor in extra.items()},
                file_name=planned.name,
                width=size.width,
                height=size.height,
                num_frames=config.num_frames,
                duration_sec=clip.duration_seconds,
                fps=config.num_frames / clip.duration_seconds,
            )
            for index, (planned, clip) in enumerate(decoded)
        ]


def _num_readers() -> int:
    """Returns the number of threads that decode. Ranks of one machine share its cores."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if num_ranks() > 1 else 1
    return max(1, min(MAX_READERS, (os.cpu_count() or 1) // here))


def _ahead(work: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """Yields the results of `work`, in order, while threads work on the next `num_threads` items."""
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def read_captions(path: Path, folder: Path) -> dict[str, str]:
    """Captions by name below `folder` (`plain_name`), from a table or a folder; raises `ValueError` with the line that
    is wrong."""
    if not path.exists():
        raise ValueError("there is no such captions file; correct the path")
    captions: dict[str, str] = {}
    files = tables.Videos(path, folder)
    for where, video, caption in tables.read_captions(path):
        file = files.find_any(video)
        name = plain_name(video) if file is None else _below(folder, file)
        if name in captions:
            raise ValueError(f"{where}: {name} has a second caption here: keep only one")
        captions[name] = caption
    return captions


def _below(folder: Path, file: Path) -> str:
    """Returns the name of a file below `folder`, also through links; its path, if it is elsewhere."""
    bases, paths = ([Path(os.path.abspath(path)), path.resolve()] for path in (folder, file))
    for path in paths:
        for base in bases:
            if path.is_relative_to(base):
                return plain_name(path.relative_to(base))
    return plain_name(file)


def find_videos(folder: Path, captions: Iterable[str], captions_file: Path) -> dict[str, Path]:
    """Videos below `folder` by relative name, sorted; raises `ValueError` unless they match `captions` one to one."""
    if not folder.is_dir():
        raise ValueError("there is no such folder; name a folder of videos")
    videos = {plain_name(path.relative_to(folder)): path for path in files_below(folder, SUFFIXES)}
    without_video = sorted(set(captions) - set(videos))
    if without_video:
        raise ValueError(f"{captions_file} names {listed(without_video)}: no such video in {folder}")
    without_caption = sorted(set(videos) - set(captions))
    if without_caption:
        raise ValueError(
            f"{folder}: {captions_file} has no caption for {listed(without_caption)}; add them, or remove the files"
        )
    if not videos:
        raise ValueError(f"no video in {folder}: expected files ending in {', '.join(SUFFIXES)}")
    return videos
