"""Reads colour, shape and direction off the frames of a clip of the moving-shapes world, by rule.

No network judges: the foreground is what differs from the background, its colour is the nearest hue, its direction the
way its centre of mass went, its shape the pattern that fits its outline best. Each answer may be None, "can't tell",
which scores as wrong. The rules tolerate the blur and colour shifts of a small VAE; they do not tolerate two shapes, a
shape that breaks up, or one that stands still, because a model that makes these has not followed its prompt.

Legend: T frames, H height, W width, N foreground pixels, A angles.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiny_world.shapes import COLOURS, DIRECTIONS, ShapesClip

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """What a clip shows; None where the frames do not tell."""

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


def read_clip(video_THW3: npt.NDArray[np.generic]) -> Reading:
    """Read one clip.

    Args:
        video_THW3: RGB frames [T, H, W, 3], uint8 in [0, 255] or floats in [0, 1].

    Raises:
        ValueError: another shape or dtype.
    """
    frames_THW3 = _as_unit_floats(video_THW3)
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


def prompt_accuracy(videos: Sequence[npt.NDArray[np.generic]], wanted: Sequence[ShapesClip]) -> dict[str, float]:
    """Share of videos in which colour, shape and direction are all as wanted, and the share for each alone.

    Keys: `prompt_accuracy`, `colour_accuracy`, `shape_accuracy`, `direction_accuracy`. Raises `ValueError` when the two
    sequences differ in length or are empty.
    """
    if len(videos) != len(wanted) or not videos:
        raise ValueError(
            f"{len(videos)} videos and {len(wanted)} descriptions: pass one description a video, at least one"
        )
    seen = [read_clip(video) for video in videos]
    names = ("colour", "shape", "direction")
    right = np.array(
        [[getattr(s, name) == getattr(w, name) for name in names] for s, w in zip(seen, wanted, strict=True)]
    )
    scores = {f"{name}_accuracy": float(share) for name, share in zip(names, right.mean(axis=0), strict=True)}
    return {"prompt_accuracy": float(right.all(axis=1).mean()), **scores}


def _as_unit_floats(video_THW3: npt.NDArray[np.generic]) -> FloatArray:
    if video_THW3.ndim != 4 or video_THW3.shape[-1] != 3:
        raise ValueError(f"a video has shape {video_THW3.shape}, but [frames, height, width, 3] is read; permute it")
    if video_THW3.dtype == np.uint8:
        return video_THW3.astype(np.float64) / 255
    if not np.issubdtype(video_THW3.dtype, np.floating):
        raise ValueError(f"a video has dtype {video_THW3.dtype}, but uint8 or floats in [0, 1] are read; convert it")
    return video_THW3.astype(np.float64)


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
    scores = {shape: float(np.median([_overlap(mask, shape) for mask in masks_THW])) for shape in _PATTERNS}
    best, second = sorted(scores, key=lambda shape: -scores[shape])[:2]
    return best if scores[best] > _MIN_OVERLAP and scores[best] - scores[second] > _MIN_LEAD else None


# Intersection over union with a pattern of equal area and centre: the right pattern has 0.99 or more on drawn clips,
# a circle and a square of equal area 0.83, either with a triangle 0.7.
_MIN_OVERLAP = 0.80
_MIN_LEAD = 0.02


def _circle(dx: FloatArray, dy: FloatArray, area: float) -> npt.NDArray[np.bool_]:
    return np.hypot(dx, dy) < np.sqrt(area / np.pi)


def _square(dx: FloatArray, dy: FloatArray, area: float) -> npt.NDArray[np.bool_]:
    return np.maximum(np.abs(dx), np.abs(dy)) < np.sqrt(area) / 2


def _triangle(dx: FloatArray, dy: FloatArray, area: float) -> npt.NDArray[np.bool_]:
    inradius = np.sqrt(area / (3 * np.sqrt(3)))
    return np.maximum(np.abs(dx) * np.sqrt(3) / 2 - dy / 2, dy) < inradius


_PATTERNS = {"circle": _circle, "square": _square, "triangle": _triangle}


def _overlap(mask_HW: npt.NDArray[np.bool_], shape: str) -> float:
    points_N2 = np.argwhere(mask_HW)
    rows, columns = np.indices(mask_HW.shape)
    y, x = points_N2.mean(axis=0)
    pattern_HW = _PATTERNS[shape](columns - x, rows - y, float(len(points_N2)))
    return float((pattern_HW & mask_HW).sum() / (pattern_HW | mask_HW).sum())
