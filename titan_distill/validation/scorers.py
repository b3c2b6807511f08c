"""Automatic scores of one decoded video, chosen by `validation.scorer`.

A scorer takes a video and its prompt and returns numbers, which are averaged over prompts. Scorers register themselves
with `@register_scorer`; those outside this package when `job.imports` names their module.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from titan_distill.registry import SCORERS, lookup, register_scorer

Scorer = Callable[[npt.NDArray[np.uint8], str], dict[str, float]]
"""(video uint8 [T, H, W, 3], prompt) -> scores by name."""


@register_scorer("none")
def no_scores(video_THW3: npt.NDArray[np.uint8], prompt: str) -> dict[str, float]:
    """For prompts that no rule can check."""
    return {}


def scorer(name: str) -> Scorer:
    """The scorer registered under `name`. Raises ValueError naming the known scorers and the nearest one."""
    return lookup(SCORERS, name)
