"""Looks of samples, as a person sees them: saturation, contrast, motion, and diversity over noise.

A student that distils badly is seen before it is scored: colours run to their limits, contrast grows or fades, the
picture stands still, or every noise leads to the same video. Each of these is one number here. They are read in pairs,
a student's against its teacher's for the same prompts, because a dark film is no fault.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Weights of red, green and blue in the brightness of a pixel (BT.601)."""


@dataclass(frozen=True)
class Looks:
    """Numbers of one video, in units of the full range of a pixel value."""

    saturation: float
    """Mean over pixels of the largest minus the smallest of red, green and blue."""
    contrast: float
    """Standard deviation of brightness over all pixels of the video."""
    motion: float
    """Mean absolute difference of brightness between a frame and the next; 0 for a single frame."""


def looks(video_THW3: npt.NDArray[np.uint8]) -> Looks:
    """Returns the looks of a video."""
    light_THW = np.stack([frame.astype(np.float32) @ LUMA for frame in video_THW3]) / 255
    chroma = [float((frame.max(-1) - frame.min(-1)).mean()) for frame in video_THW3]
    motion = float(np.abs(np.diff(light_THW, axis=0)).mean()) if len(video_THW3) > 1 else 0.0
    return Looks(sum(chroma) / len(chroma) / 255, float(light_THW.std()), motion)


def diversity(projections_NP: Tensor) -> float:
    """Returns the root mean square distance, per value, between samples of one prompt from different noise.

    The samples are projected on random unit directions (`distances.project`), where the mean square of a difference is
    its squared length divided by the number of its values.
    """
    assert len(projections_NP) > 1, "a distance needs two samples"
    return (2 * projections_NP.var(0).mean()).sqrt().item()


def mean_looks(each: list[Looks]) -> dict[str, float]:
    """Returns the means over videos, by name."""
    table = torch.tensor([[one.saturation, one.contrast, one.motion] for one in each], dtype=torch.float64)
    return dict(zip(("saturation", "contrast", "motion"), table.mean(0).tolist(), strict=True))
