"""`titan-distill checkpoint`: real checkpoints of small roles, through the command line where that is what counts."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_memory_worker import NUM_TENSORS, TENSOR_BYTES
from runs import HELPERS
from small_checkpoints import assert_identical, call, make_manager, make_role, make_roles, train
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from titan_distill.checkpoint import storage
from titan_distill.checkpoint.discovery import find_latest
from titan_distill.checkpoint.initial_weights import read_weights, resolve_reference
from titan_distill.checkpoint.manager import CheckpointManager, RunInfo
from titan_distill.checkpoint.manifest import CheckpointDamaged, read_manifest, write_manifest
from titan_distill.checkpoint.state import TrainState
from titan_distill.checkpoint.tools import rewrite
from titan_distill.checkpoint.tools.contents import open_checkpoint
from titan_distill.checkpoint.tools.diff import compare_tensors
from titan_distill.checkpoint.tools.inspect import verify
from titan_distill.fault_tolerance.files import record_file
from titan_distill.roles import RoleHandle, RoleManager


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 3 and 4; the critic has trained only in the second."""
    folder = tmp_path_factory.mktemp("outputs") / "my_run"
    roles, manager = make_roles(seed=0), make_manager(folder / "checkpoints")
    train(roles["student"])
    manager.save(roles, TrainState(step=3, samples_seen=12, seed=7))
    train(roles["critic"])
    manager.save(roles, TrainState(step=4, samples_seen=16, seed=7))
    (folder / "config.toml").write_text('[job]\nname = "my_run"\n')
    return folder


@pytest.fixture(scope="module")
def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step-00000004"


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoints" / checkpoint.name))


def contents(path: Path) -> dict[str, Any]:
    opened = open_checkpoint(path)
    return {name: opened.read(name) for name in opened.names}


def sign(folder: Path) -> None:
    """Makes the manifest agree with the files again, as an attacker would."""
    manifest = read_manifest(folder)
    manifest.files.update({name: record_file(folder / name) for name in manifest.files})
    write_manifest(folder, manifest)


