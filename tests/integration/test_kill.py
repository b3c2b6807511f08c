"""A run that is killed inside a save goes on from the newest published step, and saves the lost step again."""

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
