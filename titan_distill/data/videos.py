"""A CSV of videos and prompts as a training set, without a preprocessing run before it.

The file has the columns `video` (a path, relative to the CSV) and `prompt`. A row is the first clip of its video:
loader processes decode, resample, scale and crop it, and the rank that trains on it encodes it (`Batch.clips`), each
clip and each prompt alone, so that a sample's latents and text depend on nothing else in its batch.

Trade-off: nothing to prepare and nothing to store, and in return every epoch decodes and encodes every video again.
Where one trains on more than a few epochs, or VAE and text encoder do not fit beside the model, `titan-distill data
preprocess` once is the better way; the rows come in the same keyed order from either.

That all files exist is checked when the CSV is opened; that they can be decoded and are long enough, when their row is
read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from titan_distill.data.footage import VideoSize, read_clips
from titan_distill.data.rows import BadRowError, RowDataset
from titan_distill.data.tables import non_empty, read_csv

VIDEO, PROMPT = "video", "prompt"


@dataclass(frozen=True)
class ClipRow:
    """One sample before anything is encoded."""

    id: str
    caption: str
    pixels: Tensor | None  # [T, H, W, 3] uint8; None where only the prompt is wanted


class VideoDataset(RowDataset[ClipRow]):
    """Rows of a CSV of videos and prompts; with `size` None, of prompts alone.

    Raises:
        ValueError: a file that is no CSV, a missing column, a row without video or prompt, a video that is not there.
        BadRowError: from indexing, for a video that can't be decoded or is too short.
    """

    def __init__(self, path: str | Path, size: VideoSize | None, max_bad_rows: int = 0) -> None:
        super().__init__(path, max_bad_rows)
        self._size = size
        columns = (PROMPT,) if size is None else (PROMPT, VIDEO)
        self._rows: list[tuple[str, str, Path | None]] = []
        for where, entry in read_csv(self.path, columns):
            prompt, *video = non_empty(where, entry, columns)
            self._rows.append((where, prompt, self._existing(where, video[0]) if video else None))
        if not self._rows:
            raise ValueError(f"{self.path} has a header and no rows: write one per video")

    @property
    def has_latents(self) -> bool:
        return self._size is not None

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

    def _existing(self, where: str, name: str) -> Path:
        video = self.path.parent / name
        if not video.is_file():
            raise ValueError(f"{where}: there is no file {video}; correct the path, which is relative to the CSV")
        return video
