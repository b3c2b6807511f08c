"""Files of a suite's results, none of which a kill can take back."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class RowFile:
    """`rows.jsonl`: one JSON object per line, on disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self.rows: list[Row] = []

    def append(self, row: Row) -> None:
        self.rows.append(row)
        self._file.write(json.dumps(row, default=str) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Replaces a file so that readers see the old text or the new, also after a kill."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def pack_logs(folder: Path, path: Path) -> None:
    """Replaces `path` by an archive of the files of `folder`."""
    partial = path.with_name(path.name + ".part")
    with tarfile.open(partial, "w:gz") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, file.name)
    partial.replace(path)


def tail(path: Path, num_characters: int = 2000) -> str:
    """Return the end of a log; empty when there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4 * num_characters))
        return file.read().decode("utf-8", "replace")[-num_characters:].strip()
