"""Opens the dataset that `data.path` names: rows that are encoded already, or videos and prompts."""

from __future__ import annotations

from collections.abc import Sequence

from titan_distill.config.sections import DataConfig
from titan_distill.data.footage import VideoSize
from titan_distill.data.parquet import LatentRow, ParquetDataset
from titan_distill.data.rows import RowDataset
from titan_distill.data.videos import ClipRow, VideoDataset


def open_dataset(
    data: DataConfig, *, tensors: Sequence[str], video_size: tuple[int, int, int] | None, needs_latents: bool
) -> RowDataset[LatentRow] | RowDataset[ClipRow]:
    """The rows to train on.

    Args:
        data: where they are.
        tensors: further tensors that each row must have.
        video_size: (frames, height, width) of a sample in pixels; None for families whose samples are no videos.
        needs_latents: whether rows without a latent, or a video, can't be trained on.

    Raises:
        ValueError: data that can't be read, or that lacks what is needed.
    """
    dataset: RowDataset[LatentRow] | RowDataset[ClipRow]
    if data.holds_videos:
        if video_size is None or tensors:
            lacking = f"the tensors {', '.join(tensors)}" if tensors else "samples of a family without videos"
            raise ValueError(f"data.path = {data.path!r} is a .csv, which can't hold {lacking}; use parquet")
        size = VideoSize(*video_size, data.fps) if needs_latents else None
        return VideoDataset(data.path, size, data.max_bad_rows)
    dataset = ParquetDataset(data.path, tensors=tensors, max_bad_rows=data.max_bad_rows)
    if needs_latents and not dataset.has_latents:
        raise ValueError(
            f"data.path = {data.path!r} holds only text, but this job trains on latents; make them with "
            "`titan-distill data preprocess`"
        )
    return dataset
