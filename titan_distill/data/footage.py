"""Reader of video files: decodes, resamples in time, resizes and crops, and cuts into clips.

Each frame is resized right after it is decoded, and freed when the clips that contain it are complete. An hour of 4K
video therefore needs no more memory than one clip. Times come from the frames' timestamps, so variable frame rates are
handled correctly. Rotation in quarter turns and the aspect of pixels are applied as the file states them, both in the
one resize: FFmpeg's filters would resample a second time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
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
_MAX_PIXEL_ASPECT = 10.0
_SEEK_TOLERANCE_SECONDS = 1e-6

Position = tuple[float, float]
"""Place of a crop along height and width: 0 is the upper or left edge of the picture, 0.5 its centre, 1 its end."""
CENTRE: Position = (0.5, 0.5)


class TimedFrame(NamedTuple):
    """A decoded frame, and the interval in seconds during which it is shown."""

    start: float
    end: float
    frame: av.VideoFrame
    pixel_aspect: float = 1.0  # width / height of a stored pixel


class ClipStart(NamedTuple):
    """The place of a clip in its video, at which reading may begin."""

    number: int
    """Number of the clip in its video, from 0."""
    origin: float
    """Start of the video's first frame in seconds."""
    seconds: float
    """Start of the clip in seconds."""


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


