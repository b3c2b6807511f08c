"""[data]: what is trained on."""

from __future__ import annotations

from dataclasses import dataclass

from titan_distill.config.parsing import check_range


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str
    """Parquet file, or folder of them, with latents and text embeddings (or only text, where the method allows it); or
    a .csv with the columns video and prompt, which are then encoded during training."""
    max_text_tokens: int = 512
    """Text tokens per sample. Shorter embeddings are zero-padded to this length, longer ones in the data are refused;
    prompts that the run encodes itself (from a .csv or for validation) are cut to it."""
    num_workers: int = 0
    """Loader processes a rank; 0 reads in the training process."""
    max_bad_rows: int = 0
    """Unreadable rows to skip, each named in the log, before the run stops."""
    fps: float | None = None
    """Frames a second to which the videos of a .csv are resampled; none keeps every frame."""

    def __post_init__(self) -> None:
        check_range(self, "max_text_tokens", least=1)
        check_range(self, "num_workers", "max_bad_rows", least=0)
        if not self.path:
            raise ValueError('path = "" names no data; set it to a parquet file, a folder of them or a .csv')
        if self.fps is not None:
            check_range(self, "fps", above=0)
            if not self.holds_videos:
                raise ValueError(f"fps = {self.fps} has no effect on path = {self.path!r}, which is no .csv; remove it")

    @property
    def holds_videos(self) -> bool:
        """Whether the data is a table of videos and prompts, to be encoded during training."""
        return self.path.endswith(".csv")
