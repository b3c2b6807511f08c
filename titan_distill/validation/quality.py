"""Measures of decoded videos that need no weights.

PSNR and SSIM compare a video with the reference's video of the same prompt and noise: they tell how well a student
repeats its teacher, not how good it looks. A student of another trajectory may be as good and score low.

The others need no reference. With frames f_t from 0 (black) to 1 (white), means over all pixels, channels and times:

    motion    = mean |f_{t+1} − f_t|
    flicker   = mean |f_t − ½ (f_{t−1} + f_{t+1})|
    diversity = mean over pairs of videos a, b of one prompt of sqrt(mean (a − b)²)

Motion is 1 minus VBench's "temporal flickering" and falls to 0 for a still picture. Flicker leaves out what changes
evenly, so a fade has none. Diversity falls to 0 for a student that ignores its noise. None of them has a best value:
each is read beside the teacher's.

Shapes: videos are uint8 [T, H, W, 3], on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from torch import Tensor

_WHITE = 255.0
_FRAMES_AT_ONCE = 8
"""Frames that are compared at once: the windows of SSIM need ten times a frame's memory in fp32."""


def psnr(video: Tensor, reference: Tensor) -> float:
    """Returns the peak signal-to-noise ratio of a video in dB, from the mean squared error of all frames; infinite for
    equal videos. Raises ValueError for videos of two sizes."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # seconds to import

    _check_sizes(video, reference)
    return peak_signal_noise_ratio(video.float(), reference.float(), data_range=_WHITE).item()


def ssim(video: Tensor, reference: Tensor) -> float:
    """Returns the structural similarity, mean over frames: 1 for equal videos. Windows are Gaussian, σ = 1.5 pixels
    (Wang et al. 2004). Raises ValueError for videos of two sizes."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_sizes(video, reference)
    total = 0.0
    for own, other in zip(video.split(_FRAMES_AT_ONCE), reference.split(_FRAMES_AT_ONCE)):
        own_TCHW, other_TCHW = (frames.permute(0, 3, 1, 2).float() for frames in (own, other))
        values = structural_similarity_index_measure(own_TCHW, other_TCHW, data_range=_WHITE, reduction="sum")
        assert isinstance(values, Tensor)
        total += values.item()
    return total / len(video)


def motion(video: Tensor) -> float:
    """Returns the mean change of a pixel from frame to frame, as a share of white; 0 for one frame."""
    frames = video.float()
    return 0.0 if len(frames) < 2 else (frames[1:] - frames[:-1]).abs().mean().item() / _WHITE


def flicker(video: Tensor) -> float:
    """Returns the mean distance of a pixel from the mean of its value one frame earlier and later, as a share of white;
    0 for fewer than three frames."""
    frames = video.float()
    if len(frames) < 3:
        return 0.0
    return (frames[1:-1] - (frames[:-2] + frames[2:]) / 2).abs().mean().item() / _WHITE


def diversity(videos: Sequence[Tensor]) -> float:
    """Returns the root mean square difference between two videos of one prompt, as a share of white, mean over pairs.
    Raises ValueError for fewer than two videos."""
    if len(videos) < 2:
        raise ValueError(f"diversity compares the videos of one prompt, but there is {len(videos)}; make at least 2")
    distances = [(a.float() - b.float()).square().mean().sqrt().item() / _WHITE for a, b in combinations(videos, 2)]
    return sum(distances) / len(distances)


def _check_sizes(video: Tensor, reference: Tensor) -> None:
    if video.shape != reference.shape:
        own, other = (" × ".join(map(str, x.shape[:3])) for x in (video, reference))
        raise ValueError(f"a video of {own} (frames, height, width) cannot be compared with one of {other}")
