"""Starts of a run: `starts.jsonl` in the run's folder has one line per start, resumes and restarts included.

`metrics.jsonl` is one curve however often a run was stopped, so it can't tell where a resume was, or on how many ranks.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

from titan_distill.fault_tolerance.files import parse_json

NAME = "starts.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """One line of `starts.jsonl`."""

    time: str
    """ISO 8601, UTC."""
    step: int
    """Steps done before this start."""
    is_restart: bool
    """Whether a scheduler or launcher repeated the start."""
    num_ranks: int
    device: str
    """Name of the GPU, or `cpu`."""
    versions: dict[str, str]
    config_file: str = ""
    """The job's TOML file; empty if all keys came from the command line."""
    changes: list[tuple[str, str, str]] | None = None
    """Keys that differ from the TOML file: key, value of the file, value of the run. None if they are not known."""
    layouts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Degrees of each role's layout."""


def append_start(folder: Path, start: Start) -> None:
    """Adds a line. A failure is logged only, because training does not need the file."""
    try:
        with (folder / NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(start), ensure_ascii=False) + "\n")
    except OSError as error:
        logger.warning("this start is not noted in %s (%s)", folder / NAME, error)


def read_starts(folder: Path) -> list[Start]:
    """Returns the starts of a run in their order, without a last line that is incomplete. Raises ValueError for a file
    that is damaged."""
    path = folder / NAME
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [Start(**parse_json(line)) for line in lines if line.endswith("\n")]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); move it away") from error
