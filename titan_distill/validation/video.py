"""Writer of videos: mp4 files to play, and a contact sheet to compare many at a glance.

The contact sheet has one row per prompt and one column per sampler (teacher, student before training, student now). A
cell shows frames evenly spread over the video. All cells of a row start from the same noise, so they differ only by the
sampler.

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
"""Number of frames of a video on the contact sheet, and their height in pixels."""

CODECS = {"libx264": {"crf": "16"}, "mpeg4": {"qscale": "3"}}
"""Video encoders in order of preference: H.264 plays everywhere, and every FFmpeg has MPEG-4 part 2. The quality is
high, because the videos are used to judge a model and the codec must not add visible artefacts."""


def write_mp4(path: Path | str, video_THW3: Video, fps: int) -> None:
    """Writes an mp4 that plays everywhere (H.264, yuv420p). Raises ValueError for an odd height or width, which yuv420p
    does not support."""
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

    The videos may be replaced by their `thumbnails`; the sheet is then the same.

    Args:
        columns: title and videos of each sampler, one video per prompt, all of one size. The part of a title after a
            line break (a score, for instance) is set below it in smaller type.
        captions: prompts, one per row. Pillow's font has only Latin letters; other letters appear as boxes.
        frames_per_video: number of frames in a cell, first and last included; fewer if the video is shorter.
        frame_height: height in pixels to which frames are scaled.
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
    """Returns `num_frames` evenly spread frames, the first and the last included, scaled smoothly to `height`.

    A shorter video gives fewer frames. Thumbnails of thumbnails are the same thumbnails.
    """
    positions = np.linspace(0, len(video_THW3) - 1, min(num_frames, len(video_THW3))).round().astype(int)
    size = round(video_THW3.shape[2] * height / video_THW3.shape[1]), height
    frames = (Image.fromarray(video_THW3[position]) for position in positions)
    return np.stack([np.asarray(frame.resize(size, Image.Resampling.LANCZOS)) for frame in frames])


def _filmstrip(frames_THW3: Video) -> Image.Image:
    """Returns the frames side by side as one picture."""
    num_frames, height, width, _ = frames_THW3.shape
    step = width + FRAME_GAP
    strip = Image.new("RGB", (num_frames * step - FRAME_GAP, height), BACKGROUND)
    for index, frame in enumerate(frames_THW3):
        strip.paste(Image.fromarray(frame), (index * step, 0))
    return strip


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int, size: int, ink: str) -> None:
    """Writes text on one line. Text wider than `width` pixels is cut and ends with an ellipsis."""
    font = ImageFont.load_default(size)
    text = shown = " ".join(text.split())
    while text and draw.textlength(shown, font) > width:
        text = text[:-1]
        shown = text.rstrip() + "…"
    draw.text(at, shown, ink, font)
