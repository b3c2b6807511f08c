"""Rank 0 takes its time over a validation's contact sheet: for `job.imports`.

Seconds by name of the step's folder; a file of that name says that it has begun.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from titan_distill.validation import validator

SECONDS = {"step-00000001": 9.0, "step-00000002": 600.0}

_draw = validator.contact_sheet


def draw_slowly(path: Path, *arguments: Any) -> None:
    _draw(path, *arguments)
    if (seconds := SECONDS.get(path.parent.name)) is not None:
        (Path(os.environ["SLOW_REPORT_FOLDER"]) / path.parent.name).touch()
        time.sleep(seconds)


if "SLOW_REPORT_FOLDER" in os.environ:  # in a run, and not where a test reads `SECONDS`
    validator.contact_sheet = draw_slowly
