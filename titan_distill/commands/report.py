"""`titan-distill report`: the page of a run, or of several runs in the same charts."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from titan_distill.config.paths import of_key
from titan_distill.fault_tolerance.files import format_bytes
from titan_distill.fault_tolerance.outputs import probe_file
from titan_distill.validation.report.page import NAME, write_page

MAX_RUNS = 8
"""Most runs of one page: more can't be told apart by colour."""


def report(folders: Positional[tuple[Path, ...]], out: Path | None = None) -> None:
    """Write the page of a run, or compare several: one HTML file with videos, charts and settings.

    Args:
        folders: Folders of runs, outputs/NAME.
        out: File to write. Default: report.html in the first folder.
    """
    if not folders:
        raise ValueError("FOLDERS is empty; name the folder of a run, outputs/NAME")
    if len(folders) > MAX_RUNS:
        raise ValueError(f"FOLDERS names {len(folders)} runs; one page compares at most {MAX_RUNS}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("FOLDERS names a run twice; name each once")
    for folder in folders:
        if not folder.is_dir():
            with of_key("FOLDERS", folder):
                raise ValueError("there is no such folder; name the folder of a run, outputs/NAME")
    file = folders[0] / NAME if out is None else out
    probe_file(file, "--out", (".html", ".htm"))
    write_page(folders, file)
    print(f"{file} ({format_bytes(file.stat().st_size)}): open it in a browser")
