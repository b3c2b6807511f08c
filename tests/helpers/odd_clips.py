"""Twenty-five videos as they come from phones, cameras, old archives and broken downloads, made by real encoders.

A good one shows a green that grows with time, and red in its upper left quarter, so that a frame tells when it was
shown and which way is up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

SECONDS = 3.0


@dataclass(frozen=True)
class OddClip:
    """A good video. `size` is (height, width) of the upright picture with square pixels."""

    name: str
    codec: str = "libx264"
    rate: Fraction = Fraction(24)
    size: tuple[int, int] = (64, 96)
    pixel_format: str = "yuv420p"
    rotation: int = 0
    pixel_aspect: Fraction = Fraction(1)
    times: tuple[float, ...] = ()
    """Start of each frame in seconds; default: by the rate."""
    has_sound: bool = False
    options: dict[str, str] = field(default_factory=dict)

    @property
    def starts(self) -> tuple[float, ...]:
        return self.times or tuple(float(index / self.rate) for index in range(int(SECONDS * self.rate)))


GOOD = [
    OddClip("h264.mp4"),
    OddClip("hevc.mkv", "libx265", options={"x265-params": "keyint=12:log-level=none"}),
    OddClip("vp9.webm", "libvpx-vp9", options={"deadline": "realtime"}),
    OddClip("vp8.webm", "libvpx", options={"deadline": "realtime"}),
    OddClip("mpeg4.avi", "mpeg4", Fraction(30), options={"qscale": "2"}),
    OddClip("mjpeg.mov", "mjpeg", pixel_format="yuvj420p", options={"qscale": "2"}),
    OddClip("prores.mov", "prores_ks", pixel_format="yuv422p10le"),
    OddClip("ffv1.mkv", "ffv1"),
    OddClip("mpeg2.mkv", "mpeg2video", Fraction(25), options={"qscale": "2"}),
    OddClip("film.mp4", rate=Fraction(24000, 1001)),
    OddClip("fast.mp4", rate=Fraction(60), options={"g": "15"}),
    OddClip("slow.mp4", rate=Fraction(5)),
    OddClip("variable.mkv", times=tuple(0.02 * k + 0.005 * (k % 3) + 0.3 * (k // 40) for k in range(120))),
    OddClip("odd.mp4", size=(65, 97), pixel_format="yuv444p"),
    OddClip("tall.mp4", size=(96, 64)),
    OddClip("quarter.mp4", rotation=90),
    OddClip("half.mp4", rotation=180),
    OddClip("phone.mp4", size=(96, 64), rotation=-90),
    OddClip("anamorphic.mkv", pixel_aspect=Fraction(2)),
    OddClip("sound.mp4", has_sound=True, options={"g": "10"}),
]

BAD = {
    "cut.mp4": "truncated",
    "streamed.mp4": "truncated",
    "empty.mp4": "can't be decoded",
    "page.mp4": "can't be decoded",
    "short.mp4": "has 4 frames at 8 frames per second, but a clip needs 9",
}
"""Faults by name of the video. Together with `GOOD` they are twenty-five."""


def level(seconds: float) -> int:
    """Green at a time."""
    return round(60 + 40 * seconds)


def upright(clip: OddClip, seconds: float) -> npt.NDArray[np.uint8]:
    """The picture [H, W, 3] at a time, upright and with square pixels."""
    height, width = clip.size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 1] = level(seconds)
    pixels[: height // 2, : width // 2, 0] = 200
    return pixels


def write_clip(folder: Path, clip: OddClip, starts: Sequence[float] = (), **container: str) -> Path:
    """Writes a video, or a part of it with the given `starts`."""
    import av

    path = folder / clip.name
    with av.open(str(path), "w", options=container) as file:
        sound = file.add_stream("aac", rate=16000, layout="mono") if clip.has_sound else None
        exact = {"libx264": {"crf": "8"}, "libx265": {"crf": "8"}}.get(clip.codec, {"b": "4M"})
        stream = file.add_stream(clip.codec, rate=clip.rate, options={**exact, **clip.options})
        stored = _stored(clip, 0.0)
        stream.height, stream.width, stream.pix_fmt = *stored.shape[:2], clip.pixel_format
        if clip.times:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        stream.codec_context.sample_aspect_ratio = clip.pixel_aspect
        for index, seconds in enumerate(starts or clip.starts):
            frame = av.VideoFrame.from_ndarray(_stored(clip, seconds), format="rgb24")
            frame.pts = round(1000 * seconds) if clip.times else index
            frame.time_base = Fraction(1, 1000) if clip.times else 1 / clip.rate
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000 * 5), dtype=np.float32), "fltp", "mono")
            silence.sample_rate = 16000
            file.mux(sound.encode(silence))
            file.mux(sound.encode())
    if clip.rotation:
        _rotate(path, clip.rotation)
    return path


def _rotate(path: Path, rotation: int) -> None:
    """Writes a rotation into the track header's matrix of an mp4 file. Not every PyAV can."""
    zero, one, minus_one = (value.to_bytes(4, "big", signed=True) for value in (0, 1 << 16, -(1 << 16)))
    a, b, c, d = {
        90: (zero, minus_one, one, zero),
        180: (minus_one, zero, zero, minus_one),
        -90: (zero, one, minus_one, zero),
    }[rotation]
    data = bytearray(path.read_bytes())
    matrix = data.index(one + 3 * zero + one, data.index(b"tkhd"))
    data[matrix : matrix + 20] = a + b + zero + c + d
    path.write_bytes(data)


def _stored(clip: OddClip, seconds: float) -> npt.NDArray[np.uint8]:
    pixels = np.rot90(upright(clip, seconds), k=-clip.rotation // 90)
    return np.ascontiguousarray(pixels[:, :: int(clip.pixel_aspect)])


def write_all(folder: Path) -> dict[str, str]:
    """Writes all videos and returns their captions by name."""
    folder.mkdir(parents=True)
    for clip in GOOD:
        write_clip(folder, clip)
    for name, container in (("cut.mp4", {}), ("streamed.mp4", {"movflags": "faststart"})):
        path = write_clip(folder, OddClip(name), **container)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    (folder / "empty.mp4").touch()
    (folder / "page.mp4").write_text("<html><body>404 Not Found</body></html>", encoding="utf-8")
    write_clip(folder, OddClip("short.mp4"), [index / 24 for index in range(12)])
    return {name: f"the video {name}" for name in [*(clip.name for clip in GOOD), *BAD]}
