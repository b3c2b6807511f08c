"""Reader of prompts for validation and generation, from text, JSON-lines, CSV or parquet files."""

from __future__ import annotations

from titan_distill.data.location import Location, location
from titan_distill.data.parquet import read_captions
from titan_distill.data.tables import READERS, non_empty, read_lines

COLUMNS = {".csv": "prompt", ".jsonl": "caption"}
"""Name of the column (or key) with the prompts, by the file's suffix."""


def read_prompts(path: str | Location, num_prompts: int | None) -> list[str]:
    """Returns the first `num_prompts` prompts, or all prompts, of a file: .txt (one per line), .jsonl (key `caption`),
    .csv (column `prompt`), or a parquet file or folder.

    If the file has fewer prompts they are repeated; a repeated prompt starts from other noise. Raises ValueError for a
    file that can't be read, has no prompts, or has a line that is not a prompt.
    """
    path = location(path)
    kind = path.suffix.lower()
    if kind == ".txt":
        prompts = [line.strip() for _, line in read_lines(path)]
    elif kind in READERS:
        columns = (COLUMNS[kind],)
        rows = READERS[kind](path, columns)
        prompts = [non_empty(where, entry, columns)[0] for where, entry in rows]
    else:
        prompts = read_captions(path, num_prompts)
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one per line")
    return [prompts[index % len(prompts)] for index in range(num_prompts or len(prompts))]
