"""Ranks that load the same videos encode each of them once, and end together if one of them cannot."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_ti2v
from forked import train_forked
from runs import read_metrics
from tiny_media import write_video
from torch import Tensor

from titan_distill.models.wan.encoders import Encoders
from titan_distill.train import main

STEPS, GLOBAL_BATCH, NUM_HELD_OUT = 2, 4, 3


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    folder = tmp_path_factory.mktemp("shared")
    pipeline = tiny_ti2v.write_pipeline(folder / "pipeline")
    for name, first in (("videos", 0), ("held_out", 5)):
        lines = ["video,prompt"]
        for index in range(first, first + 5):
            write_video(folder / f"{index}.mp4", 9 + index)
            lines.append(f"{index}.mp4,ramp {index % 3}")
        (folder / f"{name}.csv").write_text("\n".join(lines))

    def arguments(output: Path, *overrides: str) -> list[str]:
        return tiny_ti2v.arguments(
            "finetune", pipeline, folder / "videos.csv", output, "--training.steps", str(STEPS),
            "--training.global_batch_size", str(GLOBAL_BATCH), "--training.local_batch_size", "2",
            "--pipeline_config.width", "160",  # two tiles, for two ranks
            "--validation.data", str(folder / "held_out.csv"), "--validation.num_rows", str(NUM_HELD_OUT), *overrides,
        )  # fmt: skip

    return arguments


def count_encoded() -> None:
    """Prints a line for each video that this process encodes."""
    encode = Encoders.encode_video

    def counting(self: Encoders, videos: Tensor) -> Tensor:
        print(*["encoded a video"] * len(videos), sep="\n")
        return encode(self, videos)

    Encoders.encode_video = counting  # type: ignore[method-assign]


def fail_on_rank_one() -> None:
    encode = Encoders.encode_video

    def failing(self: Encoders, videos: Tensor) -> Tensor:
        if os.environ["RANK"] == "1":
            raise ValueError("this rank has lost its VAE")
        return encode(self, videos)

    Encoders.encode_video = failing  # type: ignore[method-assign]


def test_each_video_is_encoded_once(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """By one of the two ranks that share its tokens; training and held-out losses are those of one process."""
    assert main(arguments(tmp_path / "one")) == 0
    argv = arguments(tmp_path / "two", "--parallelism.sequence", "2")
    assert train_forked(2, argv, tmp_path, before=count_encoded) == [0, 0], (tmp_path / "rank0.txt").read_text()
    counts = [(tmp_path / f"rank{rank}.txt").read_text().count("encoded a video") for rank in (0, 1)]
    # The held-out videos come in micro-batches of two and one, before the first step and after the last.
    assert counts == [STEPS * GLOBAL_BATCH // 2 + 2 * 2, STEPS * GLOBAL_BATCH // 2 + 2 * 1]
    one, two = ({line["step"]: line for line in read_metrics(tmp_path / name)} for name in ("one", "two"))
    keys = [
        (step, key)
        for step, line in one.items()
        for key in line
        if key.startswith(("loss/", "grad_norm/", "validation/"))
    ]
    assert len(keys) == STEPS * 2 + 2 * 9
    assert [two[step][key] for step, key in keys] == pytest.approx([one[step][key] for step, key in keys], rel=1e-5)


def test_ranks_end_together_if_one_cannot_encode(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    argv = arguments(tmp_path / "run", "--parallelism.sequence", "2")
    assert train_forked(2, argv, tmp_path, before=fail_on_rank_one, timeout=60) == [2, 2]
    for rank in (0, 1):
        assert "this rank has lost its VAE" in (tmp_path / f"rank{rank}.txt").read_text()
