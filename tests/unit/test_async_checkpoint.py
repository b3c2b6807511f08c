"""Saving beside training: what is written, what waits for what, and what happens when one of the two fails."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_run
from test_checkpoint import RUN, assert_identical, make_roles, snapshot, train

from titan_distill.checkpoint import manager as manager_module
from titan_distill.checkpoint import storage
from titan_distill.checkpoint.asynchronous import Stage, Stager
from titan_distill.checkpoint.discovery import find_latest
from titan_distill.checkpoint.manager import CheckpointManager
from titan_distill.checkpoint.manifest import read_manifest
from titan_distill.checkpoint.state import TrainState
from titan_distill.fault_tolerance.ranks import RankFailure
from titan_distill.roles import RoleManager

MOMENT_SECONDS = 0.2  # what a call that waits is given to return by mistake


class Gate:
    """Holds a function up until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.opened, self.num_calls = threading.Event(), 0
        inner = getattr(owner, name)

        def held(*args: Any, **kwargs: Any) -> Any:
            self.num_calls += 1
            self.opened.wait()
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, held)


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
def copying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch, Stage, "finish")
    yield gate
    gate.opened.set()


def trained_roles() -> RoleManager:
    roles = make_roles(seed=0)
    train(roles["student"], 2)
    train(roles["critic"], 3)
    return roles


