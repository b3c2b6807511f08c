"""Reader of video files: decodes, resamples in time, resizes and crops, and cuts into clips.

Each frame is resized right after it is decoded, and freed when the clips that contain it are complete. An hour of 4K
video therefore needs no more memory than one clip. Times come from the frames' timestamps, so variable frame rates are
handled correctly. Pixels are assumed to be square. Rotation metadata is applied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    import av

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")

_DURATION_TOLERANCE_SECONDS = 0.25
_MAX_STANDSTILL_SECONDS = 600.0


class TimedFrame(NamedTuple):
    """A decoded frame, and the interval in seconds during which it is shown."""

    start: float
    end: float
    frame: av.VideoFrame


class Clip(NamedTuple):
    """Consecutive frames of one video."""

    pixels: Tensor  # [T, 3, H, W] uint8 RGB
    duration_seconds: float


@dataclass(frozen=True)
class VideoSize:
    """Size of a clip in frames and pixels. `fps` is in frames per second; None uses every frame of the video."""

    num_frames: int
    height: int
    width: int
    fps: float | None = None


def read_clips(path: Path, size: VideoSize, stride: int | None = None) -> Iterator[Clip]:
    """The clips of a video.

    Args:
        path: anything FFmpeg decodes.
        size: size of a clip. Frames are resampled by nearest timestamp, scaled to cover height × width, and cropped at
            the centre.
        stride: frames between the starts of two clips, counted after resampling. Default: `size.num_frames`, which
            cuts without overlap.

    Raises:
        ValueError: the file can't be decoded, ends before its stated duration or is shorter than one clip.
    """
    from av.video.reformatter import VideoReformatter

    num_frames, stride = size.num_frames, stride or size.num_frames
    frames = decode(path) if size.fps is None else resample(decode(path), size.fps)
    # PyAV 19 shares one among all frames, even in a forked data worker, where it waits for threads that are not there.
    reformatter = VideoReformatter()
    window: deque[tuple[float, float, Tensor]] = deque(maxlen=num_frames)
    count = 0
    for count, (start, end, frame) in enumerate(frames, start=1):
        window.append((start, end, _fit(reformatter.reformat(frame, format="rgb24"), size.height, size.width)))
        if count >= num_frames and (count - num_frames) % stride == 0:
            duration = window[-1][1] - window[0][0]
            yield Clip(torch.stack([pixels for _, _, pixels in window]), duration)
    if count < num_frames:
        rate = "" if size.fps is None else f" at {size.fps:g} frames per second"
        raise ValueError(
            f"{path} has {count} frames{rate}, but a clip needs {num_frames}; take longer footage, or ask for fewer"
        )


def read_picture(path: Path, height: int, width: int) -> Tensor:
    """Reads a picture, or a video's first frame, scaled to cover height × width and cropped: uint8 [height, width, 3].

    Raises:
        ValueError: the file is missing or can't be decoded.
    """
    if not path.is_file():
        raise ValueError(f"there is no picture {path}; correct the path")
    return next(read_clips(path, VideoSize(1, height, width))).pixels[0].permute(1, 2, 0)


def decode(path: Path) -> Iterator[TimedFrame]:
    """Yields all frames of the first video stream, in order of display.

    Raises:
        ValueError: not a video, damaged, or shorter than its header says.
    """
    import av  # 35 MB that training on latents does without

    try:
        # Titles and the like are not read, so their encoding does not matter; from PyAV 19 on it never does.
        lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
        with av.open(str(path), **lenient) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream; take a file with one")
            stream = container.streams.video[0]
            interval = float(1 / (stream.average_rate or 25))
            first = last = None
            for frame in container.decode(stream):
                start = frame.time if frame.time is not None else (last.end if last else 0.0)
                duration = float(frame.duration * frame.time_base) if frame.duration else interval
                if start + duration - (last.start if last else start) > _MAX_STANDSTILL_SECONDS:
                    # A damaged timestamp; resampled, the frame before it would be repeated for hours, or without end.
                    raise ValueError(
                        f"{path} shows one frame for over {_MAX_STANDSTILL_SECONDS:g} seconds: its "
                        "timestamps are damaged, so take a copy that is encoded anew"
                    )
                last = TimedFrame(start, start + duration, frame)
                first = first or last
                yield last
            decoded = last.end - first.start if first and last else 0.0
            expected = _stated_duration(container, stream)
    except av.FFmpegError as error:
        raise ValueError(f"{path} can't be decoded ({error.strerror}): it is truncated or no video") from error
    if decoded < expected - _DURATION_TOLERANCE_SECONDS:
        raise ValueError(f"{path} is truncated: {decoded:.2f} of {expected:.2f} seconds could be decoded")


def _stated_duration(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Returns the duration in the header, in seconds; 0 if the header has none."""
    import av

    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    # A container lasts as long as its longest stream, which may be the sound.
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / av.time_base
    return 0.0


def resample(frames: Iterable[TimedFrame], fps: float) -> Iterator[TimedFrame]:
    """Yields, for each time k / fps after the first frame's start, the frame whose start is nearest.

    It is not the frame on screen at that time: timestamps are rounded (to milliseconds in Matroska), and a frame that
    seems to start slightly late must not be replaced by its predecessor.
    """
    tick = 0
    origin: float | None = None
    for frame, following in pairwise(chain(frames, [None])):
        assert frame is not None, "only the last one is"
        next_start = following.start if following else frame.end
        origin = frame.start if origin is None else origin
        while (instant := origin + tick / fps) < (frame.start + next_start) / 2:
            yield TimedFrame(instant, instant + 1 / fps, frame.frame)
            tick += 1


def _fit(frame: av.VideoFrame, height: int, width: int) -> Tensor:
    """Scales an RGB frame to cover height × width and crops its centre: uint8 `[3, height, width]`."""
    upright = np.rot90(frame.to_ndarray(), k=round(frame.rotation / 90))
    pixels_HWC = torch.from_numpy(np.ascontiguousarray(upright))
    scale = max(height / pixels_HWC.shape[0], width / pixels_HWC.shape[1])
    size = [max(height, round(scale * pixels_HWC.shape[0])), max(width, round(scale * pixels_HWC.shape[1]))]
    scaled_CHW = interpolate(pixels_HWC.permute(2, 0, 1)[None].float(), size, mode="bicubic", antialias=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled_CHW[:, top : top + height, left : left + width].round().clamp(0, 255).to(torch.uint8)


def read_mp4(path: Path | str) -> tuple[npt.NDArray[np.uint8], float]:
    """Reads all frames `[T, H, W, 3]` of a video that `write_mp4` wrote, and its frames per second."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate is not None, "write_mp4 states a rate"
        return np.stack(frames), float(stream.average_rate)
