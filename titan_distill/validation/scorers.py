"""Scorers rate decoded videos automatically. `validation.scorer` selects one by its name.

A scorer takes a video and its prompt and returns numbers by name, which are averaged over prompts. It is registered
with `@register_scorer`. For a scorer outside of this package, `job.imports` must name its module.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from titan_distill.registry import SCORERS, lookup, register_scorer

Scorer = Callable[[npt.NDArray[np.uint8], str], dict[str, float]]
"""Function (video uint8 [T, H, W, 3], prompt) -> scores by name."""


@register_scorer("none")
def no_scores(video_THW3: npt.NDArray[np.uint8], prompt: str) -> dict[str, float]:
    """Returns no scores, for prompts that cannot be checked by rules."""
    return {}


def scorer(name: str) -> Scorer:
    """Returns the scorer registered under `name`. Raises ValueError with the known scorers and the nearest name."""
    return lookup(SCORERS, name)
