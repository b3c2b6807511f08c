"""Reader of prompts for validation and generation, from text, JSON-lines, CSV or parquet files."""

from __future__ import annotations

from pathlib import Path

from titan_distill.data.parquet import ParquetDataset
from titan_distill.data.tables import READERS, non_empty, read_lines

COLUMNS = {".csv": "prompt", ".jsonl": "caption"}
"""Column of a table's prompts by the file's suffix."""


def read_prompts(path: str | Path, num_prompts: int | None) -> list[str]:
    """The first `num_prompts` prompts, or all, of a .txt (one per line), .jsonl (key `caption`), .csv (column `prompt`)
    or parquet file or folder.

    A shorter file is repeated: the same prompt then starts from other noise. Raises ValueError for a file without
    prompts, that cannot be read, or with a line that is no prompt.
    """
    path = Path(path)
    if path.suffix == ".txt":
        prompts = [line.strip() for _, line in read_lines(path)]
    elif path.suffix in READERS:
        columns = (COLUMNS[path.suffix],)
        rows = READERS[path.suffix](path, columns)
        prompts = [non_empty(where, entry, columns)[0] for where, entry in rows]
    else:
        dataset = ParquetDataset(path)
        prompts = [dataset[index].caption for index in range(min(num_prompts or len(dataset), len(dataset)))]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one per line")
    return [prompts[index % len(prompts)] for index in range(num_prompts or len(prompts))]
