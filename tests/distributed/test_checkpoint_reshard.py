"""A checkpoint of one rank loads on two FSDP ranks and back, bit for bit; one rank's failure is both ranks'."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from titan_distill.checkpoint.discovery import find, find_latest
from titan_distill.checkpoint.manager import CheckpointManager, RunInfo
from titan_distill.checkpoint.manifest import CheckpointDamaged, read_manifest
from titan_distill.checkpoint.state import TrainState
from titan_distill.roles import Ema, RoleHandle, RoleManager

NUM_RANKS = 2
PROGRESS = TrainState(step=2, samples_seen=8, seed=3)


def make_roles(seed: int) -> RoleManager:
    """A student whose first dim does not divide by two ranks (5), and leaves one of them without a row (1)."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    student = RoleHandle(
        "student",
        {"transformer": module},
        trainable=True,
        optimizers={"transformer": optimizer},
        schedulers={"transformer": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))},
        ema=Ema(module, decay=0.9, start_step=0),
    )
    return RoleManager([student])


def train(roles: RoleManager, num_updates: int) -> None:
    """The same data on every rank, so that FSDP's mean over ranks is the gradient of one rank."""
    student = roles["student"]
    for _ in range(num_updates):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(student.num_updates))
        student.transformer(x).square().sum().backward()
        student.step(student.num_updates, tick_ema=True)


def full_state(roles: RoleManager) -> dict[str, Any]:
    student = roles["student"]
    parameters = dict(student.transformer.named_parameters())
    moments = student.optimizers["transformer"].state
    tensors = {
        **{f"model.{name}": parameter for name, parameter in parameters.items()},
        **{f"{key}.{name}": value for name, p in parameters.items() for key, value in moments[p].items()},
        **{f"ema.{name}": value for name, value in student.ema.shadow.items()},
    }
    full = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in tensors.items()
    }
    return {**full, "scheduler": student.schedulers["transformer"].state_dict(), "num_updates": student.num_updates}


def assert_identical(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


def make_manager(folder: Path) -> CheckpointManager:
    return CheckpointManager(folder, keep=1, run_info=RunInfo(family="toy", config_digest="d"))


def on_two_ranks(work: Callable[..., None], *args: Any) -> None:
    folder = args[0]
    mp.spawn(_rank_main, (work, f"file://{folder}/rendezvous", args), nprocs=NUM_RANKS)


def _rank_main(rank: int, work: Callable[..., None], rendezvous: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=NUM_RANKS)
    work(*args)
    dist.barrier()  # a rank that leaves while the other still talks to it makes gloo abort
    dist.destroy_process_group()


def _load_compare_save_again(folder: Path, source: Path, expected: dict[str, Any]) -> None:
    roles = make_roles(seed=100)
    manager = make_manager(folder)
    assert manager.load(source, roles) == PROGRESS
    assert isinstance(roles["student"].ema.shadow["0.weight"], DTensor)
    assert_identical(full_state(roles), expected)
    manager.save(roles, PROGRESS)


def test_one_rank_to_two_and_back(tmp_path: Path) -> None:
    roles = make_roles(seed=0)
    train(roles, 2)
    source = make_manager(tmp_path / "one").save(roles, PROGRESS)
    expected = full_state(roles)

    on_two_ranks(_load_compare_save_again, tmp_path, source, expected)

    manager = make_manager(tmp_path)
    resharded = find_latest(manager.folder)
    manifest = read_manifest(resharded)
    assert (manifest.world_size, manifest.trained["student"].mesh) == (2, {"dp_shard": 2})
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} == manifest.files.keys()
    back = make_roles(seed=200)
    assert manager.load(resharded, back) == PROGRESS
    assert_identical(full_state(back), expected)
    train(roles, 1)
    train(back, 1)
    assert_identical(full_state(back), full_state(roles))


def _fail_on_rank_one(folder: Path) -> None:
    roles, manager = make_roles(seed=0), make_manager(folder)
    train(roles, 1)
    before = manager.save(roles, TrainState(step=1))

    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
    with pytest.raises(RuntimeError, match=r"rank 1: .*File too large"):
        manager.save(roles, TrainState(step=2))
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    assert [name for name in os.listdir(folder) if name.startswith("step-")] == [before.name]

    state = full_state(roles)
    if dist.get_rank() == 0:
        os.truncate(before / "__1_0.distcp", 100)
    with pytest.raises(CheckpointDamaged, match=r"__1_0.distcp is damaged"):
        manager.load(before, roles)
    assert_identical(full_state(roles), state)

    manager.save(roles, TrainState(step=2))
    assert find_latest(manager.folder) == folder / "step-00000002"


def test_failure_on_one_rank_is_raised_on_both_and_harms_nothing(tmp_path: Path) -> None:
    on_two_ranks(_fail_on_rank_one, tmp_path)


def _disagree(folder: Path) -> None:
    """Only rank 1's share of the hashes is wrong, and only rank 0 finds no checkpoint."""
    roles, manager = make_roles(seed=0), make_manager(folder)
    path = manager.save(roles, TrainState(step=1))
    damaged = sorted(read_manifest(path).files)[1]
    dist.barrier()
    if dist.get_rank() == 0:
        content = bytearray((path / damaged).read_bytes())
        content[-1] ^= 1
        (path / damaged).write_bytes(content)
    dist.barrier()
    with pytest.raises(CheckpointDamaged, match=f"{damaged} is damaged: its SHA-256"):
        manager.load(path, roles)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        manager.ranks.on_rank_zero(lambda: find(folder, str(folder / "nowhere" if dist.get_rank() == 0 else path)))


def test_what_one_rank_finds_out_is_known_to_both(tmp_path: Path) -> None:
    on_two_ranks(_disagree, tmp_path)
