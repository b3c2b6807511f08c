"""Videos of the page: for each prompt one film that shows the samples side by side.

Columns in one film play in step by construction: no script has to keep several players together. The films are encoded
again, at most `MAX_HEIGHT` pixels high, because the page carries them inside. If together they are larger than
`BUDGET_BYTES`, prompts are left out from the last one on; if the first one alone is too large, it is made smaller.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from titan_distill.validation.report.run_files import RunFiles, Sampled

MAX_HEIGHT, MAX_WIDTH, NUM_PROMPTS = 256, 3840, 4
"""Size of a film in pixels, at most; number of films of a page, at most."""
GAP = 8
"""Pixels between two columns."""
BUDGET_BYTES = 5_000_000
"""Size of all films of a page, as base64 text."""
CODECS = (("libx264", "mp4", {"crf": "23"}), ("libvpx-vp9", "webm", {"crf": "32", "b": "0"}))
"""Encoder, container and options, in order of preference. Every browser plays either."""

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Column:
    """A set of samples: the heading of its column, a note below it, and where its videos are."""

    heading: str
    note: str
    folder: Path
    label: str
    prompts: dict[int, str]

    def file(self, index: int, prompt: str) -> Path | None:
        """The video of a prompt; None if the set has none."""
        path = self.folder / f"{index:03d}-{self.label}.mp4"
        return path if self.prompts.get(index) == prompt and path.is_file() else None


@dataclass(frozen=True)
class Film:
    """The film of one prompt, ready for the page."""

    prompt: str
    source: str
    """Data URI."""
    width: int
    height: int
    fps: float
    num_frames: int
    columns: list[tuple[float, float]]
    """Left edge and width of each column, as shares of the film's width."""


def columns(runs: Sequence[RunFiles]) -> list[Column]:
    """Returns the columns: the reference and the role before training (of the first run), and the role now (of every
    run). Without a baseline from before training, the first validation takes its place."""
    found: list[Column] = []
    for number, run in enumerate(run for run in runs if run.latest):
        newest, oldest = run.validations[-1], run.validations[0]
        if number == 0 and newest.reference:
            found.append(_column(newest, newest.reference.label, newest.reference.role.capitalize()))
        if number == 0 and newest.before:
            found.append(_column(newest, newest.before.label, "Before training"))
        elif number == 0 and newest.now and oldest.step < newest.step:
            heading = "Before training" if oldest.step == 0 else f"At step {oldest.step}"
            found.append(_column(oldest, newest.now.label, heading))
        if newest.now and (newest.step > 0 or not newest.before):
            heading = f"Now, step {newest.step}" if len(runs) == 1 else f"{run.name}, step {newest.step}"
            found.append(_column(newest, newest.now.label, heading))
    return found


def _column(sampled: Sampled, label: str, heading: str) -> Column:
    sample = next(sample for sample in sampled.request.samples if sample.label == label)
    num_steps = len(sample.sigmas) if sample.sigmas else sample.num_steps
    note = f"{num_steps} step{'s' if num_steps > 1 else ''}"
    if sample.guidance_scale != 1:
        note += f", guidance {sample.guidance_scale:g}"
    return Column(heading, note, sampled.folder, label, sampled.prompts)


def films(shown: Sequence[Column], budget_bytes: int = BUDGET_BYTES) -> tuple[list[Film], str]:
    """Returns the films of prompts that have a video in every column, from the first to the last of them, and one
    sentence on films that were left out; it is empty if none was."""
    if not shown:
        return [], ""
    prompts = [(index, text) for index, text in shown[0].prompts.items() if all(c.file(index, text) for c in shown)]
    if len(prompts) > NUM_PROMPTS:  # neighbours in a list of prompts tend to be alike
        prompts = [prompts[round(k * (len(prompts) - 1) / (NUM_PROMPTS - 1))] for k in range(NUM_PROMPTS)]
    made: list[Film] = []
    damaged = ""
    for index, text in prompts:
        files = [path for column in shown if (path := column.file(index, text))]
        room = budget_bytes - sum(len(film.source) for film in made)
        try:
            film = _film(text, files, MAX_HEIGHT)
        except ValueError as error:
            damaged = f"Left out: {error}."
            continue
        for height in () if made else (MAX_HEIGHT // 2, MAX_HEIGHT // 4):
            film = film if len(film.source) <= room else _film(text, files, height)
        if len(film.source) > room:
            kept = f"the first {len(made)} of {len(prompts)} prompts" if made else "no prompt"
            return made, f"The page has {kept}: all videos in it may take {budget_bytes / 1e6:g} MB."
        made.append(film)
    return made, damaged


def _film(prompt: str, files: Sequence[Path], max_height: int) -> Film:
    videos, fps = [], 1.0
    for path in files:
        frames_THW3, fps = _read(path)
        videos.append(frames_THW3)
    height = min(max_height, max(video.shape[1] for video in videos))
    total = sum(video.shape[2] * height / video.shape[1] + GAP for video in videos)
    height = _even(height * min(1.0, MAX_WIDTH / total))
    widths = [_even(video.shape[2] * height / video.shape[1]) for video in videos]
    lefts = [sum(widths[:index]) + GAP * index for index in range(len(widths))]
    width, num_frames = lefts[-1] + widths[-1], max(len(video) for video in videos)
    film_THW3 = np.zeros((num_frames, height, width, 3), np.uint8)
    for left, own, video in zip(lefts, widths, videos, strict=True):
        scaled = _scale(video, own, height)
        for index in range(num_frames):  # a shorter video rests on its last frame
            film_THW3[index, :, left : left + own] = scaled[min(index, len(scaled) - 1)]
    source = _encode(film_THW3, fps)
    edges = [(left / width, own / width) for left, own in zip(lefts, widths, strict=True)]
    return Film(prompt, source, width, height, fps, num_frames, edges)


def _even(size: float) -> int:
    return max(2, 2 * round(size / 2))


def _read(path: Path) -> tuple[Frames, float]:
    import av  # 35 MB that runs without videos do without

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            fps = float(stream.average_rate or 8)
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is no video that can be played ({error})") from error
    if not frames:
        raise ValueError(f"{path} is a video without frames")
    return np.stack(frames), fps


def _scale(video_THW3: Frames, width: int, height: int) -> Frames:
    import av

    if video_THW3.shape[1:3] == (height, width):
        return video_THW3
    scaled = (
        av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        .reformat(width, height, interpolation="AREA")
        .to_ndarray()
        for image in video_THW3
    )
    return np.stack([*scaled])


def _encode(film_THW3: Frames, fps: float) -> str:
    """Returns a film as a data URI."""
    import av

    codec, container_format, options = next(choice for choice in CODECS if choice[0] in av.codecs_available)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=round(fps), options=options)
        stream.height, stream.width, stream.pix_fmt = film_THW3.shape[1], film_THW3.shape[2], "yuv420p"
        for image in film_THW3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return f"data:video/{container_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"
