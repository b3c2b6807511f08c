"""Two ranks that save beside training: the same bytes as synchronously, and one rank's failure is both ranks'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch.distributed as dist
from small_disk import fill, small_disk
from test_checkpoint_reshard import PROGRESS, assert_identical, full_state, make_roles, on_two_ranks, train

from titan_distill.checkpoint.discovery import find_latest
from titan_distill.checkpoint.manager import CheckpointManager, RunInfo
from titan_distill.checkpoint.manifest import read_manifest
from titan_distill.checkpoint.state import TrainState
from titan_distill.checkpoint.writing_process import Piece, WritingProcess
from titan_distill.fault_tolerance.files import FileRecord
from titan_distill.fault_tolerance.ranks import RankFailure
from titan_distill.roles import RoleManager

RUN = RunInfo(family="toy", config_digest="d")
NUM_KIB = 4096


def _save_both_ways(folder: Path) -> None:
    roles, manager = make_roles(seed=0), CheckpointManager(folder / "async", 1, RUN, mode="async")
    train(roles, 2)
    expected = full_state(roles)
    synchronous = CheckpointManager(folder / "sync", 1, RUN).save(roles, PROGRESS)
    with manager:
        path = manager.save(roles, PROGRESS)
        for _ in range(3):
            manager.before_change()
            train(roles, 1)
            manager.poll()
    records = [read_manifest(each).files for each in (synchronous, path)]
    for name in ("__0_0.distcp", "__1_0.distcp"):
        assert records[0][name] == records[1][name], name
    resumed = make_roles(seed=1)
    assert manager.load(path, resumed) == PROGRESS
    assert_identical(full_state(resumed), expected)


def _fail_on_both(manager: CheckpointManager, roles: RoleManager, step: int) -> str:
    """Saves and trains on; the failure must come at the same step boundary on both ranks. Returns the message."""
    manager.save(roles, TrainState(step=step))
    with pytest.raises(RankFailure) as failure:
        for num_polls in range(10_000):  # noqa: B007
            manager.before_change()
            manager.poll()
    told: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
    dist.all_gather_object(told, (str(failure.value), num_polls))
    assert told[0] == told[1]
    assert [path.name for path in manager.folder.iterdir()] == ["step-00000001"]
    dist.barrier()
    return told[0][0]


def _fill_the_disk(folder: Path) -> None:
    roles, manager = make_roles(seed=0), CheckpointManager(folder / "checkpoints", 2, RUN, mode="async")
    write, filler, is_first = WritingProcess.write, folder / "filler", dist.get_rank() == 0
    train(roles, 1)
    manager.save(roles, TrainState(step=1))
    manager.wait()

    if is_first:
        fill(folder)
    dist.barrier()
    message = _fail_on_both(manager, roles, 2)
    assert re.match(r"the checkpoint needs \d+\.\d KiB, but the disk of .* has 0 B left;", message), message

    def fill_and_write(process: WritingProcess, path: Path, pieces: list[Piece]) -> FileRecord:
        fill(folder)
        return write(process, path, pieces)

    if is_first:
        filler.unlink()
    else:
        WritingProcess.write = fill_and_write
    dist.barrier()
    message = _fail_on_both(manager, roles, 2)
    assert re.match(r"writing .* failed on .*rank 1: OSError: .*No space left on device", message), message

    WritingProcess.write = write
    if is_first:
        filler.unlink()
    dist.barrier()
    manager.save(roles, TrainState(step=2))
    manager.wait()
    assert find_latest(manager.folder) == manager.folder / "step-00000002"


def _do_all(folder: Path) -> None:
    _save_both_ways(folder)
    _fill_the_disk(folder)


def test_saving_beside_training_and_a_disk_that_is_full_for_one_rank(tmp_path: Path) -> None:
    """One test, because starting two ranks takes longer than all that they do."""
    with small_disk(tmp_path / "disk", NUM_KIB) as disk:
        on_two_ranks(_do_all, disk)
