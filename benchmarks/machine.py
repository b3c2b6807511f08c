"""The machine of a measurement, for the file with its numbers."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Processor, accelerator, versions, commit and date."""
    commit = ""
    if shutil.which("git"):  # a copied tree may lack git
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, encoding="utf-8", check=False)
        commit = head.stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit,
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes `result` with the machine it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n", encoding="utf-8")


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
