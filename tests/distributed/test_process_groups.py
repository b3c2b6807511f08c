"""Process groups of a run: there is one wherever a role is offloaded, and each has the configured timeouts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import train_forked
from runs import REPOSITORY, read_metrics, tiny_argv
from slab_checks import assert_exact_slabs
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from titan_distill import train
from titan_distill.checkpoint.manager import BACKGROUND_PATIENCE, CheckpointManager, RunInfo
from titan_distill.config.degrees import Degrees
from titan_distill.fault_tolerance.signals import Stop
from titan_distill.parallelisms.fsdp import reshard
from titan_distill.parallelisms.mesh import Layouts, start_world, tighten_timeout
from titan_distill.parallelisms.tensor import enable_async_communication
from titan_distill.roles import RoleHandle

START_SECONDS, TRAIN_SECONDS = 77.0, 33.0


def timeout_seconds(group: dist.ProcessGroup | None) -> float:
    group = group or dist.group.WORLD
    assert group is not None
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def check_timeouts(_: Sequence[str]) -> int:
    world = start_world(START_SECONDS)
    layouts = Layouts(world, Degrees(), {"teacher": Degrees(sequence=2), "student": Degrees(dp_shard=2)})
    groups = [None, *layouts.groups()]
    assert len({group.group_name for group in groups if group is not None}) > 1
    manager = CheckpointManager(
        Path(os.devnull), 1, RunInfo("toy", ""), mode="async", timeout_seconds=world.timeout_seconds
    )
    of_checkpoints = [manager.ranks.group, manager._saving_ranks.group]
    limits = [START_SECONDS, BACKGROUND_PATIENCE * START_SECONDS]
    assert {timeout_seconds(group) for group in groups} == {START_SECONDS}
    assert [timeout_seconds(group) for group in of_checkpoints] == limits
    tighten_timeout(TRAIN_SECONDS, layouts)
    assert {timeout_seconds(group) for group in groups} == {TRAIN_SECONDS}
    assert [timeout_seconds(group) for group in of_checkpoints] == limits, "disks are slow at any time"
    check_overlap(layouts)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def check_overlap(layouts: Layouts) -> None:
    """Overlap of communication is enabled without a warning; here, because it needs a process group."""
    from torch.distributed._symmetric_memory import is_symm_mem_enabled_for_group

    mesh = layouts.role("student")
    assert mesh is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_async_communication(mesh.fsdp)
    assert is_symm_mem_enabled_for_group(mesh.fsdp.get_group().group_name), "else the compiler leaves collectives alone"


def test_every_group_has_the_configured_timeout(tmp_path: Path) -> None:
    assert train_forked(2, [], tmp_path, main=check_timeouts) == [0, 0], (tmp_path / "rank0.txt").read_text()


def train_offloaded(argv: Sequence[str]) -> int:
    trainer = train.start(list(argv), Stop(), ExitStack())
    assert trainer is not None
    laid_out = {role.name: shards_of(role) for role in trainer.roles}
    for role in trainer.roles:
        shards = laid_out[role.name]
        assert shards, f"{role.name} is in host memory, so FSDP must bring it to the device"
        assert_exact_slabs(shards)
        for unit in role.transformer.modules():
            if isinstance(unit, FSDPModule) and (group := unit._get_fsdp_state()._fsdp_param_group) is not None:
                assert isinstance(group.offload_policy, CPUOffloadPolicy)
    code = train.train(trainer)
    for role in trainer.roles:
        assert [s.data_ptr() for s in shards_of(role)] == [s.data_ptr() for s in laid_out[role.name]], "nothing moved"
    return code


def shards_of(role: RoleHandle) -> list[torch.Tensor]:
    reshard(role.transformer)
    return [p.to_local() for p in role.transformer.parameters() if isinstance(p, DTensor)]


def test_offloaded_run_of_one_process_in_fp32_is_the_plain_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    curves = []
    for name, main, options in (
        ("plain", None, ()),
        ("offloaded", train_offloaded, ("--parallelism.cpu_offload", "true")),
    ):
        short = ("--training.steps", "2", "--training.global_batch_size", "2", "--training.local_batch_size", "2")
        short += ("--checkpoint.enabled", "false", *options)
        argv = tiny_argv("dmd2", tmp_path / name, *short)
        assert train_forked(1, argv, tmp_path, main=main) == [0], (tmp_path / "rank0.txt").read_text()
        rows = read_metrics(tmp_path / name)
        curves.append([row[key] for row in rows for key in row if key.startswith(("loss/", "grad_norm/"))])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert {"loss/student", "loss/critic"} <= {key for row in rows for key in row}
