"""The process that writes asynchronous saves: what it does for the trainer, what it takes, and how it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pytest
from checkpoint_memory_worker import peak_growth
from test_async_checkpoint import Gate, trained_roles
from test_checkpoint import RUN, make_roles, train

from titan_distill.checkpoint import commit, storage, writing_process
from titan_distill.checkpoint import manager as manager_module
from titan_distill.checkpoint.manager import CheckpointManager
from titan_distill.checkpoint.manifest import read_manifest, verify_hashes
from titan_distill.checkpoint.state import TrainState
from titan_distill.checkpoint.writing_process import NICENESS, WritingProcess
from titan_distill.fault_tolerance import files
from titan_distill.fault_tolerance.ranks import RankFailure
from titan_distill.fault_tolerance.signals import STOP_SIGNALS
from titan_distill.parallelisms.pinned import SharedMemory

DEADLINE_SECONDS = 60  # on a busy machine
MIB = 1 << 20


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[CheckpointManager]:
    with CheckpointManager(tmp_path / "checkpoints", keep=2, run_info=RUN, mode="async") as manager:
        yield manager


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch, storage, "write")
    yield gate
    gate.opened.set()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[WritingProcess]:
    """Processes that the manager starts."""
    started: list[WritingProcess] = []

    def start(memory: SharedMemory) -> WritingProcess:
        started.append(WritingProcess(memory))
        return started[-1]

    monkeypatch.setattr(manager_module, "WritingProcess", start)
    return started


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_ready(pid: int) -> bool:
    return os.getpriority(os.PRIO_PROCESS, pid) == NICENESS


def lives(pid: int) -> bool:
    """A process that nobody has waited for yet does not live."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_another_process_of_low_priority_and_without_torch_writes_the_data(
    manager: CheckpointManager, writing: Gate, started: list[WritingProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.HashedFile, "write", lambda *_: pytest.fail("the trainer writes"))
    path = manager.save(trained_roles(), TrainState(step=1))
    (process,) = started
    assert process.pid != os.getpid()
    wait_until(lambda: is_ready(process.pid))
    assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
    writing.opened.set()
    manager.wait()
    assert read_manifest(path).files.keys() == {"__0_0.distcp", ".metadata"}
    verify_hashes(path, read_manifest(path))
    assert not lives(process.pid)


def test_memory_is_one_copy_of_the_state(
    manager: CheckpointManager, started: list[WritingProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer allocates it in the first save. The process maps it, and takes nothing of its own."""
    roles = make_roles(seed=0, width=MIB)  # with moments and EMA 112 MiB
    train(roles["student"], 1)
    compared, anonymous = commit._compared, []

    def compare(*args: Any) -> Any:
        status = Path(f"/proc/{started[-1].pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("RssAnon")]
        anonymous.append(int(line.split()[1]) << 10)
        return compared(*args)

    def save(step: int) -> None:
        manager.save(roles, TrainState(step=step))
        manager.wait()

    monkeypatch.setattr(commit, "_compared", compare)
    save(1)
    assert read_manifest(manager.folder / "step-00000001").files["__0_0.distcp"].num_bytes > 112 * MIB
    assert peak_growth(lambda: save(2)) < 24 * MIB
    assert max(anonymous) < 24 * MIB


def test_death_of_the_process_fails_the_save_and_only_that(
    manager: CheckpointManager, writing: Gate, started: list[WritingProcess]
) -> None:
    roles = trained_roles()
    manager.save(roles, TrainState(step=1))
    os.kill(started[0].pid, signal.SIGKILL)
    writing.opened.set()
    sentence = (
        r"^writing .*step-00000001\.tmp-\w+ failed on rank 0: ChildProcessError: the process that writes __0_0\.distcp "
        r"was killed by SIGKILL; is memory short\?$"
    )
    with pytest.raises(RankFailure, match=sentence):
        manager.wait()
    assert os.listdir(manager.folder) == []
    path = manager.save(roles, TrainState(step=1))
    manager.wait()
    verify_hashes(path, read_manifest(path))


def test_process_that_cannot_be_started_fails_the_save(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing_process.sys, "executable", "/nowhere/python")
    with pytest.raises(RankFailure, match=r"^rank 0 failed with FileNotFoundError: .*'/nowhere/python'$"):
        manager.save(trained_roles(), TrainState(step=1))
    assert not manager.is_saving
    manager.before_change()  # does not wait for a copy that nobody makes


def test_signals_that_stop_a_run_do_not_end_its_save(
    manager: CheckpointManager, writing: Gate, started: list[WritingProcess]
) -> None:
    """From the first moment: SLURM and Ctrl-C signal all processes at once."""
    path = manager.save(trained_roles(), TrainState(step=1))
    for number in (signal.SIGINT, *STOP_SIGNALS):
        os.kill(started[0].pid, number)
    wait_until(lambda: is_ready(started[0].pid))
    for number in (signal.SIGINT, *STOP_SIGNALS):
        os.kill(started[0].pid, number)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set(), "the trainer itself still gets them"
    writing.opened.set()
    manager.wait()
    verify_hashes(path, read_manifest(path))


def test_no_process_outlives_a_trainer_that_is_killed() -> None:
    """Also if a forked data worker still holds the connection, as here."""
    ours, theirs = Pipe()
    context = multiprocessing.get_context("fork")
    trainer = context.Process(target=_train_and_hang, args=(theirs,))
    trainer.start()
    writer, worker = ours.recv()
    wait_until(lambda: "/memfd:" in Path(f"/proc/{writer}/maps").read_text())
    assert lives(writer)
    trainer.kill()
    trainer.join()
    try:
        wait_until(lambda: not lives(writer))
        assert lives(worker)
    finally:
        os.kill(worker, signal.SIGKILL)


def _train_and_hang(test: Connection) -> None:
    memory = SharedMemory()
    memory.extend(1)
    process = WritingProcess(memory)
    if (worker := os.fork()) != 0:
        test.send((process.pid, worker))
    while True:
        signal.pause()