def returns(work: Any) -> threading.Thread:
    """Runs `work` beside the test; join the result."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_writes_what_was_there_while_training_goes_on(manager: CheckpointManager, writing: Gate) -> None:
    roles, resumed = trained_roles(), make_roles(seed=9)
    before = snapshot(roles)
    path = manager.save(roles, TrainState(step=3, samples_seen=12, seed=7))
    manager.before_change()
    for name in ("student", "critic"):
        train(roles[name], 2)
    assert find_latest(manager.folder) is None
    writing.opened.set()
    manager.wait()
    assert manager.load(path, resumed) == TrainState(step=3, samples_seen=12, seed=7)
    assert_identical(snapshot(resumed), before)


def test_buffers_that_a_forward_pass_changes_are_copied_at_once(manager: CheckpointManager, copying: Gate) -> None:
    roles, resumed = trained_roles(), make_roles(seed=9)
    before = snapshot(roles)
    path = manager.save(roles, TrainState(step=3))
    roles["student"].transformer(roles["student"].transformer[0].weight)  # BatchNorm's running mean
    copying.opened.set()
    manager.wait()
    manager.load(path, resumed)
    assert_identical(snapshot(resumed), before)


def test_values_that_are_no_tensors_are_copied_at_once() -> None:
    """Whatever a scheduler keeps: dictionaries, lists, and objects that change in place."""
    state = {"schedulers": {"milestones": Counter({3: 1}), "base_lrs": [1.0]}}
    stage = Stager(torch.device("cpu")).begin(state, steady=())
    state["schedulers"]["milestones"][4] += 1
    state["schedulers"]["base_lrs"][0] = 2.0
    assert stage.state == {"schedulers": {"milestones": Counter({3: 1}), "base_lrs": [1.0]}}
    assert type(stage.state["schedulers"]["milestones"]) is Counter


def test_sync_and_async_write_the_same_files(tmp_path: Path) -> None:
    """Equal hashes; but .metadata holds a random id of the save, and is equal in all else."""
    found = {}
    for mode in ("sync", "async"):
        manager = CheckpointManager(tmp_path / mode, 1, RUN, mode=mode)
        path = manager.save(trained_roles(), TrainState(step=3))
        manager.wait()
        manifest, metadata = read_manifest(path), storage.read_metadata(path)
        del manifest.files[storage.METADATA_NAME]
        metadata.storage_meta = None  # the id
        found[mode] = manifest, metadata
    assert found["sync"] == found["async"]


def test_host_memory_is_used_again(manager: CheckpointManager) -> None:
    roles = trained_roles()
    manager.save(roles, TrainState(step=1))
    manager.wait()
    buffers = {name: buffer.data_ptr() for name, buffer in manager._stager._buffers.items()}
    manager.save(roles, TrainState(step=2))
    assert {name: buffer.data_ptr() for name, buffer in manager._stager._buffers.items()} == buffers != {}


def test_change_waits_for_the_copy(manager: CheckpointManager, copying: Gate) -> None:
    manager.save(trained_roles(), TrainState(step=1))
    change = returns(manager.before_change)
    change.join(MOMENT_SECONDS)
    assert change.is_alive()
    copying.opened.set()
    change.join()


def test_change_that_did_not_wait_is_found_out(manager: CheckpointManager, copying: Gate) -> None:
    roles = trained_roles()
    manager.save(roles, TrainState(step=1))
    train(roles["critic"], 1)
    copying.opened.set()
    with pytest.raises(RankFailure, match=r"critic.* was changed while it was copied"):
        manager.wait()
    assert find_latest(manager.folder) is None


def test_only_one_save_is_under_way(manager: CheckpointManager, writing: Gate) -> None:
    roles = trained_roles()
    manager.save(roles, TrainState(step=1))
    second = returns(lambda: manager.save(roles, TrainState(step=2)))
    second.join(MOMENT_SECONDS)
    assert second.is_alive() and writing.num_calls == 1
    writing.opened.set()
    second.join()
    manager.wait()
    assert sorted(os.listdir(manager.folder)) == ["step-00000001", "step-00000002"]


def test_failure_is_raised_once_at_the_next_step_boundary(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = trained_roles()
    manager.save(roles, TrainState(step=1))
    manager.wait()
    with monkeypatch.context() as patched:
        patched.setattr(storage, "write", fail)
        manager.save(roles, TrainState(step=2))
        manager.before_change()
        manager._saving.exception()
        with pytest.raises(RankFailure, match=r"^rank 0 failed with OSError: disk on fire$"):
            manager.poll()
    manager.poll()
    assert os.listdir(manager.folder) == ["step-00000001"]
    manager.save(roles, TrainState(step=2))
    manager.wait()
    assert find_latest(manager.folder) == manager.folder / "step-00000002"


def fail(*_: Any) -> None:
    raise OSError("disk on fire")


def test_failure_while_copying_does_not_hang_training(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stage, "finish", fail)
    manager.save(trained_roles(), TrainState(step=1))
    change = returns(manager.before_change)
    change.join(10)
    assert not change.is_alive()
    with pytest.raises(RankFailure, match="disk on fire"):
        manager.wait()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_save_under_way_survives_the_end_of_training(tmp_path: Path, writing: Gate, error: type[BaseException]) -> None:
    roles, manager = trained_roles(), CheckpointManager(tmp_path, 2, RUN, mode="async")
    with pytest.raises(error), manager:
        manager.save(roles, TrainState(step=1))
        threading.Timer(MOMENT_SECONDS, writing.opened.set).start()
        raise error
    assert find_latest(manager.folder) == tmp_path / "step-00000001"


def test_save_that_hangs_is_given_up_when_training_fails(
    tmp_path: Path, writing: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    roles, manager = trained_roles(), CheckpointManager(tmp_path, 2, RUN, mode="async")
    writing.opened.set()
    manager.save(roles, TrainState(step=1))
    manager.wait()
    writing.opened.clear()
    monkeypatch.setattr(manager_module, "PATIENCE_SECONDS", MOMENT_SECONDS)
    with pytest.raises(ZeroDivisionError), manager:
        manager.save(roles, TrainState(step=2))
        raise ZeroDivisionError
    assert "step-00000002 is not saved" in caplog.text
    assert find_latest(manager.folder) == tmp_path / "step-00000001"


def test_four_steps_and_four_are_eight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise, from a checkpoint that was written while two further steps were trained."""
    settings = ("--checkpoint.enabled", "true", "--checkpoint.interval", "4", "--ema.decay", "0.9")
    trainer = toy_run.toy_trainer(tmp_path, "dmd2", *settings, "--checkpoint.mode", "async", with_latents=False)
    write, steps_at_write = storage.write, []

    def write_later(*args: Any) -> Any:
        while trainer.state.step == 4:
            time.sleep(0.001)
        steps_at_write.append(trainer.state.step)
        return write(*args)

    monkeypatch.setattr(storage, "write", write_later)
    trainer.run()
    assert steps_at_write[0] > 4
    resume = ("--checkpoint.resume_from", str(tmp_path / "run" / "checkpoints" / "step-00000004"))
    resumed = toy_run.toy_trainer(tmp_path, "dmd2", *settings, *resume, with_latents=False)
    assert resumed.state.step == 4
    resumed.run()
    assert_identical(snapshot(resumed.roles), snapshot(trainer.roles))
