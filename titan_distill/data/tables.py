"""Reader of tables of videos and captions: CSV, TSV, JSON lines, `videos2caption.json`, or a folder of videos.

All commands read tables here, so they accept the same formats and column names. A folder has a `.txt` beside each
video, or one table: Hugging Face's `metadata.csv` or `metadata.jsonl`, or FastVideo's `videos2caption.json`.
Names of videos are relative to the table, or to a folder `videos` beside it, or absolute.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from titan_distill.config.sections import TABLE_SUFFIXES
from titan_distill.data.folders import NameFinder, files_below
from titan_distill.data.footage import SUFFIXES
from titan_distill.data.location import Location
from titan_distill.fault_tolerance.files import parse_json

VIDEO_COLUMNS = ("video", "file_name", "path", "video_path", "filename")
CAPTION_COLUMNS = ("prompt", "caption", "text", "cap")
_PAIRS = (("video", "prompt"), ("file_name", "caption"))
"""Columns that are taken together where a table also has others."""

TABLES_IN_FOLDER = ("metadata.csv", "metadata.jsonl", "videos2caption.json")

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """A row of a table. `where` is "<path>, line n" (of JSON: "<path>, entry n"), for messages."""

    where: str
    values: dict[str, Any]


def read_text(path: Location) -> str:
    """Returns the text of a file, with all line ends as `\\n`. Raises ValueError if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not valid UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error


