"""Meter of validations: shows forward passes as they are made, and estimates the seconds of the next validation.

Before the first step a validation samples the baselines, a teacher in many guided steps among them; later ones sample
the trained role in a few. Their seconds therefore differ by far, and what the first takes says nothing about the next
as a whole. Its parts do: the seconds of a role's forward pass, and those of decoding, scoring and showing a video.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from titan_distill.observability.progress import ProgressBar


@dataclass(frozen=True)
class SamplingWork:
    """Work of one sample set on one rank.

    Attributes:
        role: role that is sampled.
        num_passes: forward passes, all batches together; a guided one counts twice.
        num_sample_passes: the same, each times the samples of its batch.
        num_videos: videos to decode.
    """

    role: str
    num_passes: int
    num_sample_passes: int
    num_videos: int


@dataclass
class Meter:
    """Counts and times the work of one validation after the other."""

    device: torch.device
    _seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _passes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _sample_passes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _video_seconds: float = 0.0
    _videos: int = 0
    _bar: ProgressBar | None = None

    @contextmanager
    def validation(self, work: Mapping[str, SamplingWork], *, is_shown: bool) -> Iterator[None]:
        """Shows the passes of the sample sets in `work`, by label, while they are made in the block."""
        started, sampled = time.perf_counter(), sum(self._seconds.values())
        label = f"validation, sampling {', '.join(work)}"
        total = sum(each.num_passes for each in work.values())
        with ProgressBar(label, total, "forward passes", is_shown=is_shown and total > 0) as self._bar:
            yield
        self._video_seconds += time.perf_counter() - started - (sum(self._seconds.values()) - sampled)
        self._videos += sum(each.num_videos for each in work.values())

    @contextmanager
    def sampling(self, role: str, batch_size: int) -> Iterator[None]:
        """Books the seconds of the block on the role's passes over a batch."""
        started, passes = time.perf_counter(), self._passes[role]
        yield
        self._sample_passes[role] += batch_size * (self._passes[role] - passes)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._seconds[role] += time.perf_counter() - started

    def advance(self, role: str, number: int) -> None:
        """Counts `number` forward passes of a role."""
        self._passes[role] += number
        if self._bar is not None:
            self._bar.advance(number)

    def seconds(self, work: Mapping[str, SamplingWork]) -> float | None:
        """Returns the seconds that `work` will take; None if a role of it has not been sampled yet. A pass is taken to
        cost as much per sample in a small batch as in a large one."""
        if any(not self._sample_passes.get(each.role) for each in work.values()):
            return None
        each_video = self._video_seconds / self._videos if self._videos else 0.0
        return sum(
            each.num_sample_passes * self._seconds[each.role] / self._sample_passes[each.role]
            + each.num_videos * each_video
            for each in work.values()
        )
