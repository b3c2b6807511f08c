"""The scorer `shapes`: colour, shape and direction, read off the frames by rule."""

import numpy as np
import numpy.typing as npt

from tiny_world.reader import read_clip
from tiny_world.shapes import parse_caption
from titan_distill.registry import register_scorer


@register_scorer("shapes")
def shapes_scores(video_THW3: npt.NDArray[np.uint8], prompt: str) -> dict[str, float]:
    """1 where the frames show what the prompt says; `prompt_accuracy` wants colour, shape and direction at once."""
    wanted, seen = parse_caption(prompt), read_clip(video_THW3)
    right = {name: float(getattr(wanted, name) == getattr(seen, name)) for name in ("colour", "shape", "direction")}
    return {"prompt_accuracy": min(right.values()), **{f"{name}_accuracy": value for name, value in right.items()}}
