"""Videos survive the trip through a file, contact sheets show the right frames in the right place, reports add up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from titan_distill.data.footage import read_mp4
from titan_distill.validation import distances
from titan_distill.validation.distances import project
from titan_distill.validation.video import Video, contact_sheet, thumbnails, write_mp4

RED, GREEN, BLUE = (220, 40, 40), (40, 200, 60), (40, 60, 220)


def plain_video(colour: tuple[int, int, int], num_frames: int = 9, height: int = 96, width: int = 96) -> Video:
    return np.full((num_frames, height, width, 3), colour, np.uint8)


def test_mp4_reads_back_every_frame(tmp_path: Path) -> None:
    video = np.stack([np.full((96, 96, 3), 12 * index, np.uint8) for index in range(17)])
    video[:, 40:60, 20:50] = RED
    write_mp4(tmp_path / "video.mp4", video, fps=8)
    read, fps = read_mp4(tmp_path / "video.mp4")
    assert read.shape == video.shape
    assert fps == 8
    error_T = np.abs(read.astype(int) - video).mean(axis=(1, 2, 3))
    assert error_T.max() < 4  # of 255; the neighbouring frame is 12 away
    assert np.abs(read[:, 45:55, 25:45].mean(axis=(0, 1, 2)) - RED).max() < 8  # red, not blue


def test_mp4_of_odd_size_names_the_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="97×96 pixels"):
        write_mp4(tmp_path / "video.mp4", plain_video(RED, width=97), fps=8)


def test_contact_sheet_puts_samplers_in_columns_and_prompts_in_rows(tmp_path: Path) -> None:
    columns = [("Teacher", [plain_video(RED), plain_video(GREEN)]), ("Student", [plain_video(BLUE), plain_video(RED)])]
    contact_sheet(tmp_path / "sheet.png", columns, ["first prompt", "second prompt"], frames_per_video=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)

    def centre(colour: tuple[int, int, int]) -> tuple[float, float]:
        rows, cols = np.nonzero(np.abs(sheet - colour).max(axis=2) < 3)
        return float(rows.mean()) / sheet.shape[0], float(cols.mean()) / sheet.shape[1]

    (green_row, green_col), (blue_row, blue_col) = centre(GREEN), centre(BLUE)
    assert green_row > 0.6 and green_col < 0.4  # second prompt, teacher
    assert blue_row < 0.6 and blue_col > 0.6  # first prompt, student
    for colour, num_cells in ((RED, 2), (GREEN, 1), (BLUE, 1)):
        assert (np.abs(sheet - colour).max(axis=2) == 0).sum() == num_cells * 3 * 96 * 96


def test_contact_sheet_spreads_frames_from_first_to_last(tmp_path: Path) -> None:
    video = np.stack([np.full((32, 32, 3), 10 * index, np.uint8) for index in range(17)])
    contact_sheet(tmp_path / "sheet.png", [("", [video])], [""], frames_per_video=5, frame_height=32)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    middle = sheet[sheet.shape[0] - 28 - 16]  # above the margin, half a frame
    assert [int(value) for value in dict.fromkeys(middle) if value != 255] == [0, 40, 80, 120, 160]


def test_long_captions_do_not_widen_the_sheet(tmp_path: Path) -> None:
    for name, caption in (("short", "a"), ("long", "a very long caption " * 50)):
        contact_sheet(tmp_path / f"{name}.png", [("t", [plain_video(RED)])], [caption])
    assert Image.open(tmp_path / "short.png").size == Image.open(tmp_path / "long.png").size


def projected(a: torch.Tensor, b: torch.Tensor, **options: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sets on the same directions."""
    return project([*a], **options), project([*b], **options)


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, **options: int) -> float:
    return distances.sliced_wasserstein(*projected(a, b, **options))


def sliced_wasserstein_excess(a: torch.Tensor, b: torch.Tensor) -> float:
    return distances.sliced_wasserstein_excess(*projected(a, b))


def test_sliced_wasserstein_of_a_shift_is_the_shift() -> None:
    a_N1 = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    assert sliced_wasserstein(a_N1, a_N1 + 0.75) == pytest.approx(0.75, abs=1e-6)
    a_ND = torch.randn(64, 8, 2, generator=torch.Generator().manual_seed(1))
    delta = torch.zeros(8, 2)
    delta[3, 1] = 2.0
    expected = 2.0 / 16**0.5  # |δ| / √D, up to the finite number of directions
    assert sliced_wasserstein(a_ND, a_ND + delta, num_projections=4096) == pytest.approx(expected, rel=0.03)


