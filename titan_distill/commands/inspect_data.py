"""`titan-distill data inspect`: the content of a data set in words, and some of its rows as pictures."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np

from titan_distill.config.paths import of_key
from titan_distill.data.latents import Form
from titan_distill.data.loader import normalise_latents
from titan_distill.data.parquet import BadRowError, ParquetDataset
from titan_distill.fault_tolerance.outputs import probe_file
from titan_distill.models.base import model_family
from titan_distill.parallelisms.mesh import default_device
from titan_distill.validation.video import Video, contact_sheet, thumbnails


def write_sheet(path: Path, sheet: Path, vae: Path, family: str, num_rows: int, form: Form | None = None) -> str:
    """Decodes rows, evenly spread over a data set, onto a contact sheet. Returns a sentence about it. `form` is that of
    latents whose manifest and statistics do not tell it.

    Raises:
        ValueError: an output that can't be written, rows that are all bad or without latents, a family or folder
            without decoder.
    """
    if num_rows < 1:
        raise ValueError(f"--rows {num_rows} shows nothing; choose 1 or more")
    probe_file(sheet, "--sheet", (".png",))
    dataset, rows, latents = ParquetDataset(path), [], []
    device = default_device()
    with of_key("--vae", vae):
        decode, statistics = model_family(family).latent_decoder(vae, device)
    with of_key("PATH", path):
        normalise_latents(dataset, statistics, form, "--latents")
    for index in np.linspace(0, len(dataset) - 1, min(num_rows, len(dataset))).round().astype(int).tolist():
        with suppress(BadRowError):  # the summary names them
            row = dataset.read(index)
            if row.vae_latent is not None:
                rows.append(row)
                latents.append(row.vae_latent)
    if not rows:
        raise ValueError(f"{path} has no latents to show in the rows tried; leave out --sheet")
    videos = [thumbnails(decode(latent[None].to(device))[0].cpu().numpy()) for latent in latents]
    contact_sheet(sheet, [("decoded rows", _of_one_size(videos))], [f"{row.id}: {row.caption}" for row in rows])
    return f"{sheet}: {len(rows)} rows, decoded"


def _of_one_size(videos: list[Video]) -> list[Video]:
    """Returns thumbnails with white at the right and as many frames as the longest, which a sheet needs."""
    num_frames, width = (max(video.shape[axis] for video in videos) for axis in (0, 2))
    missing = [((0, num_frames - len(video)), (0, 0), (0, width - video.shape[2]), (0, 0)) for video in videos]
    return [np.pad(video, sides, constant_values=255) for video, sides in zip(videos, missing, strict=True)]
