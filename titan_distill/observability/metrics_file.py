"""``metrics.jsonl``: one JSON object a line, one line a step, flushed at once.

A file that a killed run left behind is good up to its last complete line. Resuming cuts it back to the checkpoint's
step by writing the kept lines beside it and renaming, so a second kill in between loses nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from titan_distill.fault_tolerance.files import atomic


class MetricsFile:
    """Appends to the metrics of a run. Numbers keep full precision; JSON has no NaN, so that becomes null."""

    def __init__(self, path: Path, start_step: int) -> None:
        """Opens ``path`` to go on after ``start_step``; later lines are dropped, all of them for a fresh run."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _complete_lines(path) if start_step > 0 and path.exists() else []
        with atomic(path) as fresh:
            fresh.write_text("".join(line for line in kept if json.loads(line)["step"] <= start_step))
        self._file = path.open("r+")
        self._file.seek(0, os.SEEK_END)
        self._last_start = self._file.tell()
        self._last_line: dict[str, float | None] = {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends the line of ``step``; values of the step that was written last join its line instead."""
        if self._last_line.get("step") == step:
            self._file.seek(self._last_start)
            self._file.truncate()
        else:
            assert not self._last_line or step > (self._last_line["step"] or 0), "steps are logged in order"
            self._last_start = self._file.tell()
            self._last_line = {"step": step}
        self._last_line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(self._last_line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _complete_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
