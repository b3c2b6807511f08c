"""One process per folder: who gets the lock, who is told to wait, and who notices that it lost it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from titan_distill.fault_tolerance.run_lock import NAME, LockLostError, Owner, RunLock, read_owner

HOLD = """
import sys, pathlib
from titan_distill.fault_tolerance.run_lock import RunLock
with RunLock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
ELSEWHERE = Owner("theirs", "other-host", "another boot", 1, "1")
QUICK = {"patience_seconds": 0.4, "renewal_seconds": 0.05}


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def plant(folder: Path, owner: Owner) -> Path:
    path = folder / NAME
    path.write_text(json.dumps(asdict(owner)))
    return path


def test_a_live_process_of_this_host_keeps_its_folder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(ValueError, match=rf"is in use by process {holder.pid} on .*; wait for it"), RunLock(tmp_path):
        pass
    holder.communicate("", timeout=10)
    assert not (tmp_path / NAME).exists()
    with RunLock(tmp_path):
        assert read_owner(tmp_path / NAME) == replace(read_owner(tmp_path / NAME), pid=os.getpid())


def test_a_killed_process_of_this_host_is_replaced_at_once(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunLock(tmp_path, patience_seconds=1e6) as lock:
        lock.check()
    assert not list(tmp_path.iterdir())


def test_a_process_id_that_was_given_again_is_no_owner(tmp_path: Path) -> None:
    plant(tmp_path, replace(Owner.current(), started="1"))
    with RunLock(tmp_path, patience_seconds=1e6) as lock:
        lock.check()


def test_an_owner_elsewhere_that_renews_is_alive(tmp_path: Path) -> None:
    path, stopped = plant(tmp_path, ELSEWHERE), threading.Event()

    def renew() -> None:
        while not stopped.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(ValueError, match="is in use by process 1 on other-host"), RunLock(tmp_path, **QUICK):
            pass
    finally:
        stopped.set()
        thread.join()
    assert read_owner(path) == ELSEWHERE


def test_an_owner_elsewhere_that_is_silent_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plant(tmp_path, ELSEWHERE)
    with RunLock(tmp_path, **QUICK) as lock:
        lock.check()
    first, last = (record.message for record in caplog.records)
    assert "held by process 1 on other-host: watching for" in first
    assert last.endswith("taken over from process 1 on other-host, which is gone")


def test_an_empty_file_is_replaced(tmp_path: Path) -> None:
    """Its maker died between creating and writing it."""
    (tmp_path / NAME).touch()
    with RunLock(tmp_path, **QUICK) as lock:
        lock.check()


def test_a_requeued_job_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, replace(ELSEWHERE, slurm_job="7"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with RunLock(tmp_path, patience_seconds=1e6) as lock:
        lock.check()


def test_a_replaced_owner_stops_and_leaves_the_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path, renewal_seconds=0.01) as lock:
        plant(tmp_path, ELSEWHERE)
        with pytest.raises(LockLostError, match="was taken over by process 1 on other-host"):
            lock.check()
    assert read_owner(tmp_path / NAME) == ELSEWHERE


def test_one_of_many_challengers_wins(tmp_path: Path) -> None:
    """Each process takes the lock of a dead owner, writes that it is inside, and leaves: never two at once."""
    plant(tmp_path, replace(Owner.current(), started="1"))
    code = """
import sys, pathlib, time
from titan_distill.fault_tolerance.run_lock import RunLock
folder = pathlib.Path(sys.argv[1])
while True:
    try:
        with RunLock(folder):
            with open(folder / "inside", "x"):
                time.sleep(0.02)
            (folder / "inside").unlink()
        break
    except ValueError:
        time.sleep(0.01)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(6)]
    assert [process.wait(60) for process in processes] == [0] * 6
    assert not list(tmp_path.iterdir())
