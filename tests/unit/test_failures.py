"""The launcher's paragraph about a failed run, from the files that ranks and torchrun leave."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, ProcessFailure

from titan_distill.fault_tolerance.failures import StepFile, describe, report
from titan_distill.fault_tolerance.watchdog import Beat, LostRankError, Watchdog, _up_to_date
from titan_distill.launch import _is_shown


class Job:
    """The log folder of a launcher."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logs, self._patch = folder, monkeypatch
        self.failures: dict[int, ProcessFailure] = {}

    def rank(self, rank: int, exit_code: int, error: BaseException | None = None, **kind: Any) -> None:
        """A rank that has ended; with an error that it reports, or raises where `kind` has no `sentence`."""
        folder = self.logs / "id_x" / "attempt_0" / str(rank)
        folder.mkdir(parents=True, exist_ok=True)
        self._patch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        if error is not None and kind.pop("sentence", False):
            report(error, **kind)
        elif error is not None:
            try:
                raise error
            except type(error):
                ErrorHandler().record_exception(error)
        self.failures[rank] = ProcessFailure(rank, 1000 + rank, exit_code, str(folder / "error.json"))
        self.failures[rank].timestamp += len(self.failures)

    def completed(self, rank: int, steps: int) -> None:
        folder = self.logs / "id_x" / "attempt_0" / str(rank)
        folder.mkdir(parents=True, exist_ok=True)
        self._patch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        watchdog = Watchdog(rank, world_size=1, timeout_seconds=1)
        for step in range(1, steps + 1):
            watchdog.step = step

    def told(self, *shown: int) -> str:
        return describe(self.failures, self.logs, shown.__contains__)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch)


LOST = LostRankError("no sign of life for 2.0 s from rank 2")
CONSEQUENCE: Mapping[str, Any] = {"error": LOST, "sentence": True, "is_consequence": True}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_killed_rank_is_named_with_host_step_and_log(number: signal.Signals, job: Job) -> None:
    """Also when others have found out first. The step is the latest of all ranks."""
    job.rank(0, 1, **CONSEQUENCE)
    job.rank(2, -number)
    job.rank(3, -signal.SIGTERM)
    job.rank(1, -signal.SIGKILL)  # by torchrun, 30 s later
    for rank, steps in enumerate((12, 12, 11, 12)):
        job.completed(rank, steps)
    told = job.told(0)
    assert told.startswith(f"error: rank 2 ({os.uname().nodename}, pid 1002) was ended by {number.name}")
    assert told.endswith(f"after step 12; its output is in {job.logs / 'id_x' / 'attempt_0' / '2'}")
    assert "\n" not in told and ("dmesg" in told) == (number == signal.SIGKILL)


@pytest.mark.parametrize("is_shown", [True, False])
def test_an_uncaught_error_keeps_its_traceback_once(is_shown: bool, job: Job) -> None:
    job.rank(0, 1, **CONSEQUENCE)
    job.rank(1, 1, ZeroDivisionError("of the method\nin two lines"))
    told = job.told(*((0, 1) if is_shown else (0,)))
    assert told.count("Traceback") == (not is_shown), told
    *_, last = told.splitlines()
    assert "rank 1 (" in last and "before the end of the first step with ZeroDivisionError: of the method;" in last
    assert "sign of life" not in told


def test_a_sentence_is_told_once(job: Job) -> None:
    job.rank(1, 2, ValueError("a.parquet, row 3: no latents"), sentence=True)
    job.rank(0, 1, **CONSEQUENCE)
    assert job.told(0) == "error: a.parquet, row 3: no latents"
    assert job.told(0, 1) == ""
    job.rank(0, 2, ValueError("a.parquet, row 3: no latents"), sentence=True)
    assert job.told(0) == "", "rank 0 has said the same"


def test_a_rank_of_another_machine_is_named_by_those_that_lost_it(job: Job) -> None:
    job.rank(0, 1, **CONSEQUENCE)
    job.rank(1, -signal.SIGTERM)
    assert job.told(0) == f"error: {LOST}"


def test_a_rank_that_the_watchdog_killed_is_not_called_killed_by_the_kernel(job: Job) -> None:
    job.rank(2, -signal.SIGKILL, LOST, sentence=True)
    job.rank(0, 1, **CONSEQUENCE)
    assert job.told(0) == f"error: {LOST}"


def test_a_consequence_is_printed_only_without_torchrun(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job.rank(0, 1, **CONSEQUENCE)
    assert capsys.readouterr().err == ""
    content = json.loads((job.logs / "id_x" / "attempt_0" / "0" / "error.json").read_text())
    assert content["message"]["extraInfo"]["py_callstack"] == str(LOST), "what torchrun's own summary shows"
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    report(LOST, is_consequence=True)
    assert capsys.readouterr().err == f"error: {LOST}\n"


def test_the_newest_run_in_a_log_folder_counts(job: Job) -> None:
    """A log folder that is given may have runs of before."""
    old = job.logs / "id_w" / "attempt_0" / "0"
    old.mkdir(parents=True)
    (old / "step").write_text("99\n")
    os.utime(old.parent, (0, time.time() - 100))
    job.rank(0, -signal.SIGKILL)
    job.completed(0, 4)
    assert "after step 4;" in job.told()


def test_steps_are_counted_without_a_folder_and_with_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    StepFile().write(1)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "missing" / "error.json"))
    StepFile().write(1)


def test_a_lost_rank_has_the_step_of_the_others() -> None:
    beats = {0: Beat("a", 1, 1, step=6), 1: Beat("b", 2, 2, step=1), 2: Beat("b", 3, 2, step=5)}
    assert {rank: beat.step for rank, beat in _up_to_date({1: beats[1]}, beats).items()} == {1: 6}


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (("--tee", "3", "--local-ranks-filter", "0"), [True, False]),  # run_train.sh
        (("--tee", "3", "--local-ranks-filter", "0,1"), [True, True]),
        (("--redirects", "3", "--tee", "0:3"), [True, False]),  # scripts/slurm/train.sbatch
        (("--redirects", "3"), [False, False]),
        (("--redirects", "1"), [True, True]),
        ((), [True, True]),
    ],
)
def test_ranks_that_torchrun_shows(options: tuple[str, ...], shown: list[bool]) -> None:
    from torch.distributed import run

    arguments = run.parse_args([*options, "-m", "x"])
    assert [_is_shown(arguments, rank) for rank in (0, 1)] == shown