class TestList:
    def test_shows_newest_first_and_says_what_is_wrong_and_what_is_left_over(
        self, checkpoint: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        copy = Path(shutil.copytree(run, tmp_path / "run")) / "checkpoints"
        os.truncate(copy / "step-00000003" / "__0_0.distcp", 100)
        (copy / "step-00000009.tmp-dead").mkdir()
        (copy / "step-00000009.tmp-dead" / "__0_0.distcp").write_bytes(bytes(2048))
        (copy / checkpoint.name / "pin").touch()
        os.utime(copy / checkpoint.name, (0, 0))
        assert call("list", tmp_path / "run") == 0
        _, newest, damaged, leftover = capsys.readouterr().out.splitlines()
        assert newest.startswith("step-00000004") and newest.endswith("complete, pinned")
        layout = "1 rank: student unsharded; critic unsharded"
        for cell in (" d  ", " MiB  ", "  16  ", "student + EMA, critic", layout):
            assert cell in newest
        assert damaged.startswith("step-00000003") and "__0_0.distcp is damaged: it has 100 bytes" in damaged
        assert leftover.startswith("step-00000009.tmp-dead") and "2.0 KiB" in leftover and "temporary" in leftover

        assert call("list", copy) == 0
        assert capsys.readouterr().out.splitlines()[1] == newest

    def test_nothing_yet(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("list", tmp_path) == 0
        assert capsys.readouterr().out == f"no checkpoints in {tmp_path}\n"


def damage_once(path: Path, draw: random.Random) -> Path:
    """Flips one bit of, or cuts short, a random file of a checkpoint; returns which."""
    files = sorted(path.iterdir())
    # Small files would hardly ever be hit if every byte were as likely as any other.
    damaged = draw.choice(files)
    num_bytes = damaged.stat().st_size
    position = draw.randrange(num_bytes)
    if draw.random() < 0.5:
        os.truncate(damaged, position)
    else:
        with damaged.open("r+b") as file:
            file.seek(position)
            (byte,) = file.read(1)
            file.seek(position)
            file.write(bytes([byte ^ (1 << draw.randrange(8))]))
    return damaged


class TestVerify:
    def test_whole(self, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for named in (checkpoint, checkpoint.with_name("latest"), checkpoint.parent.parent):
            assert call("verify", named) == 0
            assert f"{checkpoint} is complete: 2 files" in capsys.readouterr().out

    @pytest.mark.parametrize("num_trials", [30, pytest.param(300, marks=pytest.mark.nightly)])
    def test_random_damage_is_found_before_a_tensor_changes(
        self, checkpoint: Path, tmp_path: Path, num_trials: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        many_files = rewrite.reshard(checkpoint, tmp_path / "many" / checkpoint.name, num_files=3)
        roles, manager = make_roles(seed=50), make_manager(tmp_path / "checkpoints")
        weights = {handle.name: handle.transformer.state_dict() for handle in roles}
        before = {name: {key: value.clone() for key, value in each.items()} for name, each in weights.items()}
        draw = random.Random(0)
        for trial in range(num_trials):
            path = Path(shutil.copytree(many_files, tmp_path / "checkpoints" / checkpoint.name))
            damaged = damage_once(path, draw)
            assert call("verify", path) == 2, (trial, damaged)
            assert str(damaged) in capsys.readouterr().err, (trial, damaged)
            with pytest.raises(CheckpointDamaged, match=damaged.name):
                manager.load(path, roles)
            shutil.rmtree(path)
        for name, each in weights.items():
            assert_identical(each, before[name])
            assert not roles[name].optimizers["transformer"].state

    def test_missing_file(self, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (copied / "__0_0.distcp").unlink()
        assert call("verify", copied) == 2
        assert f"{copied / '__0_0.distcp'} is missing" in capsys.readouterr().err


class Malicious:
    """Creates a folder when it is unpickled."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.evidence),)


def replace_value(path: Path, name: str, payload: bytes) -> None:
    """Puts a payload where a value's bytes are, as somebody would who also mends index and manifest."""
    metadata = storage.read_metadata(path)
    ((index, info),) = [(at, info) for at, info in metadata.storage_data.items() if at.fqn == name]
    data = path / info.relative_path
    metadata.storage_data[index] = type(info)(info.relative_path, data.stat().st_size, len(payload))
    data.write_bytes(data.read_bytes() + payload)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(path)


class TestTrust:
    """A checkpoint from elsewhere, its manifest in order."""

    @pytest.fixture
    def requests(self, copied: Path, tmp_path: Path) -> list[tuple[Any, ...]]:
        return [
            ("verify", copied),
            ("export", "--checkpoint", copied, "--out", tmp_path / "exported"),
            ("reshard", copied, "--out", tmp_path / "resharded", "--num-files", 1),
            ("diff", copied, copied),
        ]

    def test_code_in_the_index_is_refused(
        self, copied: Path, tmp_path: Path, requests: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        (copied / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "evidence")))
        sign(copied)
        for request in requests:
            assert call(*request) == 2
            assert ".metadata refers to posix.mkdir" in capsys.readouterr().err
        assert os.listdir(tmp_path) == ["checkpoints"]

    @pytest.mark.parametrize("name", ["schedulers/student/transformer.last_epoch", "ema/student.proj_out.bias"])
    def test_code_in_a_value_is_refused(
        self,
        copied: Path,
        tmp_path: Path,
        requests: list[tuple[Any, ...]],
        capsys: pytest.CaptureFixture[str],
        name: str,
    ) -> None:
        payload = tmp_path / "payload"
        torch.save(Malicious(tmp_path / "evidence"), payload)
        replace_value(copied, name, payload.read_bytes())
        payload.unlink()
        for request in requests:
            reads_it = name.startswith("ema") or request[0] != "export"
            assert (call(*request) == 2) == reads_it, request
            if reads_it:
                assert f"__0_0.distcp can't be trusted: {name}" in capsys.readouterr().err
        assert not (tmp_path / "evidence").exists()

    def test_index_that_names_files_outside_is_refused(
        self, copied: Path, tmp_path: Path, requests: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        metadata = storage.read_metadata(copied)
        shutil.copy(copied / "__0_0.distcp", copied.parent / "x")
        for info in metadata.storage_data.values():
            info.relative_path = "../x"
        (copied / ".metadata").write_bytes(pickle.dumps(metadata))
        sign(copied)
        for request in requests:
            assert call(*request) == 2
            assert "names '../x', which is outside the folder" in capsys.readouterr().err
        with pytest.raises(CheckpointDamaged, match=r"'\.\./x', which is outside"):
            make_manager(copied.parent).load(copied, make_roles(seed=0))

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda info: setattr(info, "length", 1 << 40), "has .* bytes on disk instead of"),
            (lambda info: setattr(info, "offset", -1), "bytes at -1 of a file"),
            (lambda info: setattr(info, "length", 8), "do not make a tensor"),
            (lambda info: setattr(info, "relative_path", "unknown"), "unknown has 0 bytes on disk"),
        ],
    )
    def test_range_that_does_not_hold_the_value_is_refused(
        self, copied: Path, edit: Callable[[Any], None], message: str
    ) -> None:
        metadata = storage.read_metadata(copied)
        edit(next(info for at, info in metadata.storage_data.items() if at.fqn == "ema/student.proj_out.weight"))
        (copied / ".metadata").write_bytes(pickle.dumps(metadata))
        sign(copied)
        with pytest.raises(CheckpointDamaged, match=message):
            verify(copied)

    def test_parts_that_do_not_make_the_whole_are_refused(self, copied: Path) -> None:
        metadata = storage.read_metadata(copied)
        entry = metadata.state_dict_metadata["ema/student.proj_out.weight"]
        assert isinstance(entry, TensorStorageMetadata)
        entry.size = torch.Size([1 << 40, *entry.size[1:]])
        (copied / ".metadata").write_bytes(pickle.dumps(metadata))
        sign(copied)
        with pytest.raises(CheckpointDamaged, match=r"\.metadata is damaged: its parts of ema/student"):
            verify(copied)


class TestReshard:
    def test_loads_exactly_like_its_source(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rewrite, "PIECE_BYTES", 1000)  # so that there are tensors of several pieces
        out = tmp_path / "checkpoints" / "step-00000004"
        assert call("reshard", checkpoint, "--out", out, "--num-files", 5) == 0
        assert len(list(out.glob("*.distcp"))) == 5 and os.listdir(out.parent) == [out.name]
        sizes = [path.stat().st_size for path in out.glob("*.distcp")]
        assert max(sizes) < 1.5 * min(sizes)
        assert storage.read_metadata(out).planner_data == storage.read_metadata(checkpoint).planner_data
        entries = storage.read_metadata(out).state_dict_metadata.values()
        assert any(len(entry.chunks) > 1 for entry in entries if isinstance(entry, TensorStorageMetadata))
        assert_identical(contents(out), contents(checkpoint))

        roles, expected = make_roles(seed=8), make_roles(seed=9)
        manager = make_manager(out.parent)
        assert manager.load(find_latest(manager.folder), roles) == manager.load(checkpoint, expected)
        for name in ("student", "critic"):
            for each in (roles, expected):
                train(each[name])
            assert_identical(roles[name].transformer.state_dict(), expected[name].transformer.state_dict())
            assert_identical(*(each[name].schedulers["transformer"].state_dict() for each in (roles, expected)))

    def test_failure_leaves_nothing(self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            code = call("reshard", checkpoint, "--out", tmp_path / "out", "--num-files", 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert code == 2 and os.listdir(tmp_path) == []
        assert "could not be written" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone measures peaks from now on")
def test_memory_is_bounded_by_a_tensor_and_not_by_the_model(tmp_path: Path) -> None:
    worker = HELPERS / "checkpoint_memory_worker.py"
    process = subprocess.run([sys.executable, worker, tmp_path], capture_output=True, text=True, check=True)
    peaks = json.loads(process.stdout.splitlines()[-1])
    # One tensor, and in `diff` two, are 8 and 16 MiB of 192; what else there is depends on the kernel's page cache.
    assert len(peaks) == 3 and all(peak < NUM_TENSORS * TENSOR_BYTES / 2 for peak in peaks.values()), peaks
    rewritten = tmp_path / "rewritten"
    stored = storage.read_metadata(rewritten).storage_data.values()
    assert max(info.length for info in stored) < rewrite.PIECE_BYTES + 4096
    opened = open_checkpoint(rewritten)
    for i in range(NUM_TENSORS):
        assert bool((opened.read(f"models/r/transformer.layer{i}") == i).all())


class TestDiff:
    def test_equal(self, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("diff", checkpoint, checkpoint) == 0
        assert capsys.readouterr().out == "no difference\n"

    def test_two_steps(self, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Between them the critic took its first step, and so got optimizer state."""
        earlier = checkpoint.with_name("step-00000003")
        assert call("diff", earlier, checkpoint) == 1
        lines = capsys.readouterr().out.splitlines()
        assert "train_state.step: 3 against 4" in lines
        assert "train_state.num_updates.critic: 0 against 1" in lines
        moment = "optimizers/critic/transformer.state.transformer.proj_out.bias.exp_avg"
        assert f"{moment}: only in {checkpoint}" in lines
        (weight,) = [line for line in lines if line.startswith("models/critic/transformer.proj_out.bias")]
        # Adam's first step is the learning rate, whatever the gradient.
        assert "max |a - b| 0.01, " in weight and weight.endswith("0 of 16 equal")
        assert not any(line.startswith(("models/student", "ema/student")) for line in lines)
        assert lines[-1] == f"{len(lines) - 1} values differ"

    def test_shape_dtype_and_setting(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        manager = CheckpointManager(tmp_path, keep=2, run_info=RunInfo("toy", "d"))
        for step, (width, dtype, decay) in enumerate([(4, torch.float32, 0.0), (5, torch.bfloat16, 0.1)]):
            module = nn.Module()
            module.grows = nn.Parameter(torch.zeros(width))
            module.rounds = nn.Parameter(torch.full((3,), 1.01).to(dtype))
            module.fits = nn.Parameter(torch.ones(3, dtype=dtype))
            role = RoleHandle("r", {"transformer": module}, trainable=True)
            role.optimizers["o"] = torch.optim.AdamW(module.parameters(), lr=0, weight_decay=decay)
            train(role)
            manager.save(RoleManager([role]), TrainState(step=step))
        assert call("diff", tmp_path / "step-00000000", tmp_path / "step-00000001") == 1
        lines = capsys.readouterr().out.splitlines()
        assert "models/r/transformer.fits: float32 [3] against bfloat16 [3]" in lines
        assert "models/r/transformer.grows: float32 [4] against float32 [5]" in lines
        (rounds,) = [line for line in lines if line.startswith("models/r/transformer.rounds")]
        assert "float32 [3] against bfloat16 [3]; max |a - b|" in rounds and rounds.endswith("0 of 3 equal")
        assert "optimizers/r/o.param_groups.0.weight_decay: 0.0 against 0.1" in lines

    def test_numbers_are_right_for_every_kind_of_element(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("titan_distill.checkpoint.tools.diff._SLICE_ELEMENTS", 2)
        nan, inf = float("nan"), float("inf")
        found = compare_tensors(torch.tensor([1.0, -2.0, 0.0, nan, inf]), torch.tensor([1.0, -3.0, 0.0, nan, inf]))
        assert (found.num_elements, found.num_equal, found.max_absolute) == (5, 4, 1.0)
        assert found.max_relative == pytest.approx(1 / 3)
        assert compare_tensors(torch.tensor([nan]), torch.tensor([1.0])).max_absolute == inf
        assert compare_tensors(torch.tensor([2**60]), torch.tensor([2**60 + 1])).num_equal == 0
        assert compare_tensors(torch.tensor(True), torch.tensor(False)).max_absolute == 1.0
        assert compare_tensors(torch.empty(0), torch.empty(0)).num_equal == 0


class TestWrongRequests:
    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            (("list", "{run}/nowhere"), "there is no folder"),
            (("list", "{step}"), "is a checkpoint itself"),
            (("verify", "{run}/checkpoints/step-00000009"), "has step-00000004, step-00000003"),
            (("verify", "{run}/checkpoints"), "manifest.json is missing"),
            (("reshard", "{step}", "--out", "{new}", "--num-files", "0"), "num_files is 0"),
            (("reshard", "{step}", "--out", "{new}", "--num-files", "100000"), "ask for 1 to"),
            (("reshard", "{step}", "--out", "{run}", "--num-files", "1"), "exists already"),
            (("diff", "{step}", "{run}/checkpoints/step-00000009"), "there is no checkpoint"),
            (("import", "{run}"), "config.json does not exist"),
            (("import", "{run}", "--family", "wam"), "did you mean 'wan'?"),
            (("export", "--checkpoint", "{step}", "--out", "{new}", "--role", "x"), "has no role 'x'"),
        ],
    )
    def test_is_one_sentence(
        self,
        run: Path,
        checkpoint: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        request_: tuple[str, ...],
        message: str,
    ) -> None:
        filled = [part.format(run=run, step=checkpoint, new=tmp_path / "new") for part in request_]
        assert call(*filled) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and error.startswith("error: ")
        assert os.listdir(tmp_path) == []


class TestInitialWeights:
    @pytest.mark.parametrize("weights", ["raw", "ema"])
    def test_fills_the_module(self, checkpoint: Path, weights: str) -> None:
        module, prefix = (
            make_role("", 70, ema=False).transformer,
            {"raw": "models/student/transformer.", "ema": "ema/student."},
        )
        read_weights(f"{checkpoint.with_name('latest')}#student:{weights}", module)
        opened = open_checkpoint(checkpoint)
        expected = {name: opened.read(prefix[weights] + name) for name in module.state_dict()}
        assert_identical(module.state_dict(), expected)

    @pytest.mark.parametrize(
        ("suffix", "message"),
        [
            ("", "names no weights of a checkpoint"),
            ("#", "names no weights of a checkpoint"),
            ("#student:average", "names no weights of a checkpoint"),
            ("#student", "has two sets of weights of 'student'; write #student:ema or #student:raw"),
            ("#critic:ema", "has no EMA of 'critic'"),
            ("#teacher:raw", "role 'teacher' is frozen"),
            ("#nobody", "has no role 'nobody'"),
        ],
    )
    def test_wrong_reference_is_one_sentence(self, checkpoint: Path, suffix: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            resolve_reference(f"{checkpoint}{suffix}")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda model: model.register_parameter("more", nn.Parameter(torch.zeros(1))),
                r"lacks 1 of the \d+ tensors of its network: more",
            ),
            (lambda model: delattr(model.proj_out, "bias"), "has 1 that the network does not have: proj_out.bias"),
            (
                lambda model: setattr(model.proj_out, "bias", nn.Parameter(torch.zeros(9))),
                r"of another shape: proj_out.bias \(\[16\] instead of \[9\]\)",
            ),
        ],
    )
    def test_another_network_is_refused_before_anything_changes(
        self, checkpoint: Path, change: Callable[[nn.Module], None], message: str
    ) -> None:
        module = make_role("", 72, ema=False).transformer
        change(module)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            read_weights(f"{checkpoint}#critic:raw", module)
        assert_identical(module.state_dict(), before)

    def test_damage_is_named_before_anything_changes(self, copied: Path) -> None:
        module = make_role("", 73, ema=False).transformer
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        data = copied / "__0_0.distcp"
        data.write_bytes(data.read_bytes()[:-1] + b"x")
        with pytest.raises(CheckpointDamaged, match=r"__0_0\.distcp is damaged"):
            read_weights(f"{copied}#critic", module)
        assert_identical(module.state_dict(), before)
