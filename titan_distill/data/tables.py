"""Readers of text, CSV and JSON-lines files: row by row, with each row's place for messages."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from titan_distill.data.location import Location
from titan_distill.fault_tolerance.files import parse_json


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


def read_csv(path: Location, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each row as ("<path>, line n", values by column), further columns included.

    Raises:
        ValueError: the file can't be read, is not CSV, or lacks one of `columns`.
    """
    reader = csv.DictReader(io.StringIO(read_text(path)))
    try:
        if not set(columns) <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} has the columns {reader.fieldnames}: expected {' and '.join(columns)}")
        for entry in reader:
            yield f"{path}, line {reader.line_num}", entry
    except csv.Error as error:
        raise ValueError(f"{path}, after line {reader.line_num}: not CSV ({error})") from error


def read_lines(path: Location) -> Iterator[tuple[str, str]]:
    """Yields each non-blank line as ("<path>, line n", line). Raises ValueError like `read_text`."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", line


def read_jsonl(path: Location, keys: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each line of a file of JSON objects as ("<path>, line n", values by key).

    Raises:
        ValueError: the file can't be read, or a line is not a JSON object; the message names `keys`.
    """
    for where, line in read_lines(path):
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected a JSON object with {' and '.join(keys)}, found {line[:80]!r}")
        yield where, entry


READERS = {".csv": read_csv, ".jsonl": read_jsonl}
"""Reader of a table by its file's suffix: (path, columns) -> rows."""


def non_empty(where: str, entry: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """Returns the values of `columns`. Raises ValueError if one is missing or blank."""
    values = [entry.get(column) for column in columns]
    found = [value for value in values if isinstance(value, str) and value.strip()]
    if len(found) < len(columns):
        raise ValueError(f"{where}: expected a non-empty {' and '.join(columns)}, found {str(entry)[:200]}")
    return found
