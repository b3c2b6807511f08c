"""A run that is killed inside a save goes on from the newest published step, and saves the lost step again. So does one
whose writing process is killed."""

from __future__ import annotations

import signal
from pathlib import Path

from killed_runs import KEEP, Job

KILLS = [
    # point, step, mode, newest step afterwards
    ("mid_shard", 3, "async", 2),
    ("before_manifest", 3, "sync", 2),
    ("before_rename", 4, "async", 3),
    ("during_purge", 5, "sync", 5),
]


def test_killed_at_each_fault_point_one_after_the_other(tmp_path: Path) -> None:
    """The rest of the table (two ranks, random moments) is in tests/soak."""
    job, newest = Job(tmp_path, num_steps=7), 0
    for point, step, mode, newest_after in KILLS:
        assert job.start(mode, f"{point} {step} 0").wait(60) == -signal.SIGKILL, job.log.read_text()
        job.check_resumed(newest)
        newest = job.newest()
        assert newest == newest_after
        assert len(list(job.checkpoints.glob("*.tmp-*"))) == 1, "it did die inside a save"
        job.check_folder()
    assert job.start("async").wait(60) == 0, job.log.read_text()
    job.check_resumed(newest)
    assert sorted(path.name for path in job.checkpoints.iterdir()) == ["step-00000006", "step-00000007"][-KEEP:]
    job.check_folder()
    job.check_like_uninterrupted()


def test_run_whose_writing_process_is_killed_says_so_and_can_be_resumed(tmp_path: Path) -> None:
    job = Job(tmp_path, num_steps=4)
    assert job.start("async", "writer_dies 3 0").wait(60) == 1, job.log.read_text()
    shown = job.log.read_text()
    assert "ChildProcessError: the process that writes __0_0.distcp was killed by SIGKILL; is memory short?\n" in shown
    assert "Traceback" not in shown
    assert sorted(path.name for path in job.checkpoints.iterdir()) == ["step-00000001", "step-00000002"]
    assert job.start("async").wait(60) == 0, job.log.read_text()
    job.check_resumed(2)
    job.check_folder()
    job.check_like_uninterrupted()
