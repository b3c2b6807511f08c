"""The benchmark of preprocessing: both ways encode every clip, and the file says so. Speeds are not asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import preprocessing


def test_both_ways_encode_every_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.json"
    command = ["preprocessing", "--films", "2", "--frames", "48", "--film-size", "32", "48", "--clip-size", "5", "32"]
    monkeypatch.setattr(sys, "argv", [*command, "32", "--batch-size", "2", "--rounds", "1", "--out", str(out)])
    preprocessing.main()
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["num_clips"] == 2 * 3
    assert len(result["rounds"]) == 1 and result["ratio"] > 0 and result["cpu_ratio"] > 0
    assert result["machine"]["num_cores"] >= 1