def test_sliced_wasserstein_of_a_scale_and_of_itself() -> None:
    a_ND = torch.randn(4000, 6, generator=torch.Generator().manual_seed(2))
    assert sliced_wasserstein(a_ND, a_ND[torch.randperm(4000)]) == pytest.approx(0, abs=1e-12)
    # W2 between N(0, 1) and N(0, 9) is 2, in every direction.
    assert sliced_wasserstein(a_ND, 3 * a_ND) == pytest.approx(2.0, rel=0.05)
    # The marginals agree; only directions across the axes see that one set is correlated.
    line_ND = a_ND[:, :1].expand(-1, 6)
    assert sliced_wasserstein(a_ND, line_ND) > 0.3


def test_sliced_wasserstein_is_a_function_of_its_seed() -> None:
    a_ND, b_ND = torch.randn(2, 32, 100, generator=torch.Generator().manual_seed(3))
    assert sliced_wasserstein(a_ND, b_ND, seed=1) == sliced_wasserstein(a_ND, b_ND, seed=1)
    assert sliced_wasserstein(a_ND, b_ND, seed=1) != sliced_wasserstein(a_ND, b_ND, seed=2)


def test_sets_can_be_projected_in_parts() -> None:
    """On as many ranks as there are, and with what comes from a file beside what is new."""
    samples = [torch.randn(3, 700, 200, generator=torch.Generator().manual_seed(index)) for index in range(5)]
    whole_NP = project(samples, num_projections=20)
    parts_NP = torch.cat([project(samples[:1], num_projections=20), project(samples[1:], num_projections=20)])
    assert (whole_NP - parts_NP).abs().max() < 1e-12
    directions = torch.Generator().manual_seed(0)
    for projected_N in whole_NP.T:
        direction_D = torch.randn(samples[0].numel(), generator=directions, dtype=torch.float64)
        expected = samples[2].flatten().double() @ direction_D / direction_D.norm()
        assert float(projected_N[2]) == pytest.approx(float(expected), abs=1e-12)
    assert project([]).shape == (0, 256)


def test_thumbnails_give_the_sheet_of_the_videos(tmp_path: Path) -> None:
    video = np.random.default_rng(0).integers(0, 256, (17, 48, 80, 3), np.uint8)
    for name, shown in (("video", video), ("thumbnails", thumbnails(video))):
        contact_sheet(tmp_path / f"{name}.png", [("title", [shown])], ["caption"])
    assert (tmp_path / "video.png").read_bytes() == (tmp_path / "thumbnails.png").read_bytes()


def test_sliced_wasserstein_rejects_unequal_sets() -> None:
    with pytest.raises(AssertionError, match=r"\[3, 256\] and \[5, 256\]"):
        sliced_wasserstein(torch.zeros(3, 4), torch.zeros(5, 4))


def test_excess_distance_of_equal_laws_is_nothing_where_the_plain_distance_is_not() -> None:
    a_ND, b_ND = torch.randn(2, 96, 300, generator=torch.Generator().manual_seed(4))
    assert sliced_wasserstein(a_ND, b_ND) > 0.15
    assert sliced_wasserstein_excess(a_ND, b_ND) < 0.05
    # Equal samples gain nothing over samples of an equal law.
    assert sliced_wasserstein_excess(a_ND, a_ND.clone()) < 0.05


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.3), (1.5, 0.0), (0.6, 0.0)])
def test_excess_distance_is_that_of_the_laws(scale: float, shift: float) -> None:
    a_ND, b_ND = torch.randn(2, 96, 300, generator=torch.Generator().manual_seed(5))
    # W2 between N(0, 1) and N(shift, scale**2) in each coordinate; a shift of all of them is |δ| / √D = shift.
    expected = (shift**2 + (scale - 1) ** 2) ** 0.5
    assert sliced_wasserstein_excess(a_ND, scale * b_ND + shift) == pytest.approx(expected, rel=0.15)


def test_excess_distance_needs_halves() -> None:
    with pytest.raises(ValueError, match="3 samples"):
        sliced_wasserstein_excess(torch.zeros(3, 4), torch.zeros(3, 4))
