"""The scorer `shapes`: reads colour, shape and direction off the frames of a clip by rule.

No network judges: the foreground is what differs from the background, its colour is the nearest hue, its direction the
way its centre of mass went, its shape the pattern that fits its outline best. Each answer may be None, "can't tell",
which scores as wrong. The rules tolerate the blur and colour shifts of a small VAE; they do not tolerate two shapes, a
shape that breaks up, or one that stands still, because a model that makes these has not followed its prompt.

Legend: T frames, H height, W width, N foreground pixels, A angles.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiny_world.shapes import COLOURS, DIRECTIONS, SHAPES, distance_from_centre, parse_caption
from titan_distill.registry import register_scorer

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """The words that the frames of a clip show; None where they do not tell."""

    colour: str | None
    shape: str | None
    direction: str | None


NOTHING = Reading(None, None, None)

# Saturation (max - min over RGB, in [0, 1]) that tells a shape from the grey background.
_MIN_SATURATION = 0.15
# Share of the frame that a shape covers: drawn ones take 0.059 (triangles) to 0.174 (squares).
_MIN_COVER, _MAX_COVER = 0.03, 0.35
_MAX_HUE_ERROR_DEGREES = 25.0
# Drawn shapes travel 16 pixels or more, along one axis only.
_MIN_TRAVEL_PIXELS = 8.0
_MIN_TRAVEL_RATIO = 2.0
# Spread of the foreground around its centre over that of a disc of equal area: 1.0 for a circle, 1.05 for a square,
# 1.21 for a triangle; two blobs or scattered pixels have much more.
_MAX_SPREAD = 1.6
# A shape must be visible in this share of the frames.
_MIN_VISIBLE = 0.8


def read_clip(video_THW3: npt.NDArray[np.uint8]) -> Reading:
    """Read one clip, RGB frames [T, H, W, 3]. Raises ValueError for another shape, or another dtype than uint8."""
    if video_THW3.ndim != 4 or video_THW3.shape[-1] != 3 or video_THW3.dtype != np.uint8:
        raise ValueError(
            f"a video has shape {video_THW3.shape} and dtype {video_THW3.dtype}, but uint8 [frames, height, width, 3] "
            "is read; permute or convert it"
        )
    frames_THW3 = video_THW3.astype(np.float64) / 255
    saturation_THW = frames_THW3.max(axis=-1) - frames_THW3.min(axis=-1)
    masks_THW = _segment(saturation_THW)
    visible = [t for t, mask in enumerate(masks_THW) if _is_one_shape(mask)]
    if len(visible) < _MIN_VISIBLE * len(frames_THW3):
        return NOTHING
    return Reading(
        colour=_colour(frames_THW3[visible], masks_THW[visible]),
        shape=_shape(masks_THW[visible]),
        direction=_direction(masks_THW, visible),
    )


@register_scorer("shapes", check_prompt=parse_caption)
def shapes_scores(video_THW3: npt.NDArray[np.uint8], prompt: str) -> dict[str, float]:
    """1 where the frames show what the prompt says, else 0; `prompt_accuracy` wants colour, shape and direction at
    once."""
    wanted, seen = parse_caption(prompt), read_clip(video_THW3)
    right = {name: float(getattr(wanted, name) == getattr(seen, name)) for name in ("colour", "shape", "direction")}
    return {"prompt_accuracy": min(right.values()), **{f"{name}_accuracy": value for name, value in right.items()}}


def _segment(saturation_THW: FloatArray) -> npt.NDArray[np.bool_]:
    """Foreground: at least half as saturated as the shape's inside, so that the outline sits where blur crosses
    half."""
    num_frames = len(saturation_THW)
    inside_T = np.quantile(saturation_THW.reshape(num_frames, -1), 0.98, axis=1)
    background_T = np.median(saturation_THW.reshape(num_frames, -1), axis=1)
    threshold_T = np.maximum((inside_T + background_T) / 2, _MIN_SATURATION)
    return saturation_THW > threshold_T[:, None, None]


def _is_one_shape(mask_HW: npt.NDArray[np.bool_]) -> bool:
    points_N2 = np.argwhere(mask_HW)
    if not _MIN_COVER < len(points_N2) / mask_HW.size < _MAX_COVER:
        return False
    spread = points_N2.var(axis=0).sum() / (len(points_N2) / (2 * np.pi))
    return bool(spread < _MAX_SPREAD)


def _colour(frames_THW3: FloatArray, masks_THW: npt.NDArray[np.bool_]) -> str | None:
    hue = _hue_degrees(np.median(frames_THW3[masks_THW], axis=0))
    errors = {name: abs((hue - _hue_degrees(np.array(rgb)) + 180) % 360 - 180) for name, rgb in COLOURS.items()}
    nearest = min(errors, key=lambda name: errors[name])
    return nearest if errors[nearest] < _MAX_HUE_ERROR_DEGREES else None


def _hue_degrees(rgb: FloatArray) -> float:
    return 360 * colorsys.rgb_to_hsv(*np.clip(rgb, 0, 1))[0]


def _direction(masks_THW: npt.NDArray[np.bool_], visible: list[int]) -> str | None:
    """Where the centre went between the first and the last third of the visible frames."""
    centres_T2 = np.array([np.argwhere(masks_THW[t]).mean(axis=0)[::-1] for t in visible])
    third = max(1, len(visible) // 3)
    elapsed = np.mean(visible[-third:]) - np.mean(visible[:third])
    travel = (centres_T2[-third:].mean(axis=0) - centres_T2[:third].mean(axis=0)) * len(masks_THW) / max(elapsed, 1)
    along = {name: float(travel @ unit) for name, unit in DIRECTIONS.items()}
    name = max(along, key=lambda key: along[key])
    across = float(np.abs(travel).min())
    return name if along[name] > max(_MIN_TRAVEL_PIXELS, _MIN_TRAVEL_RATIO * across) else None


def _shape(masks_THW: npt.NDArray[np.bool_]) -> str | None:
    """The pattern with the greatest overlap (intersection over union) in the median frame, if it fits at all."""
    scores = {shape: float(np.median([_overlap(mask, shape) for mask in masks_THW])) for shape in SHAPES}
    best, second = sorted(scores, key=lambda shape: -scores[shape])[:2]
    return best if scores[best] > _MIN_OVERLAP and scores[best] - scores[second] > _MIN_LEAD else None


# Intersection over union with a pattern of equal area and centre: the right pattern has 0.99 or more on drawn clips,
# a circle and a square of equal area 0.83, either with a triangle 0.7.
_MIN_OVERLAP = 0.80
_MIN_LEAD = 0.02


# Area of each shape with a radius of one pixel, in its own norm.
_UNIT_AREAS = {"circle": np.pi, "square": 4.0, "triangle": 3 * np.sqrt(3)}


def _overlap(mask_HW: npt.NDArray[np.bool_], shape: str) -> float:
    points_N2 = np.argwhere(mask_HW)
    rows, columns = np.indices(mask_HW.shape)
    y, x = points_N2.mean(axis=0)
    pattern_HW = distance_from_centre(shape, columns - x, rows - y) < np.sqrt(len(points_N2) / _UNIT_AREAS[shape])
    return float((pattern_HW & mask_HW).sum() / (pattern_HW | mask_HW).sum())
