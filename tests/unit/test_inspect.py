"""`data inspect`: sizes, lengths, statistics by channel, and a contact sheet of decoded rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import fastvideo_data
import numpy as np
import pytest
import torch
from PIL import Image
from runs import TINY_WAN

from titan_distill import cli
from titan_distill.commands.inspect_data import write_sheet
from titan_distill.data.parquet import LatentRow, write_rows
from titan_distill.data.summary import inspect
from titan_distill.models.wan.vae import stored_statistics


def row(index: int, height: int = 4, width: int = 6) -> LatentRow:
    generator = torch.Generator().manual_seed(index)
    latent = torch.randn(16, 2, height, width, generator=generator) * torch.linspace(0.5, 2, 16).view(16, 1, 1, 1)
    return LatentRow(
        f"row-{index}", f"caption {index}", torch.zeros(3, 8), latent, height=8 * height, width=8 * width, num_frames=5,
        duration_sec=0.5 + 0.25 * (index % 2),
    )  # fmt: skip


def test_sizes_lengths_and_channels(tmp_path: Path) -> None:
    rows = [row(index, *((4, 6) if index < 3 else (6, 4))) for index in range(5)]
    write_rows(tmp_path / "a.parquet", rows)
    summary = inspect(tmp_path)
    values_CN = torch.cat([one.vae_latent.double().flatten(1) for one in rows if one.vae_latent is not None], 1)
    mean, deviation = summary.channel_statistics(16)
    torch.testing.assert_close(mean, values_CN.mean(1))
    torch.testing.assert_close(deviation, values_CN.std(1, correction=0))
    assert summary.clips == {"5 frames of 32 × 48 pixels": 3, "5 frames of 48 × 32 pixels": 2}
    text = str(summary)
    assert "clips last 0.5 to 0.75 seconds" in text and f"means of 16 channels: {mean[0]:.3f} " in text


def test_sheet_of_decoded_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "a.parquet", [row(index, *((4, 6) if index < 3 else (6, 4))) for index in range(5)])
    sheet = tmp_path / "sheet.png"
    cli.main(["data", "inspect", "--path", str(tmp_path), "--sheet", str(sheet), "--vae", str(TINY_WAN), "--rows", "3"])
    shown = capsys.readouterr().out
    assert f"{sheet}: 3 rows, decoded" in shown and "5 rows in 1 file(s), 0 bad" in shown
    colours = np.asarray(Image.open(sheet)).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 1000, "decoded pictures, not white paper"


def test_raw_latents_are_normalised_for_the_sheet(tmp_path: Path) -> None:
    rows, statistics = [row(index) for index in range(2)], stored_statistics(str(TINY_WAN))
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (statistics.mean, statistics.std))
    write_rows(tmp_path / "ours.parquet", rows)
    raw = [
        dataclasses.replace(one, vae_latent=mean + std * one.vae_latent) for one in rows if one.vae_latent is not None
    ]
    write_rows(tmp_path / "theirs.parquet", raw)
    sheets = []
    for name, form in (("ours", "normalised"), ("theirs", "raw")):
        argv = ["--path", str(tmp_path / f"{name}.parquet"), "--vae", str(TINY_WAN), "--latents", form]
        cli.main(["data", "inspect", "--sheet", str(tmp_path / f"{name}.png"), *argv])
        sheets.append(np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int))
    assert np.abs(sheets[0] - sheets[1]).max() <= 2


def test_pixels_beside_fastvideos_latents_are_no_bad_rows(tmp_path: Path) -> None:
    tensors = {"vae_latent": row(0).vae_latent, "text_embedding": torch.zeros(3, 8), "clip_feature": torch.zeros(2, 4)}
    record = fastvideo_data.record("0", "a cat", {**tensors, "first_frame_latent": row(0).vae_latent})
    record |= {"pil_image_bytes": bytes(12), "pil_image_shape": [2, 2, 3], "pil_image_dtype": "uint8"}
    fastvideo_data.write(tmp_path, [record], fastvideo_data.I2V, rows_per_file=1, workers=1)
    summary = inspect(tmp_path)
    assert not summary.bad_rows and len(summary.extra) == 2


@pytest.mark.parametrize(
    ("rows", "sheet", "message"),
    [(0, "s.png", "--rows 0 shows nothing"), (1, "s.jpg", "must end in .png"), (1, "s.png", "no latents to show")],
)
def test_a_sheet_that_cannot_be(rows: int, sheet: str, message: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", [LatentRow("a", "a", torch.zeros(3, 8))])
    with pytest.raises(ValueError, match=message):
        write_sheet(tmp_path / "a.parquet", tmp_path / sheet, TINY_WAN, "wan", rows)
    assert not (tmp_path / sheet).exists()
