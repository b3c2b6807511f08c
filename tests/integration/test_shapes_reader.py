"""The rule-based reader: right on drawn clips and on blurred ones, and never generous to wrong ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_world.reader import NOTHING, Reading, read_clip, shapes_scores
from tiny_world.shapes import ShapesClip, all_attributes, draw_clip

TINY_VAE = Path(__file__).parents[1] / "assets/tiny_wan/vae"


@pytest.fixture(scope="module")
def drawn() -> tuple[list[np.ndarray], list[ShapesClip]]:
    rng = np.random.default_rng(0)
    clips = all_attributes()
    return [draw_clip(clip, rng) for clip in clips], clips


def _blurred(video_THW3: np.ndarray, pixels: int) -> np.ndarray:
    video_T3HW = torch.from_numpy(video_THW3).permute(0, 3, 1, 2).float()
    blurred = F.avg_pool2d(video_T3HW, pixels, stride=1, padding=pixels // 2, count_include_pad=False)
    return blurred.permute(0, 2, 3, 1).byte().numpy()


def prompt_accuracy(videos: list[np.ndarray], clips: list[ShapesClip]) -> dict[str, float]:
    """Means of the scores of videos that should show these clips."""
    scores = [shapes_scores(video, clip.caption()) for video, clip in zip(videos, clips, strict=True)]
    return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def test_every_drawn_clip_is_read_right(drawn: tuple[list[np.ndarray], list[ShapesClip]]) -> None:
    videos, clips = drawn
    assert prompt_accuracy(videos, clips) == {
        "prompt_accuracy": 1.0,
        "colour_accuracy": 1.0,
        "shape_accuracy": 1.0,
        "direction_accuracy": 1.0,
    }


def test_blur_and_noise_are_tolerated(drawn: tuple[list[np.ndarray], list[ShapesClip]]) -> None:
    videos, clips = drawn
    rng = np.random.default_rng(1)
    worn = [np.clip(_blurred(video, 5) + rng.normal(0, 6, video.shape), 0, 255).astype(np.uint8) for video in videos]
    assert prompt_accuracy(worn, clips)["prompt_accuracy"] >= 0.95


def test_clips_that_went_through_the_small_vae_are_read_right(
    drawn: tuple[list[np.ndarray], list[ShapesClip]],
) -> None:
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKLWan.from_pretrained(TINY_VAE)
    videos, clips = (part[::8] for part in drawn)
    with torch.no_grad():
        inputs_B3THW = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        outputs_B3THW = vae.decode(vae.encode(inputs_B3THW).latent_dist.mean).sample
    decoded = ((outputs_B3THW.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    assert prompt_accuracy(list(decoded), clips)["prompt_accuracy"] == 1.0


def test_wrong_descriptions_score_nothing(drawn: tuple[list[np.ndarray], list[ShapesClip]]) -> None:
    videos, clips = drawn
    other_combination = clips[2:] + clips[:2]
    assert prompt_accuracy(videos, other_combination)["prompt_accuracy"] == 0.0


def test_time_run_backwards_flips_the_direction(drawn: tuple[list[np.ndarray], list[ShapesClip]]) -> None:
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for video, clip in zip(*drawn, strict=True):
        assert read_clip(video[::-1]) == Reading(clip.colour, clip.shape, opposite[clip.direction])


def test_blank_and_random_clips_show_nothing() -> None:
    rng = np.random.default_rng(0)
    assert read_clip(np.full((17, 96, 96, 3), 25, dtype=np.uint8)) == NOTHING
    assert read_clip(np.full((17, 96, 96, 3), (200, 30, 30), dtype=np.uint8)) == NOTHING
    assert read_clip(rng.integers(256, size=(17, 96, 96, 3), dtype=np.uint8)) == NOTHING


def test_a_shape_that_stands_still_has_no_direction(drawn: tuple[list[np.ndarray], list[ShapesClip]]) -> None:
    videos, clips = drawn
    still = np.repeat(videos[0][:1], 17, axis=0)
    assert read_clip(still) == Reading(clips[0].colour, clips[0].shape, None)


def test_a_shape_that_moves_askew_has_no_direction(drawn: tuple[list[np.ndarray], list[ShapesClip]]) -> None:
    askew = np.stack([np.roll(drawn[0][0][0], (t, t), axis=(0, 1)) for t in range(17)])
    assert read_clip(askew).direction is None


def test_two_shapes_at_once_are_no_answer(drawn: tuple[list[np.ndarray], list[ShapesClip]]) -> None:
    rng = np.random.default_rng(0)
    left, right = ShapesClip("red", "circle", "up", "slow"), ShapesClip("red", "square", "up", "slow")
    narrow = np.concatenate([draw_clip(left, rng), draw_clip(right, rng)], axis=2)
    assert read_clip(narrow) == NOTHING


def test_an_outline_that_is_none_of_the_three_has_no_shape() -> None:
    rows, columns = np.mgrid[0:96, 0:96] + 0.5
    video_THW3 = np.full((17, 96, 96, 3), 0.08)
    for t in range(17):
        x, y = np.abs(columns - 30 - 2 * t), np.abs(rows - 48)
        video_THW3[t, np.minimum(x, y) + np.maximum(x, y) / 8 < 4] = (0.9, 0.15, 0.12)
    assert read_clip((255 * video_THW3[:, 20:76]).round().astype(np.uint8)).shape is None


def test_errors_name_the_shape_or_dtype() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 17, 96, 96\)"):
        read_clip(np.zeros((3, 17, 96, 96), dtype=np.uint8))
    with pytest.raises(ValueError, match="dtype int64"):
        read_clip(np.zeros((17, 96, 96, 3), dtype=np.int64))
    with pytest.raises(ValueError, match="does not describe a moving shape"):
        shapes_scores(np.zeros((17, 96, 96, 3), dtype=np.uint8), "a cat")
