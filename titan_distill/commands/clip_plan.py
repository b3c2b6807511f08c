"""Plan of `titan-distill data preprocess`: the clips of all videos, and the batches and files that they go to.

The plan depends on the videos and the options alone, so every rank of every start makes the same one: the clips of one
shape, sorted by video and place, are cut into batches of `batch_size`, and the batches into *shards*, one file each. A
batch is encoded as a whole or not at all. Rounding in the VAE may depend on the batch, so the rows are the same bytes
on any number of ranks and wherever a run was cut.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar

from tqdm import tqdm

from titan_distill.data.footage import CENTRE, ClipStart, Position, VideoSize
from titan_distill.data.probe import clip_starts, probe
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.fault_tolerance.files import atomic, parse_json

SHARD_CLIPS = 256
"""Clips per file of the output, about: 1 GB of latents at 81 × 480 × 832."""
PROBES_AT_ONCE = 8
"""Videos that a rank probes at once. A probe waits for the disk most of its time."""

Crop = Literal["centre", "random"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Video:
    """Result of probing one video."""

    name: str
    """Name below the folder of videos."""
    height: int = 0
    """Height of its clips, from the aspect bucket, in pixels."""
    width: int = 0
    """Width of its clips, likewise."""
    origin: float = 0.0
    """Start of the first frame in seconds."""
    clips: tuple[float, ...] = ()
    """Start of each clip in seconds."""
    fault: str | None = None
    """Reason for which the video cannot be used."""


@dataclass(frozen=True)
class PlannedClip:
    """One clip to encode."""

    name: str
    start: ClipStart

    @property
    def id(self) -> str:
        """Id of its row."""
        return f"{self.name}-{self.start.number:04d}"


@dataclass(frozen=True)
class Batch:
    """Clips of one shape that the VAE encodes together."""

    name: str
    size: VideoSize
    clips: tuple[PlannedClip, ...]


@dataclass(frozen=True)
class Shard:
    """Batches whose rows go to one file of the output."""

    name: str
    batches: tuple[Batch, ...]


def parse_sizes(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Returns the aspect buckets (height, width). Raises ValueError for a text that is no size."""
    sizes = []
    for text in texts:
        parts = text.split("x")
        if len(parts) != 2 or not all(part.isascii() and part.isdecimal() for part in parts):
            raise ValueError(f"--sizes {text!r} is no size; write height and width in pixels, such as 480x832")
        sizes.append((int(parts[0]), int(parts[1])))
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"--sizes {' '.join(texts)} names a size twice; remove one")
    return sizes


def nearest_size(height: float, width: float, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns the aspect bucket whose aspect ratio is nearest to a picture's; the first of several."""
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - math.log(width / height)))


def probe_videos(
    videos: Mapping[str, Path],
    sizes: Sequence[tuple[int, int]],
    make_size: Callable[[int, int], VideoSize],
    stride: int | None,
    clips_per_video: int | None,
    *,
    is_shown: bool,
) -> list[Video]:
    """Probes videos, several at once, and returns the results in order. `is_shown` shows the progress."""

    def probed(name: str, path: Path) -> Video:
        try:
            facts = probe(path)
            size = nearest_size(facts.height, facts.width, sizes)
            clips = clip_starts(path, facts, make_size(*size), stride)[:clips_per_video]
            return Video(name, *size, facts.starts[0], tuple(clips))
        except ValueError as error:
            return Video(name, fault=str(error))

    with ThreadPoolExecutor(PROBES_AT_ONCE) as pool:
        results = pool.map(probed, videos, videos.values())
        return list(tqdm(results, "probing", len(videos), unit="video", disable=None if is_shown else True))


def write_videos(path: Path, videos: Iterable[Video]) -> None:
    """Writes the results of the probes, one JSON object per line."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(video), ensure_ascii=False) + "\n" for video in videos)


def read_videos(path: Path) -> list[Video]:
    """Reads what `write_videos` wrote. Raises ValueError for a damaged file."""
    try:
        with path.open(encoding="utf-8") as file:
            entries = [parse_json(line) for line in file]
        return [Video(**{**entry, "clips": tuple(entry["clips"])}) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the videos are probed again") from error


def make_shards(videos: Iterable[Video], make_size: Callable[[int, int], VideoSize], batch_size: int) -> list[Shard]:
    """Returns the files to write, shape by shape."""
    clips: dict[tuple[int, int], list[PlannedClip]] = defaultdict(list)
    for video in videos:
        starts = (ClipStart(index, video.origin, seconds) for index, seconds in enumerate(video.clips))
        clips[video.height, video.width] += [PlannedClip(video.name, start) for start in starts]
    return [shard for size in sorted(clips) for shard in _shards(make_size(*size), clips[size], batch_size)]


def _shards(size: VideoSize, clips: list[PlannedClip], batch_size: int) -> Iterator[Shard]:
    shape = f"{size.num_frames}x{size.height}x{size.width}"
    batches = (Batch(f"{shape}-{number:07d}", size, run) for number, run in enumerate(_runs(clips, batch_size)))
    for number, run in enumerate(_runs(batches, max(1, SHARD_CLIPS // batch_size))):
        yield Shard(f"clips-{shape}-{number:05d}", run)


def _runs(items: Iterable[Item], length: int) -> Iterator[tuple[Item, ...]]:
    remaining = iter(items)
    while run := tuple(itertools.islice(remaining, length)):
        yield run


def crop_position(name: str, index: int, crop: Crop, seed: int) -> Position:
    """Returns the place of the crop of a video's clip. A random one depends on the seed, the video and the number of
    the clip."""
    if crop == "centre":
        return CENTRE
    video = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    top, left = (KeyedNoise(seed).uniform(f"crop/{axis}", index, [video]).item() for axis in ("top", "left"))
    return top, left
