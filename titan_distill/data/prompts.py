"""Prompts for validation and generation, from whatever file they are kept in."""

from __future__ import annotations

import json
from pathlib import Path

from titan_distill.data.parquet import ParquetDataset
from titan_distill.data.tables import non_empty, read_csv, read_text


def read_prompts(path: str | Path, num_prompts: int | None) -> list[str]:
    """The first `num_prompts` prompts, or all, of a .txt (one a line), .jsonl (key `caption`), .csv (column
    `prompt`) or parquet file or folder.

    A shorter file is repeated: the same prompt then starts from other noise. Raises ValueError for a file without
    prompts, that cannot be read, or with a line that is no prompt.
    """
    path = Path(path)
    if path.suffix in (".txt", ".jsonl"):
        lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
        is_text = path.suffix == ".txt"
        prompts = [line.strip() if is_text else _caption(line, f"{path}, line {number}") for number, line in lines]
    elif path.suffix == ".csv":
        prompts = [non_empty(where, entry, ("prompt",))[0] for where, entry in read_csv(path, ("prompt",))]
    else:
        dataset = ParquetDataset(path)
        prompts = [dataset[index].caption for index in range(min(num_prompts or len(dataset), len(dataset)))]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return [prompts[index % len(prompts)] for index in range(num_prompts or len(prompts))]


def _caption(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    caption = entry.get("caption") if isinstance(entry, dict) else None
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f'{where}: expected a JSON object with a non-empty "caption", got {line[:80]!r}')
    return caption
