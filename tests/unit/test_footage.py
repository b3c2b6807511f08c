"""Clips from videos: the right frames, the right way up, and damage that is named."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_media import brightness, write_video

from titan_distill.data.footage import VideoSize, decode, read_clips

av = pytest.importorskip("av")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_resampling_picks_the_nearest_frame(tmp_path: Path, suffix: str) -> None:
    """Matroska rounds timestamps to milliseconds, which must not repeat or drop frames at the video's own rate."""
    path = write_video(tmp_path / f"a.{suffix}", num_frames=30, fps=30)
    own_rate = next(iter(read_clips(path, VideoSize(30, 64, 96, 30))))
    assert brightness(own_rate.pixels) == list(range(30))
    clip = next(iter(read_clips(path, VideoSize(10, 64, 96, 10))))
    assert brightness(clip.pixels) == list(range(0, 30, 3))
    assert clip.duration_seconds == pytest.approx(1.0)
    tripled = next(iter(read_clips(path, VideoSize(8, 64, 96, 90))))
    assert brightness(tripled.pixels) == [0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("stride", "starts"), [(5, [0, 5]), (2, [0, 2, 4, 6]), (7, [0, 7])])
def test_clips_start_every_stride_frames(tmp_path: Path, stride: int, starts: list[int]) -> None:
    path = write_video(tmp_path / "a.mp4", num_frames=12)
    clips = list(read_clips(path, VideoSize(5, 64, 96), stride))
    assert [brightness(clip.pixels) for clip in clips] == [list(range(start, start + 5)) for start in starts]
    assert all(clip.duration_seconds == pytest.approx(5 / 8) for clip in clips)


def quadrants(image: torch.Tensor) -> str:
    """The strongest channel at the four corners, row by row, of [3, H, W]."""
    corners = [image[:, 2, 2], image[:, 2, -3], image[:, -3, 2], image[:, -3, -3]]
    return "".join("RGB"[int(corner.argmax())] if corner.float().std() > 20 else "-" for corner in corners)


def write_picture(path: Path, pixels: np.ndarray) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_quadrants(path: Path) -> Path:
    """Red, green over blue, black in 64 × 128 pixels."""
    pixels = np.zeros((64, 128, 3), dtype=np.uint8)
    pixels[:32, :64, 0] = pixels[:32, 64:, 1] = pixels[32:, :64, 2] = 220
    return write_picture(path, pixels)


def first_frame(path: Path, height: int, width: int) -> torch.Tensor:
    return next(iter(read_clips(path, VideoSize(1, height, width)))).pixels[0]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 16), (16, 96)])
def test_frames_are_scaled_to_cover_and_cropped_at_the_centre(tmp_path: Path, height: int, width: int) -> None:
    """A red square in the middle of a wide green picture stays a square in the middle: nothing is stretched."""
    pixels = np.zeros((64, 128, 3), dtype=np.uint8)
    pixels[..., 1] = 220
    pixels[24:40, 56:72] = (220, 0, 0)
    frame = first_frame(write_picture(tmp_path / "a.mp4", pixels), height, width)
    assert frame.shape == (3, height, width)
    side = 16 * max(height / 64, width / 128)
    red = frame[0] > frame[1]
    assert red.any(dim=1).sum() == pytest.approx(min(height, side), abs=1)
    assert red.any(dim=0).sum() == pytest.approx(min(width, side), abs=1)
    assert torch.equal(red, red.flip(0, 1))


def test_rotation_metadata_is_honoured(tmp_path: Path) -> None:
    """A phone held upright stores a lying picture and 'turn clockwise by 90 degrees' in the track header's matrix."""
    write_quadrants(tmp_path / "a.mp4")
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    one, minus_one = (1 << 16).to_bytes(4, "big"), (-(1 << 16)).to_bytes(4, "big", signed=True)
    lying = one + bytes(12) + one
    clockwise = bytes(4) + one + bytes(4) + minus_one + bytes(4)
    matrix = data.index(lying, data.index(b"tkhd"))
    data[matrix : matrix + len(lying)] = clockwise
    (tmp_path / "b.mp4").write_bytes(data)
    assert quadrants(first_frame(tmp_path / "a.mp4", 64, 128)) == "RGB-"
    assert quadrants(first_frame(tmp_path / "b.mp4", 128, 64)) == "BR-G"


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.mp4", {}), ("a.mp4", {"movflags": "faststart"}), ("a.mkv", {})],
    ids=["tail", "head", "mkv"],
)
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_video_is_named(tmp_path: Path, name: str, options: dict[str, str], kept: float) -> None:
    """The index at the file's tail, at its head, or none at all: three ways in which FFmpeg notices, or does not."""
    path = write_video(tmp_path / name, num_frames=100, **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=rf"{name} .*truncated") as error:
        list(decode(path))
    assert "\n" not in str(error.value)


def test_a_timestamp_that_jumps_by_years_is_named(tmp_path: Path) -> None:
    """Resampled, the frame before it would be repeated ten thousand million times."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for index in range(16):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), dtype=np.uint8), format="rgb24")
            frame.pts = index if index < 8 else index + 8 * 10**9
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clips = read_clips(tmp_path / "a.mkv", VideoSize(5, 32, 48, 8))
    with pytest.raises(ValueError, match=r"a\.mkv shows one frame for over 600 seconds"):
        for _ in zip(clips, range(100)):
            pass


def test_a_title_in_another_encoding_does_no_harm(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", num_frames=5)
    data = path.read_bytes()
    encoder = data.index(b"Lavf")  # who wrote it, as a tag
    path.write_bytes(data[:encoder] + b"\xe9" + data[encoder + 1 :])
    assert len(list(decode(path))) == 5


def test_a_forked_process_reads_what_its_parent_has_read(tmp_path: Path) -> None:
    """As data workers do. PyAV 19 hands them a converter whose threads they do not have, and they wait for those."""
    path = write_video(tmp_path / "a.mp4", num_frames=9)

    def read() -> None:
        assert len(list(read_clips(path, VideoSize(9, 32, 48)))) == 1

    read()
    worker = multiprocessing.get_context("fork").Process(target=read, daemon=True)
    worker.start()
    worker.join(30)
    code = worker.exitcode
    worker.kill()
    assert code == 0


def test_no_video_inside(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.mp4 can't be decoded"):
        list(decode(tmp_path / "a.mp4"))
    with av.open(str(tmp_path / "b.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"b\.mp4 has no video stream"):
        list(decode(tmp_path / "b.mp4"))
