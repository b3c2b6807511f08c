"""Output folder of `titan-distill data preprocess`: files of finished batches, their merging, and what was skipped.

Until the last clip is there, everything is in the subfolder `unfinished`, so nobody trains on half a set. A batch is
one small file there; a batch without its file is made again, so a kill loses the batches that were being made and
nothing else. When all batches of a shard are there, their rows become one file and theirs are removed, which bounds the
number of files. In the end the shards move into the output folder, beside

- `preprocess.json`: the identity of the set, that is the options, and digests of encoders, videos and captions. Clips
  of another identity are refused in the same folder.
- `skipped.csv`: every video that was left out, whole or in part, with the reason.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from titan_distill.commands.clip_plan import Batch, Shard, Video, read_videos, write_videos
from titan_distill.data.folders import UNFINISHED, VIDEOS
from titan_distill.data.parquet import LatentRow, ParquetDataset, extra_names, write_rows
from titan_distill.data.row_groups import parquet_files
from titan_distill.fault_tolerance.files import atomic, parse_json, temporary_beside

SETTINGS = "preprocess.json"
SKIPPED = "skipped.csv"
DIGESTS = ("captions", "videos")
"""Settings that stand for all captions and all videos, as digests."""


@dataclass(frozen=True)
class SkippedClip:
    """A clip that could not be used."""

    name: str
    """Name of its video below the folder of videos."""
    index: int
    """Number of the clip in its video."""
    reason: str


class OutputFolder:
    """The output folder `out`."""

    def __init__(self, out: Path) -> None:
        self.out, self._unfinished = out, out / UNFINISHED

    @property
    def is_finished(self) -> bool:
        """Whether all clips are there."""
        return (self.out / SETTINGS).is_file() and not self._unfinished.is_dir()

    def check_origin(self) -> None:
        """Raises ValueError if the folder has parquet files of another command."""
        if not (self.out / SETTINGS).is_file() and (files := parquet_files(self.out)):
            raise ValueError(f"{files[0]} exists and {SETTINGS} does not; choose another folder for --out")

    def check_identity(self, settings: Mapping[str, Any]) -> None:
        """Raises ValueError, with both values, if the folder has clips of other settings."""
        file = self.out / SETTINGS
        self.check_origin()
        if not file.is_file():
            return
        try:
            found = dict(parse_json(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} can't be read ({error}); choose another --out") from error
        for name in {**found, **settings}:
            if found.get(name) == settings.get(name):
                continue
            if name in DIGESTS:
                raise ValueError(
                    f"{self.out} holds clips of other {name}: some were added, removed or changed since; restore them, "
                    "or choose another --out (data.sources takes several sets)"
                )
            raise ValueError(
                f"{self.out} holds clips made with {name} = {_shown(found.get(name))}, not "
                f"{_shown(settings.get(name))}; choose another --out or the same {name}"
            )

    def stored_videos(self) -> list[Video] | None:
        """Removes what a kill left behind, and returns the results of the first pass; None if it has to be made."""
        for path in (*self.out.glob("*.tmp-*"), *self._unfinished.glob("*.tmp-*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        file = self._unfinished / VIDEOS
        return read_videos(file) if file.is_file() else None

    def start(self, settings: Mapping[str, Any], videos: Iterable[Video]) -> None:
        """Records the result of the first pass and the identity."""
        self._unfinished.mkdir(parents=True, exist_ok=True)
        write_videos(self._unfinished / VIDEOS, videos)
        with atomic(self.out / SETTINGS) as temporary:
            temporary.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def has_shard(self, shard: Shard) -> bool:
        """Whether the rows of a shard are in one file."""
        return self._merged(shard).is_file() or (self.out / f"{shard.name}.parquet").is_file()

    def has_batch(self, batch: Batch) -> bool:
        """Whether a batch is there and whole. A file that a power cut damaged is removed."""
        num_rows, path = len(batch.clips) - len(self._skipped(batch)), self._part(batch)
        if not num_rows:
            return True
        try:
            is_whole = path.is_file() and pq.read_metadata(path).num_rows == num_rows
        except (pa.ArrowException, OSError):
            is_whole = False
        if not is_whole:
            path.unlink(missing_ok=True)
        return is_whole

    def is_complete(self, shard: Shard) -> bool:
        """Whether all batches of a shard are there."""
        return all(
            self._part(batch).is_file() or len(self._skipped(batch)) == len(batch.clips) for batch in shard.batches
        )

    def write_batch(self, batch: Batch, rows: Iterable[LatentRow], skipped: list[SkippedClip]) -> None:
        """Writes the rows of a batch, and first what is not among them."""
        if skipped:
            with atomic(self._skip_file(batch)) as temporary:
                text = json.dumps([[clip.index, clip.name, clip.reason] for clip in skipped], ensure_ascii=False)
                temporary.write_text(text, encoding="utf-8")
        if len(skipped) < len(batch.clips):
            write_rows(self._part(batch), rows)

    def merge(self, shard: Shard) -> None:
        """Puts the rows of a shard's batches into one file and removes theirs."""
        parts = [part for batch in shard.batches if (part := self._part(batch)).is_file()]
        if parts:
            datasets = (ParquetDataset(part, tensors=extra_names(part)) for part in parts)
            write_rows(self._merged(shard), (dataset[row] for dataset in datasets for row in range(len(dataset))))
        for part in parts:
            part.unlink()

    def merge_all(self, shards: Iterable[Shard]) -> None:
        """Merges several shards."""
        for shard in shards:
            self.merge(shard)

    def skipped_clips(self) -> list[SkippedClip]:
        """Returns the clips that could not be decoded, of all ranks."""
        files = sorted(self._unfinished.glob("*.skipped.json"))
        return [clip for file in files for clip in _read_skipped(file)]

    def finish(self, shards: Iterable[Shard], videos: Iterable[Video]) -> None:
        """Moves all shards into the output folder and lists what was skipped."""
        self._write_skipped(list(videos))
        for shard in shards:
            if (merged := self._merged(shard)).is_file():
                merged.replace(self.out / merged.name)
        # Renamed first: half a folder would look like an interrupted job.
        self._unfinished.rename(done := temporary_beside(self._unfinished))
        shutil.rmtree(done)

    def num_rows(self) -> int:
        """Returns the number of clips in the finished files."""
        return sum(pq.read_metadata(file).num_rows for file in parquet_files(self.out))

    def _write_skipped(self, videos: list[Video]) -> None:
        num_clips = {video.name: len(video.clips) for video in videos}
        rows: dict[str, list[Any]] = {video.name: [video.name, "all", video.fault] for video in videos if video.fault}
        of_video: dict[str, list[SkippedClip]] = defaultdict(list)
        for clip in self.skipped_clips():
            of_video[clip.name].append(clip)
        for name, own in of_video.items():
            rows[name] = [name, f"{len(own)} of {num_clips[name]}", own[0].reason]
        with atomic(self.out / SKIPPED) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["file_name", "clips", "reason"], *(rows[name] for name in sorted(rows))])

    def _skipped(self, batch: Batch) -> list[SkippedClip]:
        file = self._skip_file(batch)
        return _read_skipped(file) if file.is_file() else []

    def _skip_file(self, batch: Batch) -> Path:
        return self._unfinished / f"{batch.name}.skipped.json"

    def _part(self, batch: Batch) -> Path:
        return self._unfinished / f"{batch.name}.parquet"

    def _merged(self, shard: Shard) -> Path:
        return self._unfinished / f"{shard.name}.parquet"


def _read_skipped(file: Path) -> list[SkippedClip]:
    entries = parse_json(file.read_text(encoding="utf-8"))
    return [SkippedClip(name, index, reason) for index, name, reason in entries]


def _shown(value: Any) -> str:
    if value is None:
        return "(no such setting)"
    return str(value)[:60]
