"""The benchmark of reading data: both ways read every row, and the file says so. Speeds are not asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import data_loading


def test_both_ways_read_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, folder, threads = tmp_path / "result.json", tmp_path / "rows", torch.get_num_threads()
    command = ["data_loading", "--rows", "500", "--batch-size", "7", "--folder", str(folder), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    try:
        data_loading.main()
    finally:
        torch.set_num_threads(threads)
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["num_rows"] == result["distinct_rows"] == 500
    assert len(result["tenths"]) == 10 and result["ratio"] > 0
    rows = list(data_loading.plain_rows(folder))
    assert [caption for caption, _ in rows] == [str(index) for index in range(500)]
    assert {tuple(latent.shape) for _, (latent, _) in rows} == {data_loading.LATENT_SHAPE}
    monkeypatch.setattr(sys, "argv", [*command[:2], "400", *command[3:]])
    with pytest.raises(SystemExit):
        data_loading.main()