def read_clips(
    path: Path,
    size: VideoSize,
    stride: int | None = None,
    *,
    start: ClipStart | None = None,
    position: Callable[[int], Position] = lambda _: CENTRE,
) -> Generator[Clip, None, None]:
    """The clips of a video.

    Args:
        path: anything FFmpeg decodes.
        size: size of a clip. Frames are resampled by nearest timestamp, scaled to cover height × width, and cropped.
        stride: frames between the starts of two clips, counted after resampling. Default: `size.num_frames`, which
            cuts without overlap.
        start: the clip to begin with. The file is read from the nearest key frame before it. Default: the first.
        position: place of the crop by number of the clip. Default: the centre.

    Raises:
        ValueError: the file can't be decoded, ends before its stated duration or is shorter than one clip.
    """
    from av.video.reformatter import VideoReformatter

    num_frames, stride, first = size.num_frames, stride or size.num_frames, start.number if start else 0
    frames: Iterator[TimedFrame] = decode(path, start)
    if size.fps is not None:
        frames = resample(frames, size.fps, start.origin if start else None, first * stride)
    elif start:
        begin = start.seconds - _SEEK_TOLERANCE_SECONDS
        frames = (frame for frame in frames if frame.start >= begin)
    # PyAV 19 shares one among all frames, even in a forked data worker, where it waits for threads that are not there.
    reformatter = VideoReformatter()
    window: deque[tuple[float, float, Tensor]] = deque(maxlen=num_frames)
    count = 0
    for count, frame in enumerate(frames, start=1):
        picture = reformatter.reformat(frame.frame, format="rgb24")
        window.append((frame.start, frame.end, _cover(picture, frame.pixel_aspect, size.height, size.width)))
        if count >= num_frames and (count - num_frames) % stride == 0:
            duration = window[-1][1] - window[0][0]
            place = position(first + (count - num_frames) // stride)
            yield Clip(torch.stack([_crop(pixels, size, place) for _, _, pixels in window]), duration)
    if count < num_frames:
        raise too_short(path, count, size, start)


def too_short(path: Path, count: int, size: VideoSize, start: ClipStart | None = None) -> ValueError:
    """Returns the error for a video of `count` frames, from `start` on, which are too few for a clip."""
    rate = "" if size.fps is None else f" at {size.fps:g} frames per second"
    place = f" from second {start.seconds:.2f} on" if start and start.number else ""
    return ValueError(
        f"{path} has {count} frames{rate}{place}, but a clip needs {size.num_frames}; take longer footage, or ask for "
        "fewer"
    )


def read_picture(path: Path, height: int, width: int) -> Tensor:
    """Reads a picture, or a video's first frame, scaled to cover height × width and cropped: uint8 [height, width, 3].

    Raises:
        ValueError: the file is missing or can't be decoded.
    """
    if not path.is_file():
        raise ValueError(f"there is no picture {path}; correct the path")
    return next(read_clips(path, VideoSize(1, height, width))).pixels[0].permute(1, 2, 0)


def decode(path: Path, start: ClipStart | None = None) -> Iterator[TimedFrame]:
    """Yields the frames of the first video stream, in order of display: all, or those from the key frame before a clip.

    Raises:
        ValueError: not a video, damaged, or shorter than its header says.
    """
    with open_video(path) as (container, stream):
        is_found = start is None or not start.number or _seek(container, stream, start.seconds)
        interval, aspect = frame_interval(stream), pixel_aspect(path, stream)
        first = last = None
        for frame in container.decode(stream) if is_found else ():
            if start and start.number and last is None:
                time = frame.time
                if time is None or time > start.seconds + _SEEK_TOLERANCE_SECONDS:
                    is_found = False  # some formats have no index, and FFmpeg's guess may be late
                    break
            begin = frame.time if frame.time is not None else (last.end if last else 0.0)
            duration = float(frame.duration * frame.time_base) if frame.duration else interval
            check_standstill(path, begin + duration - (last.start if last else begin))
            last = TimedFrame(begin, begin + duration, frame, aspect)
            first = first or last
            yield last
        if is_found:
            origin = start.origin if start else (first.start if first else 0.0)
            check_duration(path, container, stream, last.end - origin if last else 0.0)
    if not is_found:
        yield from decode(path)


def _seek(container: av.container.InputContainer, stream: av.VideoStream, seconds: float) -> bool:
    """Moves to the last key frame before a time. Returns whether the format allows it."""
    import av

    try:
        assert stream.time_base is not None, "an open stream has one"
        container.seek(int(seconds / stream.time_base), stream=stream)
    except av.FFmpegError:
        return False
    return True


@contextmanager
def open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a video and its first stream of pictures. Errors of FFmpeg in the block become one `ValueError`."""
    import av  # 35 MB that training on latents does without

    try:
        # Titles and the like are not read, so their encoding does not matter; from PyAV 19 on it never does.
        lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
        with av.open(str(path), **lenient) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream; take a file with one")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        raise ValueError(f"{path} can't be decoded ({error.strerror}): it is truncated or no video") from error


def frame_interval(stream: av.VideoStream) -> float:
    """Returns the seconds for which a frame without a duration of its own is shown."""
    return float(1 / (stream.average_rate or 25))


def pixel_aspect(path: Path, stream: av.VideoStream) -> float:
    """Returns width / height of a stored pixel; 1 if the file does not say. Raises ValueError for a damaged one."""
    aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    if not 1 / _MAX_PIXEL_ASPECT <= aspect <= _MAX_PIXEL_ASPECT:
        raise ValueError(
            f"{path} has pixels {aspect:g} times as wide as high, and at most {_MAX_PIXEL_ASPECT:g} is plausible: its "
            "header is damaged, so take a copy that is encoded anew"
        )
    return aspect


def check_standstill(path: Path, seconds: float) -> None:
    """Raises ValueError if a frame is shown so long that its timestamp must be damaged. Resampled, it would be repeated
    for hours, or without end."""
    if seconds > _MAX_STANDSTILL_SECONDS:
        raise ValueError(
            f"{path} shows one frame for over {_MAX_STANDSTILL_SECONDS:g} seconds: its timestamps are damaged, so take "
            "a copy that is encoded anew"
        )


def check_duration(path: Path, container: av.container.InputContainer, stream: av.VideoStream, seconds: float) -> None:
    """Raises ValueError if a video of `seconds` is shorter than its header says."""
    expected = _stated_duration(container, stream)
    if seconds < expected - _DURATION_TOLERANCE_SECONDS:
        raise ValueError(f"{path} is truncated: {seconds:.2f} of {expected:.2f} seconds could be decoded")


def _stated_duration(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Returns the duration in the header, in seconds; 0 if the header has none."""
    import av

    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    # A container lasts as long as its longest stream, which may be the sound.
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / av.time_base
    return 0.0


def resample(
    frames: Iterable[TimedFrame], fps: float, origin: float | None = None, tick: int = 0
) -> Iterator[TimedFrame]:
    """Yields, for each time origin + k / fps from k = `tick` on, the frame whose start is nearest. Default origin: the
    first frame's start.

    It is not the frame on screen at that time: timestamps are rounded (to milliseconds in Matroska), and a frame that
    seems to start slightly late must not be replaced by its predecessor.
    """
    for frame, following in pairwise(chain(frames, [None])):
        assert frame is not None, "only the last one is"
        next_start = following.start if following else frame.end
        origin = frame.start if origin is None else origin
        while (instant := origin + tick / fps) < (frame.start + next_start) / 2:
            yield frame._replace(start=instant, end=instant + 1 / fps)
            tick += 1


def num_ticks(origin: float, last_start: float, end: float, fps: float) -> int:
    """Returns the number of frames that `resample` yields for a video whose last frame is shown from `last_start` to
    `end`."""
    middle = (last_start + end) / 2
    count = max(0, int((middle - origin) * fps) - 1)
    while origin + count / fps < middle:  # the comparison of `resample`, rounding included
        count += 1
    return count


def _cover(frame: av.VideoFrame, aspect: float, height: int, width: int) -> Tensor:
    """Turns an RGB frame upright and scales it, with square pixels, to cover height × width: uint8 `[3, H, W]`."""
    turns = round(frame.rotation / 90)
    pixels_HWC = torch.from_numpy(np.ascontiguousarray(np.rot90(frame.to_ndarray(), k=turns)))
    tall, wide = shown_size(frame, aspect)
    scale = max(height / tall, width / wide)
    size = [max(height, round(scale * tall)), max(width, round(scale * wide))]
    scaled_CHW = interpolate(pixels_HWC.permute(2, 0, 1)[None].float(), size, mode="bicubic", antialias=True)[0]
    return scaled_CHW.round().clamp(0, 255).to(torch.uint8)


def shown_size(frame: av.VideoFrame, aspect: float) -> tuple[float, float]:
    """Returns height and width of a frame when it is turned upright, in units of which the shown picture has square
    pixels."""
    stored = frame.height, frame.width * aspect
    return stored if round(frame.rotation / 90) % 2 == 0 else (stored[1], stored[0])


def _crop(pixels_CHW: Tensor, size: VideoSize, position: Position) -> Tensor:
    top, left = (
        int(share * (room - wanted))
        for share, room, wanted in zip(position, pixels_CHW.shape[1:], (size.height, size.width), strict=True)
    )
    return pixels_CHW[:, top : top + size.height, left : left + size.width]


def read_mp4(path: Path | str) -> tuple[npt.NDArray[np.uint8], float]:
    """Reads all frames `[T, H, W, 3]` of a video that `write_mp4` wrote, and its frames per second."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate is not None, "write_mp4 states a rate"
        return np.stack(frames), float(stream.average_rate)
