"""Killing runs in earnest: `pytest -m soak tests/soak/test_kills.py`, 20 minutes on two cores.

Set TITAN_SOAK_KILLS to try another number of kills at random moments than 60.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from fault_points import POINTS
from killed_runs import Job

NUM_KILLS = int(os.environ.get("TITAN_SOAK_KILLS", 60))
START_SECONDS, MAX_SECONDS_TO_LIVE = 120, 1.5


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("num_ranks", "num_kills"), [(1, NUM_KILLS), (2, NUM_KILLS // 5)])
def test_random_kills(tmp_path: Path, num_ranks: int, num_kills: int) -> None:
    """Saves every step, asynchronously and synchronously in turn, and is killed at any moment after the first step."""
    job, moments, num_inside = Job(tmp_path, 1_000_000, num_ranks), random.Random(0), 0
    for number in range(num_kills):
        newest = job.newest()
        run = job.start("sync" if number % 2 else "async")
        wait_until_it_saves(job, run, newest)
        time.sleep(moments.uniform(0, MAX_SECONDS_TO_LIVE))
        assert run.poll() is None, job.log.read_text()[-3000:]
        job.kill(run)
        job.check_resumed(newest)
        num_inside += bool(list(job.checkpoints.glob("*.tmp-*")))
        job.check_folder()
        print(f"kill {number + 1}: resumed from {newest}, newest now {job.newest()}, inside a save {num_inside} times")
    assert num_inside > num_kills / 4, "too few kills met a save to say anything"
    if num_ranks == 1:
        job.check_like_uninterrupted()


def wait_until_it_saves(job: Job, run: object, newest: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while job.newest() <= newest:
        assert run.poll() is None and time.monotonic() < deadline, job.log.read_text()[-3000:]
        time.sleep(0.01)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("num_ranks", "victim"), [(1, 0), (2, 0), (2, 1)])
def test_fault_points(tmp_path: Path, num_ranks: int, victim: int, point: str, mode: str) -> None:
    if victim and point != "mid_shard":
        pytest.skip("rank 0 alone publishes")
    job = Job(tmp_path, num_steps=6, num_ranks=num_ranks)
    assert job.start(mode, f"{point} 4 {victim}").wait(START_SECONDS) != 0
    newest = job.newest()
    assert newest == (4 if point == "during_purge" else 3), job.log.read_text()[-3000:]
    job.check_folder()
    assert job.start(mode).wait(START_SECONDS) == 0, job.log.read_text()[-3000:]
    job.check_resumed(newest)
    assert sorted(path.name for path in job.checkpoints.iterdir()) == ["step-00000005", "step-00000006"]
    job.check_folder()
