"""Videos as files: mp4s to play, and a contact sheet to compare many at a glance.

The sheet has one row a prompt and one column a sampler (teacher, student before, student now); a cell is a filmstrip of
frames evenly spread over the video. All cells of a row started from the same noise, so differences are the sampler's.

Shapes: T frames, H and W height and width in pixels; videos are uint8 RGB `[T, H, W, 3]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Style:
    """Sizes in pixels and colours of a contact sheet."""

    margin: int = 28
    frame_gap: int = 2
    column_gap: int = 26
    row_gap: int = 22
    caption_gap: int = 7
    title_size: int = 19
    caption_size: int = 15
    background: str = "#ffffff"
    ink: str = "#1c1e21"
    faint_ink: str = "#6b7178"
    rule: str = "#d9dce0"

    @property
    def title_font(self) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        return ImageFont.load_default(self.title_size)

    @property
    def caption_font(self) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        return ImageFont.load_default(self.caption_size)


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
        columns: title and videos of each sampler, one video a prompt; all videos of one size. What follows the first
            line break of a title is set smaller below it (a score, say).
        captions: the prompts, one a row; Pillow's own font has no other than Latin letters, the rest shows as boxes.
        frames_per_video: frames of a cell, first and last included; fewer when the video is shorter.
        frame_height: height of a frame on the sheet; frames are scaled to it.
    """
    assert all(len(videos) == len(captions) for _, videos in columns), "every column has one video a caption"
    style = _Style()
    strips = [
        [_filmstrip(thumbnails(video, frames_per_video, frame_height), style) for video in videos]
        for _, videos in columns
    ]
    strip_width, strip_height = strips[0][0].size
    titles = [title.split("\n", 1) for title, _ in columns]
    header = style.title_size + 12 + (style.caption_size + 6) * any(len(lines) == 2 for lines in titles)
    caption_height = style.caption_size + style.caption_gap
    row_height = caption_height + strip_height + style.row_gap
    width = 2 * style.margin + len(columns) * (strip_width + style.column_gap) - style.column_gap
    height = 2 * style.margin + header + len(captions) * row_height

    sheet = Image.new("RGB", (width, height), style.background)
    draw = ImageDraw.Draw(sheet)
    lefts = [style.margin + index * (strip_width + style.column_gap) for index in range(len(columns))]
    for left, lines in zip(lefts, titles, strict=True):
        _draw_title(draw, left, lines, strip_width, style)
    rule_y = style.margin + header
    draw.line([(style.margin, rule_y), (width - style.margin, rule_y)], fill=style.rule)

    for row, caption in enumerate(captions):
        top = rule_y + style.row_gap + row * row_height
        text = _shortened(draw, caption, width - 2 * style.margin, style.caption_font)
        draw.text((style.margin, top), text, style.ink, style.caption_font)
        for left, column in zip(lefts, strips, strict=True):
            sheet.paste(column[row], (left, top + caption_height))
    sheet.save(path)


def _draw_title(draw: ImageDraw.ImageDraw, left: int, lines: list[str], width: int, style: _Style) -> None:
    draw.text((left, style.margin), _shortened(draw, lines[0], width, style.title_font), style.ink, style.title_font)
    if len(lines) == 2:
        note = _shortened(draw, lines[1], width, style.caption_font)
        draw.text((left, style.margin + style.title_size + 7), note, style.faint_ink, style.caption_font)


def thumbnails(video_THW3: Video, num_frames: int = FRAMES_PER_VIDEO, height: int = FRAME_HEIGHT) -> Video:
    """Evenly spread frames, the first and the last included, scaled smoothly to `height`: pixels are not what a viewer
    should judge. Fewer where the video is shorter; those of thumbnails are themselves."""
    positions = np.linspace(0, len(video_THW3) - 1, min(num_frames, len(video_THW3))).round().astype(int)
    size = round(video_THW3.shape[2] * height / video_THW3.shape[1]), height
    frames = (Image.fromarray(video_THW3[position]) for position in positions)
    return np.stack([np.asarray(frame.resize(size, Image.Resampling.LANCZOS)) for frame in frames])


def _filmstrip(frames_THW3: Video, style: _Style) -> Image.Image:
    """Frames side by side."""
    num_frames, height, width, _ = frames_THW3.shape
    step = width + style.frame_gap
    strip = Image.new("RGB", (num_frames * step - style.frame_gap, height), style.background)
    for index, frame in enumerate(frames_THW3):
        strip.paste(Image.fromarray(frame), (index * step, 0))
    return strip


def _shortened(
    draw: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    """The text on one line, cut with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text.rstrip() + "…"
