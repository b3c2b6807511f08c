"""Scores of a subject's videos, each a mean over its videos: the scorer's, and those of `quality` and `perceptual`.

The reference is rated first and its videos stay in memory (97 MB for 81 frames of 480 × 832). Each later video is
compared with the reference's of the same prompt and index, which started from the same noise; where the reference has
none, that video is not compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from titan_distill.validation import quality
from titan_distill.validation.distances import project, sliced_wasserstein, sliced_wasserstein_excess
from titan_distill.validation.perceptual import ClipScore, Fvd, Lpips
from titan_distill.validation.scorers import Scorer
from titan_distill.validation.video_folder import Key


class MadeVideo(NamedTuple):
    """One video of a subject, uint8 [T, H, W, 3] on the CPU, and its latents if it was sampled here."""

    key: Key
    video: Tensor
    latents: Tensor | None = None


@dataclass
class Rater:
    """Rates subjects: the reference first, if there is one, then any number of others."""

    device: torch.device
    scorer: Scorer
    lpips: Lpips | None = None
    clip: ClipScore | None = None
    fvd: Fvd | None = None
    _videos: dict[Key, Tensor] = field(default_factory=dict)
    """The reference's videos."""
    _projections_NP: Tensor | None = None
    _latent_shape: torch.Size | None = None

    def rate_reference(self, made: Iterable[MadeVideo]) -> dict[str, float]:
        """Returns the scores of the reference, which do not compare it with itself, and keeps its videos."""

        def kept() -> Iterable[MadeVideo]:
            for one in made:
                self._videos[one.key] = one.video
                self._latent_shape = None if one.latents is None else one.latents.shape
                if self.fvd is not None:
                    self.fvd.add_reference(one.video)
                yield one

        scores, self._projections_NP = self._rate(kept(), compare=False)
        return scores

    def rate(self, made: Iterable[MadeVideo]) -> dict[str, float]:
        """Returns the scores of a subject, without the distance where latents have another shape than the reference's.
        Raises ValueError for videos of another size."""
        shapes = set[torch.Size | None]()

        def seen() -> Iterable[MadeVideo]:
            for one in made:
                shapes.add(None if one.latents is None else one.latents.shape)
                yield one

        scores, projections_NP = self._rate(seen(), compare=True)
        other_NP = self._projections_NP
        if (
            projections_NP is not None
            and other_NP is not None
            and projections_NP.shape == other_NP.shape
            and {self._latent_shape} == shapes
        ):
            scores["sliced_wasserstein"] = sliced_wasserstein(projections_NP, other_NP)
            if len(other_NP) >= 4:
                scores["sliced_wasserstein_excess"] = sliced_wasserstein_excess(projections_NP, other_NP)
        if self.fvd is not None and self._videos:
            scores["fvd"] = self.fvd.distance()
        return scores

    def _rate(self, made: Iterable[MadeVideo], *, compare: bool) -> tuple[dict[str, float], Tensor | None]:
        """Returns mean scores and, if the videos have latents, these latents projected, [N, P]."""
        values: dict[str, list[float]] = defaultdict(list)
        of_prompt: dict[str, list[Tensor]] = defaultdict(list)
        latents: list[Tensor] = []
        for one in made:
            for name, value in self._scores(one, compare=compare).items():
                values[name].append(value)
            if one.latents is not None:
                latents.append(one.latents)
            if one.key[0] not in of_prompt:  # videos of one prompt come together
                _add_diversity(values, of_prompt)
            of_prompt[one.key[0]].append(one.video)
            if compare and self.fvd is not None:
                self.fvd.add(one.video)
        _add_diversity(values, of_prompt)
        return {name: fmean(found) for name, found in values.items() if found}, project(latents) if latents else None

    def _scores(self, one: MadeVideo, *, compare: bool) -> dict[str, float]:
        scores, video = dict(self.scorer(one.video.numpy(), one.key[0])), one.video.to(self.device)
        if compare and one.key in self._videos:
            reference = self._videos[one.key].to(self.device)
            scores |= {"psnr": quality.psnr(video, reference), "ssim": quality.ssim(video, reference)}
            if self.lpips is not None:
                scores["lpips"] = self.lpips(video, reference)
        if self.clip is not None:
            scores["clip_score"] = self.clip(video, one.key[0])
        return scores | {"motion": quality.motion(video), "flicker": quality.flicker(video)}


def _add_diversity(values: dict[str, list[float]], of_prompt: dict[str, list[Tensor]]) -> None:
    """Rates and frees the videos of finished prompts."""
    values["diversity"] += [quality.diversity(videos) for videos in of_prompt.values() if len(videos) > 1]
    of_prompt.clear()
