"""Training set from a table of videos and prompts, without preprocessing.

`titan_distill.data.tables` reads the table, a CSV for instance. Each row gives one sample, the first clip
of its video. Loader processes decode, resample, scale and crop the clip. The rank that trains on the sample encodes
clip and prompt (`Batch.clips`), each one alone, so that a sample does not depend on the rest of its batch.

Trade-off: nothing is prepared and stored, but every epoch decodes and encodes every video again. For more than a few
epochs, or if VAE and text encoder do not fit in memory beside the model, run `titan-distill data preprocess` once
instead. The keyed order of the rows is the same.

Opening the table checks that all files exist. Reading a row checks that its video can be decoded and is long enough.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from titan_distill.data.footage import VideoSize, read_clips
from titan_distill.data.location import resolved
from titan_distill.data.rows import BadRowError, RowDataset
from titan_distill.data.tables import CAPTION_COLUMNS, VIDEO_COLUMNS, Columns, Videos, read_rows


@dataclass(frozen=True)
class ClipRow:
    """One sample before encoding."""

    id: str
    caption: str
    pixels: Tensor | None  # [T, H, W, 3] uint8; None where only the prompt is wanted


class VideoDataset(RowDataset[ClipRow]):
    """Dataset of the rows of a table with videos and prompts. With `size` None the rows have only prompts.

    Raises:
        ValueError: the file is no table, a column is missing, a row lacks its video or prompt, or a video file does not
            exist.
        BadRowError: while indexing, for a video that can't be decoded or is too short.
    """

    def __init__(self, path: str | Path, size: VideoSize | None, max_bad_rows: int | None = None) -> None:
        super().__init__(path, max_bad_rows)
        self._size = size
        columns = Columns(CAPTION_COLUMNS) if size is None else Columns(CAPTION_COLUMNS, VIDEO_COLUMNS)
        videos = Videos(Path(str(self.path)))  # videos are on this machine
        self._rows: list[tuple[str, str, Path | None]] = []
        digest = hashlib.sha256()
        for row in read_rows(self.path):
            prompt, *names = columns.values(row)
            video = videos.find(row.where, names[0]) if names else None
            self._rows.append((row.where, prompt, video))
            facts = (prompt,) if video is None else (prompt, video.name, str(video.stat().st_size))
            digest.update("".join(f"{fact}\0" for fact in facts).encode())
        if not self._rows:
            raise ValueError(f"{self.path} has no rows: write one per video")
        self.digest = digest.hexdigest()

    @property
    def files(self) -> set[str]:
        return {resolved(video) for _, _, video in self._rows if video is not None}

    @property
    def has_latents(self) -> bool:
        return self._size is not None

    @property
    def first_rows(self) -> Sequence[int]:
        return () if self._size is None else (0,)  # decoding a video takes a second or more

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> ClipRow:
        where, prompt, video = self._rows[index]
        if video is None or self._size is None:
            return ClipRow(where, prompt, None)
        try:
            return ClipRow(where, prompt, next(read_clips(video, self._size)).pixels.permute(0, 2, 3, 1))
        except ValueError as error:
            raise BadRowError(f"{where}: {error}") from error
