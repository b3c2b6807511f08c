"""Parts of `titan-distill evaluate` that need no model: the plan, the costs, the files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from titan_distill.commands.evaluate import Entry, EvaluateOptions, Results, _items
from titan_distill.commands.making import MOST_PROMPTS, Meter, plan_items
from titan_distill.commands.subjects import open_subject
from titan_distill.validation.video import write_mp4


def test_the_noise_of_a_video_does_not_depend_on_the_number_of_prompts() -> None:
    """The first video of prompt k has the validation's noise, k; the others' never meet it."""
    few, many = plan_items(["a", "b"], 2), plan_items(["a", "b", "c"], 3)
    assert [item.noise_id for item in few] == [0, MOST_PROMPTS, 1, MOST_PROMPTS + 1]
    assert {item.key: item.noise_id for item in few}.items() <= {item.key: item.noise_id for item in many}.items()
    assert len({item.noise_id for item in many}) == 9


def test_a_repeated_prompt_goes_on_with_its_index() -> None:
    items = plan_items(["a", "b", "a"], 2)
    assert [item.key for item in items] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3)]
    assert [item.prompt for item in items] == [0, 0, 1, 1, 2, 2]


def test_costs_per_video() -> None:
    """Forwards count samples; the first batch warms up, and counts where it is alone."""
    meter, layer = Meter(), nn.Linear(2, 2)
    with meter.counting([layer]):
        layer(torch.zeros(6, 2))
        layer(input=torch.zeros(4, 2))
    layer(torch.zeros(3, 2))
    meter.seconds, meter.sizes = [9.0], [2]
    assert (meter.forwards_per_video, meter.seconds_per_video) == (5, 4.5)
    meter.seconds, meter.sizes = [9.0, 2.0, 1.0], [2, 2, 1]
    assert (meter.forwards_per_video, meter.seconds_per_video) == (2, 1.0)


def test_files_hold_what_is_done_so_far(tmp_path: Path) -> None:
    options = EvaluateOptions(("outputs/a run", "videos"), reference="none", prompts=Path("p.txt"), seed=0)
    results = Results(tmp_path / "new", options, ["a", "a", "b"])
    results.add(Entry("teacher", "teacher", 48, 3.0, 96.0, 1.5, 2, {"motion": 0.25}))
    assert results.unused("teacher") == "teacher-2" and results.unused("x") == "x"
    results.add(Entry("videos", num_videos=1, scores={"motion": 0.5, "psnr": math.inf}))
    found = json.loads((tmp_path / "new/evaluation.json").read_text())
    assert [subject["name"] for subject in found["subjects"]] == ["teacher", "videos"]
    assert found["subjects"][1]["scores"] == {"motion": 0.5, "psnr": None} and found["prompts"] == ["a", "b"]
    assert found["command"] == (
        "titan-distill evaluate 'outputs/a run' videos --reference none --prompts p.txt --seed 0"
    )
    assert (tmp_path / "new/evaluation.md").read_text() == (
        "|          | teacher | videos |\n"
        "| -------- | ------: | -----: |\n"
        "| steps    |      48 |        |\n"
        "| guidance |       3 |        |\n"
        "| forwards |      96 |        |\n"
        "| seconds  |     1.5 |        |\n"
        "| videos   |       2 |      1 |\n"
        "| motion   |    0.25 |    0.5 |\n"
        "| psnr     |         |    inf |\n"
    )


def test_names_with_a_number_are_used_once(tmp_path: Path) -> None:
    results = Results(tmp_path, EvaluateOptions(()), [])
    for expected in ("teacher", "teacher-2", "teacher-3"):
        name = results.unused("teacher")
        results.add(Entry(name))
        assert name == expected


def test_prompts_and_videos_of_a_folder_are_cut(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("a-0", "a-1", "a-2", "b-0"):
        write_mp4(tmp_path / "videos" / f"{name}.mp4", np.zeros((3, 16, 16, 3), np.uint8), 8)
    subject = open_subject(str(tmp_path / "videos"), ())
    for options, expected in (
        (EvaluateOptions(()), [("a", 0), ("a", 1), ("a", 2), ("b", 0)]),
        (EvaluateOptions((), num_prompts=1), [("a", 0), ("a", 1), ("a", 2)]),
        (EvaluateOptions((), videos_per_prompt=1), [("a", 0), ("b", 0)]),
    ):
        assert [item.key for item in _items(options, None, [subject])[1]] == expected


def test_this_folder_is_a_folder_of_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mp4(tmp_path / "a-0.mp4", np.zeros((3, 16, 16, 3), np.uint8), 8)
    monkeypatch.chdir(tmp_path)
    assert open_subject(".", ()).name == tmp_path.name


def test_a_failing_forward_leaves_no_hook() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), Meter().counting([layer]):
        layer(torch.zeros(1, 3))
    assert not layer._forward_pre_hooks
