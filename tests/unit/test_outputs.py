"""Probes of outputs find what would fail after the work, and leave nothing behind."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from titan_distill.fault_tolerance import outputs
from titan_distill.fault_tolerance.outputs import probe_file, probe_folder


def test_good_outputs_leave_nothing(tmp_path: Path) -> None:
    probe_folder(tmp_path / "a/b/c", "--out")
    probe_file(tmp_path / "d/video.MP4", "--out", (".mp4",))
    (tmp_path / "old.mp4").write_bytes(b"old")
    probe_file(tmp_path / "old.mp4", "--out", (".mp4",))
    assert [path.name for path in tmp_path.iterdir()] == ["old.mp4"]
    assert (tmp_path / "old.mp4").read_bytes() == b"old"


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match=r"job.output_dir = '.*/a/b' cannot be written, because .*/a is a file"):
        probe_folder(tmp_path / "a/b", "job.output_dir")
    with pytest.raises(ValueError, match=r"cannot be written, because .*/a is a file; choose another folder"):
        probe_folder(tmp_path / "a", "job.output_dir")


def test_name_too_long(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be written \(File name too long\)"):
        probe_folder(tmp_path / ("x" * 300), "--out")
    with pytest.raises(ValueError, match=r"cannot be written \(File name too long\)"):
        probe_file(tmp_path / f"{'x' * 300}.mp4", "--out", (".mp4",))


def test_wrong_ending_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--out = '.*x.gif' must end in .mp4; change its ending"):
        probe_file(tmp_path / "x.gif", "--out", (".mp4",))
    (tmp_path / "x.mp4").mkdir()
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        probe_file(tmp_path / "x.mp4", "--out", (".mp4",))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_disk_that_takes_nothing(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root writes everywhere and this disk has room, so the write itself fails here."""

    def refuse(*_: Any) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(outputs.os, "fsync", refuse)
    with pytest.raises(ValueError, match=r"--out = .* cannot be written \(refused\); choose a place with room"):
        probe_folder(tmp_path / "a/b", "--out")
    assert not list(tmp_path.iterdir())
