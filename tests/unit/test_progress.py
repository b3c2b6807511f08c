"""A run's lines: seconds per step without pauses, the time left with those to come, and plain text in a log file."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from titan_distill.config.sections import (
    CheckpointConfig,
    JobConfig,
    MetricsConfig,
    TrainingConfig,
    ValidationConfig,
)
from titan_distill.observability.metrics import MetricsLogger, memory_gib
from titan_distill.observability.progress import Pauses, Progress, ProgressBar, duration
from titan_distill.observability.timing import PhaseTimer


@dataclass
class Clock:
    seconds: float = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def run(
    folder: Path,
    clock: Clock,
    *,
    num_steps: int = 20,
    start_step: int = 0,
    planned: dict[str, float | None] | None = None,
    validation: float | None = None,
    **values: float,
) -> None:
    """Steps of 2 s, the first of 40 s; a save of 30 s every 5 steps; validations of 10 s every 10 steps, and of 500 s
    before the first."""
    config: Any = SimpleNamespace(
        job=JobConfig(name="test", output_dir=str(folder)),
        metrics=MetricsConfig(),
        training=TrainingConfig(steps=num_steps, global_batch_size=4, local_batch_size=4),
        checkpoint=CheckpointConfig(interval=5),
        validation=ValidationConfig(interval=10),
    )
    timer = PhaseTimer(torch.device("cpu"))
    metrics = MetricsLogger(config, is_main=True, start_step=start_step, timer=timer, planned_gib=0.25)
    metrics.expect(planned or {})

    def pause(phase: str, seconds: float) -> None:
        with timer(phase):
            clock.seconds += seconds

    if start_step == 0:
        pause("validation", 500)
        metrics.log(0, {"validation/teacher/accuracy": 1.0})
        metrics.expect({"validation": validation})
    for step in range(start_step + 1, num_steps + 1):
        clock.seconds += 40 if step == start_step + 1 else 2
        metrics.step(step, {"loss/student": 0.25, "lr/student": 1.0, **values}, samples_seen=4 * step)
        if step % 5 == 0:
            pause("checkpoint", 30)
        if step % 10 == 0:
            pause("validation", 10)
            metrics.log(step, {"validation/student/accuracy": 1.0})
    metrics.close()


def lines(caplog: pytest.LogCaptureFixture) -> dict[int, str]:
    """The progress lines by step."""
    found = [record.getMessage() for record in caplog.records]
    return {int(line.split("/")[0].split()[1]): line for line in found if line.startswith("step ")}


def test_seconds_per_step_leave_out_pauses_and_the_first_step(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(tmp_path, clock)
    shown = lines(caplog)
    assert shown[1] == "step 1/20 · student loss 0.25 · 40s for the first step"
    assert all(" · 2 s/step · " in line for step, line in shown.items() if step > 1)


def test_the_time_left_has_the_saves_and_validations_to_come(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(tmp_path, clock, validation=12, planned={"checkpoint": 20, "validation": 700})
    shown = lines(caplog)
    # After step 6: 14 steps, 3 saves as long as the first one was, 2 validations as long as one is expected.
    assert f"{duration(14 * 2 + 3 * 30 + 2 * 12)} left" in shown[6]
    # After step 11 both have been measured.
    assert f"{duration(9 * 2 + 2 * 30 + 1 * 10)} left" in shown[11]
    # The last line is written before the last save and the last validation.
    assert "40s left" in shown[20]


def test_the_plan_is_what_is_known_before_anything_is_measured(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(tmp_path, clock, start_step=2, planned={"checkpoint": 20, "validation": 70})
    # A resumed run, whose first line is that of step 3. 10 s pass until the line of step 6, behind the save of step 5.
    assert f"{duration(14 * 2 + 3 * 30 + 2 * 70)} left" in lines(caplog)[6]


def test_a_line_names_mfu_and_the_end(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(tmp_path, clock, mfu=0.414)
    line = lines(caplog)[20]
    assert line.startswith("step 20/20 · student loss 0.25 · MFU 41% · 2 s/step · 40s left · ends ")
    end = datetime.now() + timedelta(seconds=40)
    assert line.endswith((f"{end:%H:%M}", f"{end - timedelta(minutes=1):%H:%M}", f"{end:%Y-%m-%d %H:%M}"))


def test_measured_memory_is_told_after_the_first_step(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(tmp_path, clock)
    (line,) = [record.getMessage() for record in caplog.records if "memory" in record.getMessage()]
    used = re.match(r"memory after the first step: (\d+\.\d\d) GiB used by this process, .*; planned 0.25 GiB", line)
    assert used is not None
    assert float(used[1]) == pytest.approx(memory_gib(torch.device("cpu")), rel=0.2)


def test_pauses_are_counted_by_their_interval_and_at_the_end() -> None:
    pauses = Pauses(23, {"checkpoint": 5, "validation": 0})
    due = {step for step in range(1, 24) if step % 5 == 0} | {23}
    for after in range(24):
        for until in range(after, 24):
            assert pauses.count("checkpoint", after, until) == len([step for step in due if after < step <= until])
    assert pauses.count("validation", 0, 22) == 0 and pauses.count("validation", 0, 23) == 1
    assert Pauses(20, {"checkpoint": 5}).count("checkpoint", 0, 20) == 4
    assert Pauses(20, {}).count("validation", 0, 20) == 0


def test_a_long_job_tells_of_its_progress_in_lines(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), ProgressBar("validation, sampling teacher", 2560, "forward passes") as bar:
        for _ in range(2560):
            clock.seconds += 1 / 128
            bar.advance()
    assert [record.getMessage() for record in caplog.records] == [
        "validation, sampling teacher: 2,560 forward passes",
        "validation, sampling teacher: 1,280 of 2,560 forward passes · 10s left",
        "validation, sampling teacher: 2,560 of 2,560 forward passes · 0s left",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_is_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    progress = Progress(Pauses(4, {}), 0)
    for step in range(1, 5):
        progress.update(step, {"loss/student": 0.25}, {})
    progress.close()
    with ProgressBar("sampling", 7, "videos") as bar:
        bar.advance(7)
    shown = terminal.getvalue()
    assert "\r" in shown and " 4/4 · student loss 0.25 · " in shown and " s/step · 0s left · ends " in shown
    assert "sampling" in shown


def test_durations_read_like_durations() -> None:
    assert [duration(seconds) for seconds in (4.4, 75.2, 7500, 3599.9)] == ["4s", "1m15s", "2h05m", "1h00m"]
