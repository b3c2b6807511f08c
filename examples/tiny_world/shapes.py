"""Drawn clips of one moving shape: the world of the small model that the examples train.

A clip is fully described by four words: colour, shape, direction and speed. That makes it a test bench for
text-to-video distillation that needs no data set and no human judge: a caption states the four words, a drawing is
exact, and `tiny_world.reader` reads colour, shape and direction back from decoded frames by rule. The
price is a world without occlusion, texture or camera motion; it tells whether a student obeys its prompt and keeps the
teacher's distribution (position, size and brightness vary), not whether it makes beautiful film.

Twelve of the 48 (colour, shape, direction) combinations are never drawn for training. They form a Latin square:
every pair of attribute values is still seen in training, only the triple is new, so a model that scores on them has
learned to compose words and has not memorised captions.

Shape legend: T frames, H height, W width; pixels are uint8 RGB.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

NUM_FRAMES = 17
FRAME_SIZE = 96
FRAMES_PER_SECOND = 8

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.15, 0.12),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.18, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.15),
}
SHAPES = ("circle", "square", "triangle")
# Unit vectors in pixels, x to the right and y down.
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PIXELS_PER_FRAME = {"slow": 1.0, "fast": 2.2}
ADVERBS = {"slow": "slowly", "fast": "quickly"}
WORDS = {"colour": (*COLOURS,), "shape": SHAPES, "direction": (*DIRECTIONS,), "speed": (*PIXELS_PER_FRAME,)}
"""The words that describe a clip, by attribute."""
CAPTION_TEMPLATES = (
    "a {colour} {shape} moving {direction} {adverb}",
    "a {colour} {shape} moves {adverb} {direction}",
    "the {colour} {shape} goes {direction} {adverb}",
)

RADII = {"circle": 1.0, "square": 0.90, "triangle": 1.15 / 2}
"""Radius of each shape in its own norm (`distance_from_centre`) for a size of one pixel: all three look equally large,
and area alone does not give the shape away."""
_REACH = 1.15  # of the triangle's corners, which reach furthest
_MIN_SIZE, _MAX_SIZE = 18.0, 22.0


@dataclass(frozen=True)
class ShapesClip:
    """The four words that describe a clip; raises `ValueError` for a word the world does not know."""

    colour: str
    shape: str
    direction: str
    speed: str

    def __post_init__(self) -> None:
        for name, values in WORDS.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} {getattr(self, name)!r} is not drawn here; choose one of {', '.join(values)}")

    @property
    def combination(self) -> tuple[str, str, str]:
        """The words that the scorer reads and that are held out together: (colour, shape, direction)."""
        return self.colour, self.shape, self.direction

    def caption(self, template: int = 0) -> str:
        """The clip in words, at most 39 bytes, from one of `CAPTION_TEMPLATES`."""
        return CAPTION_TEMPLATES[template].format(
            colour=self.colour, shape=self.shape, direction=self.direction, adverb=ADVERBS[self.speed]
        )


HELD_OUT = frozenset(
    (colour, shape, WORDS["direction"][(i + j) % len(DIRECTIONS)])
    for (i, colour), (j, shape) in product(enumerate(COLOURS), enumerate(SHAPES))
)
"""The 12 (colour, shape, direction) combinations kept for scoring: one direction for each colour and shape."""


def all_attributes() -> list[ShapesClip]:
    """All 96 clips that can be described, in a fixed order."""
    return [ShapesClip(*words) for words in product(*WORDS.values())]


def train_attributes() -> list[ShapesClip]:
    """The 72 clips that training may draw: 36 combinations at two speeds."""
    return [clip for clip in all_attributes() if clip.combination not in HELD_OUT]


def held_out_attributes() -> list[ShapesClip]:
    """The 24 clips of the held-out combinations."""
    return [clip for clip in all_attributes() if clip.combination in HELD_OUT]


def captioned(clips: list[ShapesClip]) -> list[tuple[str, ShapesClip]]:
    """Each clip in the words of each template: (caption, clip)."""
    return [(clip.caption(template), clip) for clip, template in product(clips, range(len(CAPTION_TEMPLATES)))]


def parse_caption(caption: str) -> ShapesClip:
    """The clip that a caption describes: the inverse of `ShapesClip.caption`; raises `ValueError` for other
    sentences."""
    clips = dict(captioned(all_attributes()))
    if caption not in clips:
        raise ValueError(f"caption {caption!r} does not describe a moving shape; write it like {next(iter(clips))!r}")
    return clips[caption]


def draw_clip(clip: ShapesClip, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Draw a clip, uint8 [T=17, H=96, W=96, 3]; size, place and brightness come from `rng`, so a seed fixes every
    pixel.

    The shape stays wholly visible from the first frame to the last.
    """
    size = rng.uniform(_MIN_SIZE, _MAX_SIZE)
    colour = np.array(COLOURS[clip.colour]) * rng.uniform(0.85, 1.0)
    background = np.full(3, rng.uniform(0.06, 0.12))
    centres_T2 = _path(clip, size, rng)
    coverage_THW = np.stack([_coverage(clip.shape, size, x, y) for x, y in centres_T2])
    frames_THW3 = background + coverage_THW[..., None] * (colour - background)
    return np.round(frames_THW3 * 255).astype(np.uint8)


def _path(clip: ShapesClip, size: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    step = np.array(DIRECTIONS[clip.direction]) * PIXELS_PER_FRAME[clip.speed]
    offsets_T2 = np.arange(NUM_FRAMES)[:, None] * step
    margin = size * _REACH + 1
    low = margin - offsets_T2.min(axis=0)
    high = FRAME_SIZE - margin - offsets_T2.max(axis=0)
    assert (low <= high).all(), "sizes and speeds are chosen so that every path fits"
    return rng.uniform(low, high) + offsets_T2


def _coverage(shape: str, size: float, x: float, y: float) -> npt.NDArray[np.float64]:
    """Share of each pixel inside the shape [H, W]: signed distance to the outline, ramped over one pixel
    (anti-aliasing)."""
    rows, columns = np.mgrid[0:FRAME_SIZE, 0:FRAME_SIZE] + 0.5
    distance = distance_from_centre(shape, columns - x, rows - y) - size * RADII[shape]
    return np.clip(0.5 - distance, 0.0, 1.0)


def distance_from_centre(
    shape: str, dx: npt.NDArray[np.float64], dy: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Distance in the shape's own norm: the shape is where it is below the radius."""
    if shape == "circle":
        return np.hypot(dx, dy)
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy))
    # Upright equilateral triangle: the inside of three half-planes.
    return np.maximum(np.abs(dx) * np.sqrt(3) / 2 - dy / 2, dy)
