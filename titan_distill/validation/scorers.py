"""Automatic scores of one decoded video, chosen by ``validation.scorer``.

A scorer takes a video and its prompt and returns numbers that are averaged over prompts. ``shapes`` reads colour, shape
and direction off the frames by rule; it only makes sense for prompts of the moving-shapes world (data/synthetic.py).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from titan_distill.data.synthetic import parse_caption
from titan_distill.validation.shapes import read_clip

Scorer = Callable[[npt.NDArray[np.uint8], str], dict[str, float]]
"""(video uint8 [T, H, W, 3], prompt) -> scores by name."""


def no_scores(video_THW3: npt.NDArray[np.uint8], prompt: str) -> dict[str, float]:
    """For prompts that no rule can check."""
    return {}


def shapes_scores(video_THW3: npt.NDArray[np.uint8], prompt: str) -> dict[str, float]:
    """1 where the frames show what the prompt says; ``prompt_accuracy`` wants colour, shape and direction at once."""
    wanted, seen = parse_caption(prompt), read_clip(video_THW3)
    right = {name: float(getattr(wanted, name) == getattr(seen, name)) for name in ("colour", "shape", "direction")}
    return {"prompt_accuracy": min(right.values()), **{f"{name}_accuracy": value for name, value in right.items()}}


SCORERS: dict[str, Scorer] = {"none": no_scores, "shapes": shapes_scores}