def read_lines(path: Location) -> Iterator[tuple[str, str]]:
    """Yields each non-blank line as ("<path>, line n", line). Raises ValueError like `read_text`."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", line


def is_table(path: Location) -> bool:
    """Returns whether a path is a table by its suffix."""
    return path.suffix.lower() in TABLE_SUFFIXES


def read_rows(path: Location) -> Iterator[Row]:
    """Yields the rows of a table file with the columns (or keys) that it has.

    Raises:
        ValueError: the file can't be read, or a row is not what its format demands.
    """
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return _read_csv(path, "\t" if kind == ".tsv" else ",")
    if kind == ".jsonl":
        return _read_jsonl(path)
    if kind == ".json":
        return _read_json(path)
    raise ValueError(f"{path} ends in {path.suffix!r}: expected {', '.join(TABLE_SUFFIXES)}")


def _read_csv(path: Location, delimiter: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(read_text(path)), delimiter=delimiter, strict=True)
    try:
        if reader.fieldnames is None:
            raise ValueError(f"{path} is empty: expected a line with the names of the columns and a line per video")
        for entry in reader:
            where = f"{path}, line {reader.line_num}"
            if any(entry.get(None, ())):  # a caption with a comma would lose its end
                raise ValueError(
                    f"{where}: there are more values than the {len(reader.fieldnames)} columns; put a text with "
                    f"{delimiter!r} in quotes"
                )
            yield Row(where, entry)
    except csv.Error as error:
        raise ValueError(
            f"{path}, after line {reader.line_num}: not {path.suffix[1:].upper()} ({error}); end each text in quotes "
            "with quotes, and double those inside it"
        ) from error


def _read_jsonl(path: Location) -> Iterator[Row]:
    for where, line in read_lines(path):
        yield Row(where, _object(where, _parsed(where, line)))


def _read_json(path: Location) -> Iterator[Row]:
    entries = _parsed(str(path), read_text(path))
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a JSON list of objects, one per video, found {str(entries)[:80]!r}")
    for number, entry in enumerate(entries):
        yield Row(f"{path}, entry {number}", _object(f"{path}, entry {number}", entry))


def _parsed(where: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error


def _object(where: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected a JSON object with a video and its caption, found {str(entry)[:80]!r}")
    return entry


class Columns:
    """Finds the columns of videos and captions among those that a table has. The log says which ones are not read."""

    def __init__(self, *groups: Sequence[str]) -> None:
        self._groups = groups
        self._found: dict[tuple[str, ...], tuple[str, ...]] = {}

    def values(self, row: Row) -> list[str]:
        """Returns one value per group of column names.

        A list of captions stands for its first one. Raises ValueError if a column is missing, if several could be
        meant, or if a value is blank.
        """
        names = tuple(name for name in row.values if isinstance(name, str))
        if names not in self._found:
            self._found[names] = tuple(self._column(row.where, names, group) for group in self._groups)
        columns = self._found[names]
        return non_empty(row.where, {name: _first(row.values[name]) for name in columns}, columns)

    def _column(self, where: str, names: tuple[str, ...], group: Sequence[str]) -> str:
        found = [name for name in group if name in names]
        if not found:
            raise ValueError(
                f"{where}: there is no {' or '.join(group)} among the columns {', '.join(names)}; rename "
                "the one that is meant"
            )
        if len(found) == 1:
            return found[0]
        for pair in _PAIRS:
            if set(pair) <= set(names):
                (name,) = set(pair) & set(group)
                others = ", ".join(other for other in found if other != name)
                logger.warning("%s: the column %s is read, and not %s", where, name, others)
                return name
        raise ValueError(f"{where}: {' and '.join(found)} could both be meant; rename those that are not")


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def non_empty(where: str, entry: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """Returns the values of `columns`. Raises ValueError if one is missing or blank."""
    values = [entry.get(column) for column in columns]
    found = [value for value in values if isinstance(value, str) and value.strip()]
    if len(found) < len(columns):
        raise ValueError(f"{where}: expected a non-empty {' and '.join(columns)}, found {str(entry)[:200]}")
    return found


class Captioned(NamedTuple):
    """A video as a table names it, and its caption."""

    where: str
    video: str
    caption: str


def read_captions(path: Path) -> Iterator[Captioned]:
    """Yields the rows of a table, or of a folder of videos.

    Raises:
        ValueError: as `read_rows`, for a row without video or caption, and for a folder with videos without captions.
    """
    if path.is_dir():
        table = next((path / name for name in TABLES_IN_FOLDER if (path / name).is_file()), None)
        yield from _beside(path) if table is None else read_captions(table)
        return
    columns = Columns(VIDEO_COLUMNS, CAPTION_COLUMNS)
    for row in read_rows(path):
        yield Captioned(row.where, *columns.values(row))


def read_prompts(path: Location) -> Iterator[str]:
    """Yields the captions of a table that need not name videos. Raises ValueError as `read_captions`."""
    columns = Columns(CAPTION_COLUMNS)
    for row in read_rows(path):
        yield columns.values(row)[0]


def _beside(folder: Path) -> Iterator[Captioned]:
    videos = files_below(folder, SUFFIXES)
    if not videos:
        raise ValueError(f"no video in {folder}: expected files ending in {', '.join(SUFFIXES)}")
    without = [video for video in videos if not video.with_suffix(".txt").is_file()]
    if without:
        names = listed([video.relative_to(folder).as_posix() for video in without])
        raise ValueError(
            f"{folder} has neither {' nor '.join(TABLES_IN_FOLDER)}, nor a .txt with the caption beside {names}; add "
            "captions, or remove the videos"
        )
    for video in videos:
        text = video.with_suffix(".txt")
        caption = " ".join(read_text(text).split())
        if not caption:
            raise ValueError(f"{text} is empty: expected the caption of {video.name}")
        yield Captioned(str(text), video.relative_to(folder).as_posix(), caption)


def listed(names: Collection[str], separator: str = ", ") -> str:
    """Returns the first three names and the number of the others."""
    first = list(names)[:3]
    return separator.join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class Videos:
    """Finds the video files that a table names. `path` is the table, or its folder; names may also be relative to
    `folder`, which goes first."""

    def __init__(self, path: Path, folder: Path | None = None) -> None:
        self._folder = path if path.is_dir() else path.parent
        self._folders = (*([] if folder is None else [folder]), self._folder, self._folder / "videos")
        self._finder = NameFinder()

    def find(self, where: str, name: str) -> Path:
        """Returns the file. Raises ValueError if there is none."""
        if (video := self.find_any(name)) is None:
            raise ValueError(
                f"{where}: there is no file {self._folder / name}; correct the path, which is absolute or relative to "
                "the table"
            )
        return video

    def find_any(self, name: str) -> Path | None:
        """Returns the file; None if there is none."""
        return next((video for folder in self._folders if (video := self._finder.find(folder / name))), None)
