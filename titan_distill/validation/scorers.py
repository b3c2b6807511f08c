"""Scorers rate one decoded video automatically; `validation.scorer` names the one to use.

A scorer takes a video and its prompt and returns numbers by name, which are averaged over prompts. It registers itself
with `@register_scorer`; one outside this package does so when `job.imports` names its module.
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
    """Returns no scores, for prompts that no rule can check."""
    return {}


def scorer(name: str) -> Scorer:
    """The scorer registered under `name`. Raises ValueError naming the known scorers and the nearest one."""
    return lookup(SCORERS, name)
