"""`titan-distill data index` makes one table of whatever a folder of videos has as captions.

Each line of the JSON-lines file has `video` and `prompt`. Training (`data.path`), `data preprocess --captions` and
prompts of validation read it. Opening each video is left to those who decode it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro

from titan_distill.config.paths import of_key
from titan_distill.data.folders import files_below
from titan_distill.data.footage import SUFFIXES
from titan_distill.data.tables import Videos, listed, read_captions
from titan_distill.fault_tolerance.files import atomic

INDEX_NAME = "index.jsonl"


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Options of `titan-distill data index`."""

    folder: tyro.conf.Positional[Path]
    """Folder of videos with a .txt beside each, or with metadata.csv, metadata.jsonl or videos2caption.json; or a table
    of videos and captions (.csv, .tsv, .jsonl, .json)."""
    out: Path | None = None
    """JSON-lines file to write; must not exist. Default: index.jsonl in the folder, or beside the table."""


def index(options: IndexOptions) -> str:
    """Writes the table and returns what it holds, and which videos of the folder it lacks, in one sentence.

    Raises:
        ValueError: a missing folder, a video without caption or caption without video, an output that exists.
    """
    source = options.folder
    out = options.out or (source if source.is_dir() else source.parent) / INDEX_NAME
    with of_key("FOLDER", source):
        if not source.exists():
            raise ValueError("there is no such folder or table; correct the path")
        captions = _captions(source)
        if not captions:
            raise ValueError(f"{source} has no rows: write one per video")
    if out.suffix.lower() != ".jsonl":
        raise ValueError(f"--out {out} must end in .jsonl")
    if out.exists():
        raise ValueError(f"{out} exists; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(out) as temporary:
        temporary.write_text("".join(_lines(captions, Path(os.path.abspath(out.parent)))), encoding="utf-8")
    videos = files_below(source, SUFFIXES) if source.is_dir() else []
    others = [str(video) for video in videos if os.path.abspath(video) not in captions]
    lacking = f"; {len(others)} videos have no caption there and are left out: {listed(others)}" if others else ""
    return f"{out}: {len(captions)} videos with captions{lacking}"


def _captions(source: Path) -> dict[str, str]:
    """Returns the captions by absolute path of the video."""
    videos, captions, places = Videos(source), dict[str, str](), dict[str, str]()
    for where, name, caption in read_captions(source):
        video = os.path.abspath(videos.find(where, name))
        if video in captions:
            raise ValueError(f"{where}: {name} has a second caption here, after {places[video]}: keep only one")
        captions[video], places[video] = caption, where
    return captions


def _lines(captions: Mapping[str, str], base: Path) -> Iterator[str]:
    for video, caption in captions.items():
        path = Path(video)
        shown = path.relative_to(base) if path.is_relative_to(base) else path
        yield json.dumps({"video": shown.as_posix(), "prompt": caption}, ensure_ascii=False) + "\n"
