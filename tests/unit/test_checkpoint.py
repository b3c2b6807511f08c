"""Checkpoints of small roles, written and read by the real torch.distributed.checkpoint."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import pickle
import resource
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import trained_role
from torch import nn

from titan_distill.checkpoint import storage
from titan_distill.checkpoint.discovery import complete_steps, find, find_latest, resolve
from titan_distill.checkpoint.manager import CheckpointManager, RunInfo
from titan_distill.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    CheckpointDamaged,
    FrozenRole,
    read_manifest,
    write_manifest,
)
from titan_distill.checkpoint.state import TrainState
from titan_distill.fault_tolerance.files import FileRecord, fingerprint, record_file
from titan_distill.roles import Ema, RoleHandle, RoleManager

RUN = RunInfo(family="toy", config_digest="d", frozen={"teacher": FrozenRole("weights/teacher", "t")})


def make_role(name: str, seed: int, *, width: int = 5, ema: bool = False, lr: float = 1e-2) -> RoleHandle:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
    return trained_role(name, module, ema=Ema(module, decay=0.9, start_step=1) if ema else None, lr=lr)


def make_roles(seed: int, **student: Any) -> RoleManager:
    teacher = RoleHandle("teacher", {"transformer": nn.Linear(3, 1)}, trainable=False)
    student = {"ema": True, **student}
    return RoleManager([teacher, make_role("student", seed, **student), make_role("critic", seed + 1)])


def train(handle: RoleHandle, num_updates: int) -> None:
    for _ in range(num_updates):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(handle.num_updates))
        handle.transformer(x).square().sum().backward()
        handle.step(handle.num_updates, tick_ema=True)


def snapshot(roles: RoleManager) -> dict[str, Any]:
    return deepcopy(
        {
            handle.name: {
                "model": handle.transformer.state_dict(),
                "optimizers": {name: optimizer.state_dict() for name, optimizer in handle.optimizers.items()},
                "schedulers": {name: scheduler.state_dict() for name, scheduler in handle.schedulers.items()},
                "ema": handle.ema.shadow if handle.ema else None,
                "num_updates": handle.num_updates,
            }
            for handle in roles.trainable
        }
    )


def assert_identical(found: Any, expected: Any, path: str = "") -> None:
    assert type(found) is type(expected), path
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_identical(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_identical(one, other, f"{path}/{i}")
    else:
        assert found == expected, path


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path / "checkpoints", keep=2, run_info=RUN)


@pytest.fixture
def saved(manager: CheckpointManager) -> Path:
    """A checkpoint of step 3."""
    roles = make_roles(seed=0)
    train(roles["student"], 1)
    train(roles["critic"], 3)
    return manager.save(roles, TrainState(step=3, samples_seen=12, seed=7))


class TestResume:
    def test_is_bitwise_and_training_goes_on_as_if_never_stopped(self, manager: CheckpointManager) -> None:
        roles, resumed = make_roles(seed=0), make_roles(seed=100)
        train(roles["student"], 2)
        train(roles["critic"], 5)
        path = manager.save(roles, TrainState(step=5, samples_seen=20, seed=7))
        drawn = torch.rand(3)

        assert manager.load(path, resumed) == TrainState(step=5, samples_seen=20, seed=7)
        assert torch.equal(torch.rand(3), drawn)
        assert_identical(snapshot(resumed), snapshot(roles))
        for name in ("student", "critic"):
            train(roles[name], 2)
            train(resumed[name], 2)
        assert_identical(snapshot(resumed), snapshot(roles))

    @pytest.mark.parametrize("num_updates", [0, 1])
    def test_saving_does_not_change_training(self, manager: CheckpointManager, num_updates: int) -> None:
        roles, undisturbed, resumed = make_roles(seed=0), make_roles(seed=0), make_roles(seed=9)
        train(roles["student"], num_updates)
        train(undisturbed["student"], num_updates)
        manager.load(manager.save(roles, TrainState(step=1)), resumed)
        for each in (roles, undisturbed, resumed):
            train(each["student"], 2)
        assert_identical(snapshot(roles), snapshot(undisturbed))
        assert_identical(snapshot(resumed)["student"], snapshot(undisturbed)["student"])

    def test_parameter_without_gradients_keeps_having_no_optimizer_state(self, manager: CheckpointManager) -> None:
        roles, resumed = make_roles(seed=0), make_roles(seed=1)
        for each in (roles, resumed):
            each["student"].transformer.register_parameter("unused", nn.Parameter(torch.ones(2)))
            each["student"].optimizers["transformer"].add_param_group({"params": [each["student"].transformer.unused]})
            each["student"].schedulers["transformer"] = torch.optim.lr_scheduler.LambdaLR(
                each["student"].optimizers["transformer"], lambda step: 1 / (1 + step)
            )
            each["student"].ema = None
        train(roles["student"], 1)
        manager.load(manager.save(roles, TrainState(step=1)), resumed)
        assert_identical(snapshot(resumed)["student"], snapshot(roles)["student"])

    def test_the_settings_of_an_optimizer_are_those_it_was_built_with(
        self, manager: CheckpointManager, saved: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """And its rate is that of the schedule it was built with, at the position of the checkpoint."""
        roles = make_roles(seed=0, lr=5e-4)
        (group,) = roles["student"].optimizers["transformer"].param_groups
        group |= {"betas": (0.5, 0.6), "weight_decay": 0.125}
        manager.load(saved, roles)
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        (group,) = roles["student"].optimizers["transformer"].param_groups
        assert (group["betas"], group["weight_decay"], group["initial_lr"]) == ((0.5, 0.6), 0.125, 5e-4)
        assert group["lr"] == roles["student"].learning_rate == 5e-4 / (1 + roles["student"].num_updates)
        train(roles["student"], 1)
        assert roles["student"].learning_rate == 5e-4 / (1 + roles["student"].num_updates)

    def test_changed_teacher_is_named(self, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
        other = RunInfo(family="toy", config_digest="d", frozen={"teacher": FrozenRole("other/teacher", "u")})
        CheckpointManager(saved.parent, 2, other).load(saved, make_roles(seed=0))
        assert "weights of teacher have changed" in caplog.text

    def test_another_architecture_of_the_same_shapes_is_refused(self, saved: Path) -> None:
        folder = saved.parent
        sharded, eight, four = (
            replace(RUN, architectures={"student": {"_class_name": name, "heads": heads, "patch": (1, 2)}})
            for name, heads in (("FSDPNet", 8), ("Net", 8), ("Net", 4))
        )
        path = CheckpointManager(folder, 2, sharded).save(make_roles(seed=0), TrainState(step=9))
        CheckpointManager(folder, 2, eight).load(path, make_roles(seed=0))
        with pytest.raises(ValueError, match=r"roles.student has heads = 4, but .*step-00000009 was saved with 8;"):
            CheckpointManager(folder, 2, four).load(path, make_roles(seed=0))

    @pytest.mark.parametrize("recorded, version", [(None, "1 (not recorded)"), (1, "1"), (3, "3")])
    def test_changed_noise_is_said_in_one_line(
        self, recorded: int | None, version: str, saved: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        if recorded is None:
            without_field(saved)
        else:
            write_manifest(saved, replace(read_manifest(saved), noise_version=recorded))
        CheckpointManager(saved.parent, 2, replace(RUN, noise_version=2)).load(saved, make_roles(seed=0))
        lines = [record.getMessage() for record in caplog.records if "Noise" in record.getMessage()]
        drawn = f"the checkpoint's run drew noise of version {version}, this one draws version 2"
        assert lines == [f"Noise changes from here: {drawn}"]

    def test_the_same_noise_is_no_news(self, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
        manager = CheckpointManager(saved.parent, 2, replace(RUN, noise_version=2))
        again = manager.save(make_roles(seed=0), TrainState(step=9))
        assert read_manifest(again).noise_version == 2
        manager.load(again, make_roles(seed=0))
        assert "Noise" not in caplog.text

    @pytest.mark.parametrize(
        ("roles", "message"),
        [
            (lambda: make_roles(0, width=6), r"models/student/transformer.*\[6.* in this run but .*\[5"),
            (lambda: make_roles(0, ema=False), "has ema/student.*which this run would drop"),
            (lambda: RoleManager([make_role("student", 0, ema=True)]), "critic.*which this run would drop"),
            (lambda: RoleManager([*make_roles(0), make_role("extra", 0)]), "has no models/extra"),
        ],
    )
    def test_another_run_is_refused_before_anything_changes(
        self, manager: CheckpointManager, saved: Path, roles: Callable[[], RoleManager], message: str
    ) -> None:
        target = roles()
        before = {handle.name: deepcopy(handle.transformer.state_dict()) for handle in target}
        with pytest.raises(ValueError, match=message):
            manager.load(saved, target)
        assert_identical({handle.name: handle.transformer.state_dict() for handle in target}, before)


def test_contents_are_named_as_documented(saved: Path) -> None:
    names = storage.read_metadata(saved).state_dict_metadata.keys()
    assert {
        "models/student/transformer.0.weight",
        "models/critic/transformer.1.running_mean",
        "optimizers/student/transformer.state.transformer.0.weight.exp_avg",
        "schedulers/critic/transformer.last_epoch",
        "ema/student.0.weight",
        "random/torch",
        "train_state.step",
        "train_state.num_updates.critic",
    } <= names
    assert not any("teacher" in name for name in names)

    manifest = json.loads((saved / MANIFEST_NAME).read_text())
    assert manifest["frozen"] == {"teacher": {"path": "weights/teacher", "digest": "t"}}
    assert (manifest["step"], manifest["samples_seen"], manifest["config_digest"]) == (3, 12, "d")
    assert manifest["trained"]["critic"]["num_updates"] == 3
    on_disk = {path.name: path.stat().st_size for path in saved.iterdir() if path.name != MANIFEST_NAME}
    assert {name: record["num_bytes"] for name, record in manifest["files"].items()} == on_disk


class TestPublish:
    def test_keeps_the_newest_steps(self, manager: CheckpointManager) -> None:
        roles = make_roles(seed=0)
        for step in (1, 2, 3, 4):
            manager.save(roles, TrainState(step=step))
        assert sorted(os.listdir(manager.folder)) == ["step-00000003", "step-00000004"]

    def test_incomplete_steps_do_not_count(self, manager: CheckpointManager) -> None:
        roles = make_roles(seed=0)
        for step in (1, 2):
            manager.save(roles, TrainState(step=step))
        (manager.folder / "step-00000002" / MANIFEST_NAME).unlink()
        manager.save(roles, TrainState(step=3))
        assert [path.name for path in complete_steps(manager.folder)] == ["step-00000003", "step-00000001"]

    def test_rewound_run_keeps_what_it_saves(self, manager: CheckpointManager) -> None:
        roles = make_roles(seed=0)
        for step in (10, 20, 5):
            manager.save(roles, TrainState(step=step))
        assert sorted(os.listdir(manager.folder)) == ["step-00000005", "step-00000020"]

    def test_same_step_can_be_saved_again(self, manager: CheckpointManager, saved: Path) -> None:
        roles, resumed = make_roles(seed=50), make_roles(seed=0)
        assert manager.save(roles, TrainState(step=3)) == saved
        manager.load(saved, resumed)
        assert_identical(snapshot(resumed), snapshot(roles))
        assert os.listdir(manager.folder) == [saved.name]

    def test_leftovers_of_a_dead_save_are_ignored_and_then_removed(
        self, manager: CheckpointManager, saved: Path
    ) -> None:
        leftover = saved.rename(saved.with_name("step-00000009.tmp-dead"))
        assert find_latest(manager.folder) is None
        manager.save(make_roles(seed=0), TrainState(step=4))
        assert not leftover.exists()

    def test_failed_write_leaves_the_former_step_and_nothing_else(
        self, manager: CheckpointManager, saved: Path
    ) -> None:
        roles = make_roles(seed=0)
        with largest_file(num_bytes=4096), pytest.raises(RuntimeError, match=r"writing .*rank 0.*File too large"):
            manager.save(roles, TrainState(step=4))
        assert os.listdir(manager.folder) == [saved.name]
        manager.load(saved, roles)
        manager.save(roles, TrainState(step=4))
        assert find_latest(manager.folder) == saved.with_name("step-00000004")

    def test_failed_write_keeps_no_view_of_what_it_was_writing(self, manager: CheckpointManager, saved: Path) -> None:
        """Such a view, as garbage in the cycle that a traceback is, crashes Python 3.12.0 and 3.12.1."""

        def num_views() -> int:
            return sum(type(each) is memoryview for each in gc.get_objects())

        before = num_views()
        with largest_file(num_bytes=4096), pytest.raises(RuntimeError) as failure:
            manager.save(make_roles(seed=0), TrainState(step=4))
        assert failure.value.__cause__ is not None and num_views() == before

    def test_write_that_lies_about_success_is_found_out(
        self, manager: CheckpointManager, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def write_and_lose(state: dict[str, Any], folder: Path, *others: Any) -> dict[str, FileRecord]:
            written = write(state, folder, *others)
            os.truncate(folder / "__0_0.distcp", 100)
            return written

        write = storage.write
        monkeypatch.setattr(storage, "write", write_and_lose)
        with pytest.raises(CheckpointDamaged, match=r"__0_0.distcp .* has 100 bytes instead of .*is the disk full"):
            manager.save(make_roles(seed=0), TrainState(step=4))
        assert os.listdir(manager.folder) == [saved.name]

    def test_value_that_no_file_holds_is_found_out(self, saved: Path) -> None:
        metadata = storage.read_metadata(saved)
        lost = next(index for index in metadata.storage_data if index.fqn == "ema/student.0.weight")
        del metadata.storage_data[lost]
        with pytest.raises(CheckpointDamaged, match=r"plans 'ema/student.0.weight', but no file"):
            storage.written_files(saved, metadata)


class TestDiscovery:
    def test_latest_skips_incomplete_steps_with_a_warning(
        self, manager: CheckpointManager, saved: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        newer = manager.save(make_roles(seed=0), TrainState(step=4))
        assert resolve(manager.folder / "latest") == newer
        os.truncate(newer / "__0_0.distcp", 100)
        assert resolve(manager.folder / "latest") == find_latest(manager.folder) == saved
        assert "__0_0.distcp is damaged" in caplog.text
        with pytest.raises(CheckpointDamaged, match=r"__0_0.distcp is damaged"):
            find(manager.folder, str(newer))

    def test_only_unusable_checkpoints_is_an_error(self, manager: CheckpointManager, saved: Path) -> None:
        (saved / MANIFEST_NAME).unlink()
        with pytest.raises(ValueError, match="none of the 1 checkpoints"):
            find_latest(manager.folder)

    def test_no_checkpoints_is_not(self, manager: CheckpointManager) -> None:
        assert find_latest(manager.folder) is None
        manager.folder.mkdir()
        assert find_latest(manager.folder) is None

    def test_missing_checkpoint_is_named_with_those_there_are(self, saved: Path) -> None:
        with pytest.raises(ValueError, match=r"step-00000008; .* has step-00000003"):
            resolve(saved.with_name("step-00000008"))
        with pytest.raises(ValueError, match="there is no checkpoint in"):
            resolve(saved.parent.parent / "elsewhere" / "latest")


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_manifest(path: Path) -> None:
    path.write_text(path.read_text().replace('"samples_seen": 12', '"samples_seen": 13'))


class TestDamage:
    @pytest.mark.parametrize("damage", [flip_byte, lambda path: os.truncate(path, 50), Path.unlink])
    @pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", MANIFEST_NAME])
    def test_names_the_file_before_any_tensor_changes(
        self, manager: CheckpointManager, saved: Path, name: str, damage: Callable[[Path], None]
    ) -> None:
        damage(saved / name)
        self.assert_refused(manager, saved, name)

    def test_edited_manifest(self, manager: CheckpointManager, saved: Path) -> None:
        edit_manifest(saved / MANIFEST_NAME)
        self.assert_refused(manager, saved, MANIFEST_NAME)

    def assert_refused(self, manager: CheckpointManager, path: Path, name: str) -> None:
        roles = make_roles(seed=5)
        before = snapshot(roles)
        with pytest.raises(CheckpointDamaged, match=name):
            manager.load(path, roles)
        assert_identical(snapshot(roles), before)

    def test_newer_format_is_refused(self, manager: CheckpointManager, saved: Path) -> None:
        path = saved / MANIFEST_NAME
        newer = f'"format_version": {FORMAT_VERSION + 1}'
        path.write_text(path.read_text().replace(f'"format_version": {FORMAT_VERSION}', newer))
        with pytest.raises(ValueError, match=rf"format_version {FORMAT_VERSION + 1}, but .* reads up to") as error:
            find_latest(manager.folder)
        assert not isinstance(error.value, CheckpointDamaged)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.evidence),)


class TestTrust:
    def test_index_that_would_run_code_is_refused(
        self, manager: CheckpointManager, saved: Path, tmp_path: Path
    ) -> None:
        (saved / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "evidence")))
        sign(saved)
        with pytest.raises(CheckpointDamaged, match=r"\.metadata refers to posix\.mkdir"):
            manager.load(saved, make_roles(seed=0))
        assert not (tmp_path / "evidence").exists()

    def test_value_that_would_run_code_is_refused(self, tmp_path: Path) -> None:
        folder = tmp_path / "checkpoint"
        storage.write({"train_state": {"step": Malicious(tmp_path / "evidence")}}, folder, None)
        with pytest.raises(RuntimeError, match="mkdir"):
            storage.read({"train_state": {"step": 0}}, folder, storage.read_metadata(folder))
        assert not (tmp_path / "evidence").exists()

    def test_index_that_points_outside_its_folder_is_refused(self, saved: Path) -> None:
        metadata = storage.read_metadata(saved)
        next(iter(metadata.storage_data.values())).relative_path = "../secret"
        with pytest.raises(CheckpointDamaged, match=r"'../secret', which is outside"):
            storage.written_files(saved, metadata)


def test_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(3 << 20))
    original = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == original
    for position in (0, (3 << 20) - 1):
        content = bytearray(3 << 20)
        content[position] = 1
        (tmp_path / "weights").write_bytes(content)
        assert fingerprint(tmp_path) != original


def without_field(folder: Path) -> None:
    """Makes the manifest one from before `noise_version`."""
    content = json.loads((folder / MANIFEST_NAME).read_text())
    del content["noise_version"], content["digest"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST_NAME).write_text(json.dumps({**content, "digest": digest}))


def sign(folder: Path) -> None:
    """Makes the manifest agree with the files again, as an attacker would."""
    manifest = read_manifest(folder)
    manifest.files.update({name: record_file(folder / name) for name in manifest.files})
    write_manifest(folder, manifest)


@contextmanager
def largest_file(num_bytes: int) -> Any:
    """Writing beyond this fails with a real OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Interrupted:
    """Somebody presses Ctrl-C just when this is written."""

    def __reduce__(self) -> str:
        raise KeyboardInterrupt


def test_interrupt_in_a_save_stays_an_interrupt(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        storage.write({"value": Interrupted()}, tmp_path / "step", None)
