"""Identity of training data: the same for a copy elsewhere, another for other files, and no row is read for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import toy_family

from titan_distill.data.footage import VideoSize
from titan_distill.data.parquet import LatentRow, ParquetDataset, write_rows
from titan_distill.data.videos import VideoDataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, num_rows in (("a", 5), ("b", 40)):
        toy_family.write_data(tmp_path / "data" / f"{name}.parquet", num_rows)
    return tmp_path / "data"


def digest(path: Path) -> str:
    return ParquetDataset(path).digest


def test_of_a_copy_elsewhere_at_another_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(folder)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    os.utime(copy / "a.parquet", (1, 1))
    (copy / "notes.txt").write_text("no data")
    monkeypatch.chdir(tmp_path)
    assert digest(copy) == digest(Path("copy")) == before
    one = digest(folder / "b.parquet")
    assert one == digest(Path(shutil.move(folder / "b.parquet", tmp_path / "renamed.parquet"))) != before


def add_row(folder: Path) -> None:
    toy_family.write_data(folder / "b.parquet", 41)


def add_file(folder: Path) -> None:
    shutil.copy(folder / "a.parquet", folder / "c.parquet")


def exchange_names(folder: Path) -> None:
    (folder / "a.parquet").rename(folder / "c.parquet")


def same_size_other_caption(folder: Path) -> None:
    """As many bytes and rows; the footer has the column's least and greatest caption."""
    rows = [ParquetDataset(folder / "a.parquet")[index] for index in range(5)]
    size = (folder / "a.parquet").stat().st_size
    write_rows(folder / "a.parquet", [LatentRow(r.id, "b sample", r.text_embedding, r.vae_latent) for r in rows])
    assert (folder / "a.parquet").stat().st_size == size


@pytest.mark.parametrize("change", [add_row, add_file, exchange_names, same_size_other_caption])
def test_of_other_files(folder: Path, change: Callable[[Path], None]) -> None:
    before = digest(folder)
    change(folder)
    assert digest(folder) != before


def test_reads_no_rows(folder: Path) -> None:
    """A byte between the header and the footer may change: that is the page checksums' to find."""
    before, file = digest(folder), folder / "b.parquet"
    content = bytearray(file.read_bytes())
    content[100] ^= 255
    file.write_bytes(content)
    assert digest(folder) == before


def test_of_a_table_of_videos(tmp_path: Path) -> None:
    """Prompts, names and sizes of the videos; for a job that wants no videos the prompts alone."""

    def table(name: str, *rows: str) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        for video, num_bytes in (("x.mp4", 10), ("y.mp4", 20)):
            (tmp_path / name / video).write_bytes(bytes(num_bytes))
        (tmp_path / name / "rows.csv").write_text("\n".join(["video,prompt", *rows]))
        return tmp_path / name / "rows.csv"

    def digests(path: Path) -> list[str]:
        return [VideoDataset(path, size).digest for size in (VideoSize(1, 16, 16), None)]

    rows = ("x.mp4,one", "y.mp4,two")
    first = digests(table("first", *rows))
    assert digests(table("moved", *rows)) == first
    absolute = table("absolute", f"{tmp_path}/absolute/x.mp4,one", f"{tmp_path}/absolute/y.mp4,two")
    assert digests(absolute) == first
    assert all(a != b for a, b in zip(first, digests(table("order", *reversed(rows))), strict=True))
    assert all(a != b for a, b in zip(first, digests(table("prompt", "x.mp4,one", "y.mp4,three")), strict=True))
    changed = table("size", *rows)
    (changed.parent / "y.mp4").write_bytes(bytes(21))
    assert digests(changed)[0] != first[0] and digests(changed)[1] == first[1]
