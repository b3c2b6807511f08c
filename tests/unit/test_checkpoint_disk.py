"""Checkpoints and the disk: what is hashed is what is there, a full disk harms nothing, and what retention keeps."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from small_disk import fill, small_disk
from test_checkpoint import RUN, make_roles, train
from torch.distributed.checkpoint.planner import SavePlan

from titan_distill.checkpoint import storage
from titan_distill.checkpoint.discovery import PIN_NAME, find_latest
from titan_distill.checkpoint.manager import CheckpointManager
from titan_distill.checkpoint.manifest import read_manifest, verify_hashes
from titan_distill.checkpoint.state import TrainState
from titan_distill.checkpoint.writing_process import Piece, WritingProcess
from titan_distill.fault_tolerance import files
from titan_distill.fault_tolerance.files import FileRecord
from titan_distill.fault_tolerance.ranks import RankFailure
from titan_distill.roles import RoleManager

NUM_KIB = 1024


def trained_roles(width: int = 5) -> RoleManager:
    roles = make_roles(seed=0, width=width)
    train(roles["student"], 1)
    return roles


@pytest.mark.parametrize("piece_bytes", [1 << 20, 1000])
def test_hash_is_of_what_is_in_the_file(tmp_path: Path, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small and large writes mixed, and a kernel that takes a large one in pieces."""
    monkeypatch.setattr(files, "_PIECE_BYTES", piece_bytes)
    with files.HashedFile(tmp_path / "file") as file:
        for num_bytes in (0, 1, 17, 300_000, 5, 200_001):
            assert file.write(os.urandom(num_bytes)) == num_bytes
        assert file.tell() == 500_024
    content = (tmp_path / "file").read_bytes()
    assert file.record() == FileRecord(500_024, hashlib.sha256(content).hexdigest())


def test_records_are_of_the_files_on_disk(tmp_path: Path) -> None:
    path = CheckpointManager(tmp_path, 1, RUN).save(trained_roles(), TrainState(step=1))
    manifest = read_manifest(path)
    assert manifest.files.keys() == {"__0_0.distcp", ".metadata"}
    verify_hashes(path, manifest)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_disk_that_is_too_small_is_refused_before_writing(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "disk", NUM_KIB) as disk:
        manager = CheckpointManager(disk, 2, RUN, mode=mode)
        manager.save(trained_roles(), TrainState(step=1))
        manager.wait()
        for writer in (files.HashedFile, WritingProcess):
            monkeypatch.setattr(writer, "write", lambda *_: pytest.fail("nothing may be written"))
        with pytest.raises(storage.NotEnoughSpace, match=r"needs \d+\.\d MiB, but the disk of .* has \d+\.\d KiB left"):
            manager.save(trained_roles(width=20_000), TrainState(step=2))
            manager.wait()
        assert os.listdir(disk) == ["step-00000001"]


@pytest.mark.parametrize("width", [5, 2000, 50_000])
def test_foreseen_size_is_enough_and_not_much_more(tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    foreseen, planned_bytes = [], storage.planned_bytes

    def foresee(plans: list[SavePlan]) -> int:
        foreseen.append(planned_bytes(plans))
        return foreseen[0]

    monkeypatch.setattr(storage, "planned_bytes", foresee)
    path = CheckpointManager(tmp_path, 1, RUN).save(trained_roles(width), TrainState(step=1))
    needed = sum(-(-file.stat().st_size // 4096) * 4096 for file in path.iterdir())
    num_values = 100
    assert needed <= foreseen[0] <= 1.02 * needed + num_values * 4096


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_disk_that_fills_up_meanwhile_harms_nothing(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", NUM_KIB) as disk:
        manager = CheckpointManager(disk, 2, RUN, mode=mode)
        write, delegate = files.HashedFile.write, WritingProcess.write
        first = manager.save(trained_roles(), TrainState(step=1))
        manager.wait()

        def write_then_fill(file: files.HashedFile, data: bytes) -> int:
            written = write(file, data)
            if file.tell() > 50_000:
                fill(disk)
            return written

        def delegate_half_then_fill(process: WritingProcess, path: Path, pieces: list[Piece]) -> FileRecord:
            delegate(process, path, pieces[: len(pieces) // 2])
            fill(disk)
            return delegate(process, path, pieces)

        with monkeypatch.context() as patched:
            patched.setattr(files.HashedFile, "write", write_then_fill)
            patched.setattr(WritingProcess, "write", delegate_half_then_fill)
            with pytest.raises(RankFailure, match=r"writing .* failed on rank 0: .*No space left on device"):
                manager.save(trained_roles(), TrainState(step=2))
                manager.wait()
        assert sorted(os.listdir(disk)) == ["filler", first.name]
        (disk / "filler").unlink()
        verify_hashes(first, read_manifest(first))
        manager.save(trained_roles(), TrainState(step=2))
        manager.wait()
        assert find_latest(manager.folder) == disk / "step-00000002"


def steps(manager: CheckpointManager) -> list[int]:
    return sorted(int(name.removeprefix("step-")) for name in os.listdir(manager.folder))


class TestRetention:
    def test_pinned_steps_stay_and_do_not_count(self, tmp_path: Path) -> None:
        manager, roles = CheckpointManager(tmp_path, 2, RUN), trained_roles()
        (manager.save(roles, TrainState(step=1)) / PIN_NAME).touch()
        for step in (2, 3, 4):
            manager.save(roles, TrainState(step=step))
        assert steps(manager) == [1, 3, 4]
        (tmp_path / "step-00000001" / PIN_NAME).unlink()
        manager.save(roles, TrainState(step=5))
        assert steps(manager) == [4, 5]

    def test_pinned_step_is_not_replaced(self, tmp_path: Path) -> None:
        manager, roles = CheckpointManager(tmp_path, 2, RUN), trained_roles()
        path = manager.save(roles, TrainState(step=1))
        (path / PIN_NAME).touch()
        before = read_manifest(path)
        with pytest.raises(RankFailure, match=r"step-00000001 is pinned, so it can't be replaced; remove .*'pin'"):
            manager.save(trained_roles(), TrainState(step=1))
        assert read_manifest(path) == before and os.listdir(tmp_path) == [path.name]

    def test_where_the_run_comes_from_stays_until_it_has_something_newer(self, tmp_path: Path) -> None:
        before, roles = CheckpointManager(tmp_path, 3, RUN), trained_roles()
        for step in (10, 20):
            before.save(roles, TrainState(step=step))
        manager = CheckpointManager(tmp_path, 1, RUN)
        manager.load(tmp_path / "step-00000020", make_roles(seed=1))
        manager.save(roles, TrainState(step=5))
        assert steps(manager) == [5, 20]
        manager.save(roles, TrainState(step=21))
        assert steps(manager) == [21]
