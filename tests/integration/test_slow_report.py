"""A validation's report may take rank 0 longer than ranks may wait in training; a lost rank still ends it."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import slow_report
from PIL import Image
from runs import REPOSITORY, read_metrics, tiny_argv
from test_dead_rank import MARGIN_SECONDS, launched, workers

from titan_distill import train

TIMEOUT_SECONDS = 6
LAST = "step-00000002"


def arguments(output: Path, *overrides: str) -> list[str]:
    """DMD2 that validates five prompts, three of them shown, after every step: an odd number for two ranks."""
    return tiny_argv(
        "dmd2", output, "--checkpoint.enabled", "false", "--validation.enabled", "true", "--validation.interval", "1",
        "--validation.num_prompts", "5", "--validation.num_videos", "3", "--validation.batch_size", "2",
        "--method_config.teacher_steps", "2", "--pipeline_config.height", "64", "--pipeline_config.width", "64",
        "--pipeline_config.num_frames", "5", *overrides,
    )  # fmt: skip


@pytest.mark.nightly
def test_report_outlasts_the_timeout_and_a_lost_rank_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slow_report.SECONDS["step-00000001"] > TIMEOUT_SECONDS
    monkeypatch.setattr("titan_distill.validation.validator.contact_sheet", slow_report._draw)
    monkeypatch.chdir(REPOSITORY)
    assert train.main(arguments(tmp_path / "one", "--training.steps", "1")) == 0

    monkeypatch.setenv("SLOW_REPORT_FOLDER", str(tmp_path))
    job = arguments(
        tmp_path / "two", "--training.local_batch_size", "2", "--job.imports", "slow_report",
        "--comm.train_timeout_seconds", str(TIMEOUT_SECONDS),
    )  # fmt: skip
    command = ["--standalone", "--nproc-per-node", "2", "-m", "titan_distill.train", *job]
    with launched(tmp_path, "node", *command) as (agent, shown):
        deadline = time.monotonic() + 240
        while not (tmp_path / LAST).exists():
            assert agent.poll() is None and time.monotonic() < deadline, shown.read_text()[-3000:]
            time.sleep(0.1)
        os.kill(workers(agent)[1], signal.SIGSTOP)
        assert agent.wait(TIMEOUT_SECONDS + MARGIN_SECONDS) != 0
    assert re.search(r"no sign of life for \d\.\d s from rank 1 \(.*after step 2, last seen at ", shown.read_text())
    compare(tmp_path / "one", tmp_path / "two")


def compare(one: Path, two: Path) -> None:
    """Scores, files and pictures of the validations before and after the first step."""
    line = {run: next(line for line in read_metrics(run) if line["step"] == 1) for run in (one, two)}
    names = {name for name in line[one] if name.startswith("validation/")}
    assert {f"validation/{label}/sliced_wasserstein_excess" for label in ("student", "student_before")} <= names
    assert names == {name for name in line[two] if name.startswith("validation/")}
    for name in names:
        assert line[two][name] == pytest.approx(line[one][name], rel=1e-4, abs=1e-6), name
    for step in ("step-00000000", "step-00000001"):
        files = [sorted(path.name for path in (run / "validation" / step).iterdir()) for run in (one, two)]
        assert files[0] == files[1] and "002-teacher.mp4" in files[0]
        sheets = [np.asarray(Image.open(run / "validation" / step / "contact_sheet.png"), float) for run in (one, two)]
        assert np.abs(sheets[0] - sheets[1]).max() <= 2
    baselines = [sorted(path.name for path in (run / "validation/baselines/teacher").iterdir()) for run in (one, two)]
    assert baselines[0] == baselines[1] == [f"{index:05d}.safetensors" for index in range(5 + 3)]
