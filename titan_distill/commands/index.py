"""`titan-distill data index` makes one table of whatever a folder of videos has as captions.

Each line of the JSON-lines file has `video` and `prompt`. Training (`data.path`), `data preprocess --captions` and
prompts of validation read it. Opening each video is left to those who decode it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from titan_distill.config.paths import of_key
from titan_distill.data.tables import Videos, read_captions
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
    """Writes the table and returns what it holds, in one sentence.

    Raises:
        ValueError: a missing folder, a video without caption or caption without video, an output that exists.
    """
    source = options.folder
    out = options.out or (source if source.is_dir() else source.parent) / INDEX_NAME
    with of_key("FOLDER", source):
        if not source.exists():
            raise ValueError("there is no such folder or table; correct the path")
        lines = list(_lines(source, out.parent))
        if not lines:
            raise ValueError(f"{source} has no rows: write one per video")
    if out.suffix.lower() != ".jsonl":
        raise ValueError(f"--out {out} must end in .jsonl")
    if out.exists():
        raise ValueError(f"{out} exists; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(out) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return f"{out}: {len(lines)} videos with captions"


def _lines(source: Path, base: Path) -> Iterator[str]:
    videos, seen = Videos(source), dict[Path, str]()
    for where, name, caption in read_captions(source):
        video = videos.find(where, name).absolute()
        if video in seen:
            raise ValueError(f"{where}: {name} has a second caption here, after {seen[video]}: keep only one")
        seen[video] = where
        below = video.is_relative_to(base.absolute())
        shown = video.relative_to(base.absolute()) if below else video
        yield json.dumps({"video": shown.as_posix(), "prompt": caption}, ensure_ascii=False)
