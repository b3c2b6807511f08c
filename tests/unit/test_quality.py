"""Measures of decoded videos, against values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from titan_distill.validation import quality
from titan_distill.validation.rating import MadeVideo, Rater

CPU = torch.device("cpu")


def grey(*values: int, size: int = 16) -> Tensor:
    """A video of plain frames, each of one value."""
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, size, size, 3)


def test_psnr_is_that_of_the_mean_squared_error_of_all_frames() -> None:
    assert quality.psnr(grey(100, 100), grey(103, 103)) == pytest.approx(10 * math.log10(255**2 / 9), abs=1e-4)
    assert quality.psnr(grey(100, 100), grey(100, 106)) == pytest.approx(10 * math.log10(255**2 / 18), abs=1e-4)
    assert quality.psnr(grey(7, 8), grey(7, 8)) == math.inf


def test_ssim_is_a_mean_over_frames_and_sees_structure() -> None:
    """Plain frames a and b have (2ab + c₁) / (a² + b² + c₁), with c₁ = (0.01 · 255)²."""
    c1 = 2.55**2
    plain = (2 * 50 * 200 + c1) / (50**2 + 200**2 + c1)
    assert quality.ssim(grey(50), grey(200)) == pytest.approx(plain, abs=1e-5)
    half = grey(*[50] * 5, *[200] * 5)  # more frames than are compared at once
    assert quality.ssim(half, grey(*[200] * 10)) == pytest.approx((plain + 1) / 2, abs=1e-5)
    noise = torch.randint(0, 256, (3, 24, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert quality.ssim(noise, noise) == pytest.approx(1, abs=1e-4)
    assert quality.ssim(noise, 255 - noise) < -0.5


@pytest.mark.parametrize(
    ("frames", "motion", "flicker"),
    [
        ((51, 51, 51), 0.0, 0.0),
        ((0, 51, 102, 153), 0.2, 0.0),  # a fade moves and does not flicker
        ((0, 51, 0, 51), 0.2, 0.2),
        ((0, 51, 51), 0.1, 0.1),
        ((9,), 0.0, 0.0),
    ],
)
def test_motion_and_flicker(frames: Sequence[int], motion: float, flicker: float) -> None:
    assert quality.motion(grey(*frames)) == pytest.approx(motion, abs=1e-6)
    assert quality.flicker(grey(*frames)) == pytest.approx(flicker, abs=1e-6)


def test_diversity_is_a_mean_over_pairs() -> None:
    assert quality.diversity([grey(0), grey(51), grey(102)]) == pytest.approx((0.2 + 0.2 + 0.4) / 3, abs=1e-6)
    assert quality.diversity([grey(0, 0), grey(0, 51)]) == pytest.approx(0.2 / math.sqrt(2), abs=1e-6)
    with pytest.raises(ValueError, match="there is 1; make at least 2"):
        quality.diversity([grey(0)])


@pytest.mark.parametrize("measure", [quality.psnr, quality.ssim])
def test_videos_of_two_sizes_are_not_compared(measure: Callable[[Tensor, Tensor], float]) -> None:
    with pytest.raises(ValueError, match=r"a video of 2 × 16 × 16 \(frames, height, width\) cannot be compared"):
        measure(grey(1, 2), grey(1))


def rows(*videos: tuple[str, int, Tensor], latents: float | None = None) -> list[MadeVideo]:
    found = None if latents is None else torch.full((4,), latents)
    return [MadeVideo((text, index), video, found) for text, index, video in videos]


def brightness(video: np.ndarray, prompt: str) -> dict[str, float]:
    return {"brightness": float(video.mean()), "length": float(len(prompt))}


def test_a_subject_is_compared_with_the_reference_video_of_its_prompt_and_index() -> None:
    rater = Rater(CPU, brightness)
    reference = rows(("a", 0, grey(0, 0)), ("a", 1, grey(102, 102)), ("bc", 0, grey(51, 51)), latents=1.0)
    scores = rater.rate_reference(reference)
    assert scores == pytest.approx(
        {"brightness": 51, "length": 4 / 3, "motion": 0, "flicker": 0, "diversity": 0.4}, abs=1e-6
    )
    shuffled = rows(("bc", 0, grey(51, 61)), ("a", 1, grey(103, 103)), ("d", 0, grey(7, 7)), latents=3.0)
    scores = rater.rate(shuffled)
    psnr = (10 * math.log10(255**2 / 50) + 10 * math.log10(255**2)) / 2  # nothing to compare "d" with
    assert scores["psnr"] == pytest.approx(psnr, abs=1e-4)
    assert scores["motion"] == pytest.approx(10 / 255 / 3, abs=1e-6) and "diversity" not in scores
    assert scores["sliced_wasserstein"] == pytest.approx(2.0, rel=0.1)  # |δ| / √D, with each of D values 2 away


def test_latents_of_another_shape_have_no_distance() -> None:
    rater = Rater(CPU, lambda video, prompt: {})
    rater.rate_reference(rows(("a", 0, grey(0)), latents=1.0))
    other = [MadeVideo(("a", 0), grey(0), torch.ones(6))]
    assert "sliced_wasserstein" not in rater.rate(other)
    assert "sliced_wasserstein" in rater.rate(rows(("a", 0, grey(0)), latents=1.0))


def test_folders_without_latents_and_raters_without_reference() -> None:
    rater = Rater(CPU, lambda video, prompt: {})
    assert set(rater.rate(rows(("a", 0, grey(0))))) == {"motion", "flicker"}
    rater.rate_reference(rows(("a", 0, grey(0)), latents=1.0))
    scores = rater.rate(rows(("a", 0, grey(0))))
    assert scores["psnr"] == math.inf and "sliced_wasserstein" not in scores
