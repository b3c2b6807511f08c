"""Reader of prompts for validation and generation, from text files, tables or parquet files."""

from __future__ import annotations

from collections.abc import Sequence

from titan_distill.data import tables
from titan_distill.data.location import Location, location
from titan_distill.data.parquet import read_captions


def read_prompts(path: str | Location, num_prompts: int | None) -> list[str]:
    """Returns at most the first `num_prompts` prompts, or all prompts, of a file: .txt (one per line), a table
    (`titan_distill.data.tables`), or a parquet file or folder.

    Raises ValueError for a file that can't be read, has no prompts, or has a line that is not a prompt.
    """
    path = location(path)
    if path.suffix.lower() == ".txt":
        prompts = [line.strip() for _, line in tables.read_lines(path)]
    elif tables.is_table(path):
        prompts = list(tables.read_prompts(path))
    else:
        prompts = read_captions(path, num_prompts)
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one per line")
    return prompts[:num_prompts]


def repeated(prompts: Sequence[str], number: int | None) -> list[str]:
    """Returns `number` prompts, from the first one again where there are fewer. A repeated one starts from other
    noise."""
    return [prompts[index % len(prompts)] for index in range(number or len(prompts))]
