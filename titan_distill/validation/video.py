"""Writer of videos: mp4 files to play, and a contact sheet to compare many at a glance.

The sheet has one row per prompt and one column per sampler (teacher, student before, student now); a cell is a
filmstrip of frames evenly spread over the video. All cells of a row started from the same noise, so differences are the
sampler's.

Shapes: T frames, H and W height and width in pixels; videos are uint8 RGB `[T, H, W, 3]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Video = npt.NDArray[np.uint8]

FRAMES_PER_VIDEO, FRAME_HEIGHT = 5, 96
"""Frames of a video on the contact sheet, and their height in pixels."""

CODECS = {"libx264": {"crf": "16"}, "mpeg4": {"qscale": "3"}}
"""Encoders in the order of preference: H.264 plays everywhere, MPEG-4 part 2 is in every FFmpeg. Quality settings are
near transparent: these files are looked at to judge a model, so the codec must not add artefacts of its own."""


def write_mp4(path: Path | str, video_THW3: Video, fps: int) -> None:
    """Writes an mp4 that plays everywhere (H.264, yuv420p, which cannot hold odd sizes: ValueError)."""
    _, height, width, _ = video_THW3.shape
    if height % 2 or width % 2:
        raise ValueError(f"a video of {width}×{height} pixels cannot be written as mp4; both sizes must be even")
    import av  # 35 MB that runs without videos do without

    codec = next(name for name in CODECS if name in av.codecs_available)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=CODECS[codec])
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in video_THW3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


MARGIN, FRAME_GAP, COLUMN_GAP, ROW_GAP, CAPTION_GAP = 28, 2, 26, 22, 7
"""Distances on a contact sheet in pixels."""
TITLE_SIZE, CAPTION_SIZE = 19, 15
"""Font sizes in pixels."""
BACKGROUND, INK, FAINT_INK, RULE = "#ffffff", "#1c1e21", "#6b7178", "#d9dce0"


def contact_sheet(
    path: Path | str,
    columns: Sequence[tuple[str, Sequence[Video]]],
    captions: Sequence[str],
    frames_per_video: int = FRAMES_PER_VIDEO,
    frame_height: int = FRAME_HEIGHT,
) -> None:
    """Writes one PNG that compares the videos of each prompt across samplers.

    `thumbnails` of the videos give the same sheet as the videos themselves.

    Args:
        columns: title and videos of each sampler, one video per prompt; all videos of one size. The part of a title
            after its first line break is set smaller below it (a score, say).
        captions: the prompts, one per row; Pillow's own font has Latin letters only, others show as boxes.
        frames_per_video: frames of a cell, first and last included; fewer when the video is shorter.
        frame_height: height of a frame on the sheet; frames are scaled to it.
    """
    assert all(len(videos) == len(captions) for _, videos in columns), "every column has one video a caption"
    strips = [
        [_filmstrip(thumbnails(video, frames_per_video, frame_height)) for video in videos] for _, videos in columns
    ]
    strip_width, strip_height = strips[0][0].size
    titles = [title.split("\n", 1) for title, _ in columns]
    header = TITLE_SIZE + 12 + (CAPTION_SIZE + 6) * any(len(lines) == 2 for lines in titles)
    caption_height = CAPTION_SIZE + CAPTION_GAP
    row_height = caption_height + strip_height + ROW_GAP
    width = 2 * MARGIN + len(columns) * (strip_width + COLUMN_GAP) - COLUMN_GAP
    height = 2 * MARGIN + header + len(captions) * row_height

    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    lefts = [MARGIN + index * (strip_width + COLUMN_GAP) for index in range(len(columns))]
    for left, (title, *notes) in zip(lefts, titles, strict=True):
        _write(draw, (left, MARGIN), title, strip_width, TITLE_SIZE, INK)
        for note in notes:
            _write(draw, (left, MARGIN + TITLE_SIZE + 7), note, strip_width, CAPTION_SIZE, FAINT_INK)
    rule_y = MARGIN + header
    draw.line([(MARGIN, rule_y), (width - MARGIN, rule_y)], fill=RULE)

    for row, caption in enumerate(captions):
        top = rule_y + ROW_GAP + row * row_height
        _write(draw, (MARGIN, top), caption, width - 2 * MARGIN, CAPTION_SIZE, INK)
        for left, column in zip(lefts, strips, strict=True):
            sheet.paste(column[row], (left, top + caption_height))
    sheet.save(path)


def thumbnails(video_THW3: Video, num_frames: int = FRAMES_PER_VIDEO, height: int = FRAME_HEIGHT) -> Video:
    """Evenly spread frames, the first and the last included, scaled smoothly to `height`: pixels are not what a viewer
    should judge. Fewer where the video is shorter; those of thumbnails are themselves."""
    positions = np.linspace(0, len(video_THW3) - 1, min(num_frames, len(video_THW3))).round().astype(int)
    size = round(video_THW3.shape[2] * height / video_THW3.shape[1]), height
    frames = (Image.fromarray(video_THW3[position]) for position in positions)
    return np.stack([np.asarray(frame.resize(size, Image.Resampling.LANCZOS)) for frame in frames])


def _filmstrip(frames_THW3: Video) -> Image.Image:
    """Frames side by side."""
    num_frames, height, width, _ = frames_THW3.shape
    step = width + FRAME_GAP
    strip = Image.new("RGB", (num_frames * step - FRAME_GAP, height), BACKGROUND)
    for index, frame in enumerate(frames_THW3):
        strip.paste(Image.fromarray(frame), (index * step, 0))
    return strip


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int, size: int, ink: str) -> None:
    """Writes text on one line, cut with an ellipsis where it is wider than `width` pixels."""
    font = ImageFont.load_default(size)
    text = shown = " ".join(text.split())
    while text and draw.textlength(shown, font) > width:
        text = text[:-1]
        shown = text.rstrip() + "…"
    draw.text(at, shown, ink, font)
