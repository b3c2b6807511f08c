"""Probe of a video file: its size, its times and its clips, without decoding more than one frame.

All packets are read, so the probe finds files that are cut off or whose timestamps are damaged, and it counts the clips
exactly. Reading costs a fraction of decoding. Damage inside a packet shows only when the packet is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from titan_distill.data.footage import (
    VideoSize,
    check_duration,
    check_standstill,
    frame_interval,
    num_ticks,
    open_video,
    pixel_aspect,
    shown_size,
    too_short,
)

if TYPE_CHECKING:
    import av


class VideoFacts(NamedTuple):
    """Size and times of a video."""

    height: float
    """Height of the upright picture, in units of which it has square pixels."""
    width: float
    """Width of the upright picture, likewise."""
    starts: Sequence[float]
    """Start of each frame in seconds, ascending."""
    end: float
    """End of the last frame in seconds."""


def probe(path: Path) -> VideoFacts:
    """Reads a video's packets and decodes its first frame.

    Raises:
        ValueError: not a video, damaged, or shorter than its header says.
    """
    with open_video(path) as (container, stream):
        interval, aspect = frame_interval(stream), pixel_aspect(path, stream)
        picture: av.VideoFrame | None = None
        times: list[tuple[float, float]] = []
        for packet in container.demux(stream):
            if picture is None:  # the last packet is empty and flushes the decoder
                picture = next(iter(packet.decode()), None)
            if not packet.size or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise ValueError(f"{path} is damaged or truncated at frame {len(times)}; copy it again")
            moment = packet.pts if packet.pts is not None else packet.dts
            start = float(moment * packet.time_base) if moment is not None else len(times) * interval
            times.append((start, float(packet.duration * packet.time_base) if packet.duration else interval))
        if picture is None or not times:
            raise ValueError(f"{path} has no frame that can be decoded; copy it again")
        times.sort()
        starts, end = [start for start, _ in times], sum(times[-1])
        for start, following in pairwise([*starts, end]):
            check_standstill(path, following - start)
        check_duration(path, container, stream, end - starts[0])
        return VideoFacts(*shown_size(picture, aspect), starts, end)


def clip_starts(path: Path, facts: VideoFacts, size: VideoSize, stride: int | None = None) -> list[float]:
    """Returns the start in seconds of each clip that `read_clips` makes of a video.

    Raises:
        ValueError: the video is shorter than one clip.
    """
    starts, fps, stride = facts.starts, size.fps, stride or size.num_frames
    count = len(starts) if fps is None else num_ticks(starts[0], starts[-1], facts.end, fps)
    if count < size.num_frames:
        raise too_short(path, count, size)
    firsts = range(0, count - size.num_frames + 1, stride)
    return [starts[first] if fps is None else starts[0] + first / fps for first in firsts]
