"""The shapes world: what is drawn is what was asked for, and held-out combinations stay held out."""

import ast
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_world
from tiny_world.shapes import (
    CAPTION_TEMPLATES,
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    SHAPES,
    ShapesClip,
    all_attributes,
    draw_clip,
    held_out_attributes,
    parse_caption,
    train_attributes,
)

HELD_OUT_PROMPTS = Path(__file__).parents[1] / "assets/tiny_shapes/held_out_prompts.txt"


def _foreground(clip: ShapesClip, seed: int) -> np.ndarray:
    frames_THW3 = draw_clip(clip, np.random.default_rng(seed)).astype(int)
    return np.ptp(frames_THW3, axis=-1) > 20


def test_a_clip_has_the_documented_form_and_follows_from_its_seed() -> None:
    clip = ShapesClip("red", "circle", "left", "slow")
    first, again, other = (draw_clip(clip, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (17, 96, 96, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("clip", all_attributes(), ids=lambda clip: clip.caption())
def test_the_shape_stays_wholly_visible(clip: ShapesClip) -> None:
    mask_THW = _foreground(clip, seed=0)
    assert mask_THW.any(axis=(1, 2)).all()
    assert not mask_THW[:, [0, -1], :].any() and not mask_THW[:, :, [0, -1]].any()


@pytest.mark.parametrize(("speed", "pixels"), [("slow", 16 * 1.0), ("fast", 16 * 2.2)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_motion_has_the_stated_direction_and_speed(direction: str, speed: str, pixels: float) -> None:
    mask_THW = _foreground(ShapesClip("blue", "circle", direction, speed), seed=3)
    first, last = (np.argwhere(mask_THW[t]).mean(axis=0)[::-1] for t in (0, -1))
    np.testing.assert_allclose(last - first, np.array(DIRECTIONS[direction]) * pixels, atol=0.3)


def test_edges_are_anti_aliased() -> None:
    frame_HW3 = draw_clip(ShapesClip("green", "triangle", "up", "slow"), np.random.default_rng(0))[0]
    assert len(np.unique(frame_HW3[..., 1])) > 10


def test_held_out_combinations_form_a_latin_square() -> None:
    assert len(HELD_OUT) == 12
    for position, values in enumerate((COLOURS, SHAPES, DIRECTIONS)):
        counts = [sum(combination[position] == value for combination in HELD_OUT) for value in values]
        assert len(set(counts)) == 1
    train = {clip.combination for clip in train_attributes()}
    for first, second in itertools.combinations(range(3), 2):
        pairs = {(words[first], words[second]) for words in train}
        assert len(pairs) == len({(c.combination[first], c.combination[second]) for c in all_attributes()})


def test_training_and_held_out_clips_share_nothing_and_leave_nothing_out() -> None:
    train, held_out = set(train_attributes()), set(held_out_attributes())
    assert (len(train), len(held_out)) == (72, 24)
    assert not train & held_out and train | held_out == set(all_attributes())


def test_the_shipped_held_out_prompts_are_balanced() -> None:
    clips = [parse_caption(line) for line in HELD_OUT_PROMPTS.read_text().splitlines()]
    assert {clip.combination for clip in clips} == HELD_OUT
    assert set(Counter(clips).values()) == {4} and len(clips) == 96


def test_captions_can_be_told_apart_and_fit_the_text_length() -> None:
    captions = [clip.caption(i) for clip in all_attributes() for i in range(len(CAPTION_TEMPLATES))]
    assert len(set(captions)) == len(captions)
    assert max(len(caption.encode()) for caption in captions) <= 63


@pytest.mark.parametrize("template", range(len(CAPTION_TEMPLATES)))
def test_a_caption_parses_back_to_its_clip(template: int) -> None:
    assert [parse_caption(clip.caption(template)) for clip in all_attributes()] == all_attributes()


def test_errors_name_the_value_and_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="'purple' is not drawn here; choose one of red, green"):
        ShapesClip("purple", "circle", "left", "slow")
    with pytest.raises(ValueError, match="'a cat' does not describe"):
        parse_caption("a cat")


def test_the_package_imports_only_the_registry_of_titan_distill() -> None:
    """As a user's own package would."""
    imported = {
        node.module
        for file in Path(tiny_world.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("titan_distill")
    }
    assert imported == {"titan_distill.registry"}
