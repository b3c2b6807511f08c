"""Prompts for validation and generation, from whatever file they are kept in."""

from __future__ import annotations

import json
from pathlib import Path

from titan_distill.data.parquet import ParquetDataset


def read_prompts(path: str | Path, num_prompts: int) -> list[str]:
    """The first ``num_prompts`` prompts of a .txt (one a line), .jsonl (key ``caption``) or parquet file or folder.

    A shorter file is repeated: the same prompt then starts from other noise. Raises ValueError for a file without
    prompts.
    """
    path = Path(path)
    if path.suffix in (".txt", ".jsonl"):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = lines if path.suffix == ".txt" else [_caption(line, path, i) for i, line in enumerate(lines, 1)]
    else:
        dataset = ParquetDataset(path)
        prompts = [dataset[index].caption for index in range(min(num_prompts, len(dataset)))]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return [prompts[index % len(prompts)] for index in range(num_prompts)]


def _caption(line: str, path: Path, number: int) -> str:
    try:
        return str(json.loads(line)["caption"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path}, line {number}: expected a JSON object with a "caption", got {line[:80]!r}'
        ) from error
