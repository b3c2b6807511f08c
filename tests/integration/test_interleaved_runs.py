"""Random interleavings of starts, resumes, kills and saves in one folder: no run touches another run's checkpoints.

A history is a list of actions on one folder. It goes through `train.start`, as a command line does, in this process, or
in processes of its own. After each action the checkpoints on disk are compared with those that each run has saved.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import toy_family
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from runs import HELPERS, REPOSITORY

from titan_distill import train
from titan_distill.checkpoint.discovery import complete_steps, step_folders, step_name
from titan_distill.checkpoint.manifest import MANIFEST_NAME, read_manifest, verify_hashes
from titan_distill.fault_tolerance.ranks import RankFailure
from titan_distill.fault_tolerance.run_folder import read_run
from titan_distill.fault_tolerance.run_lock import NAME as LOCK
from titan_distill.fault_tolerance.signals import Stop
from titan_distill.trainer import Trainer

JOB = REPOSITORY / "tests" / "assets" / "toy_finetune.toml"
KEEP = 2
ACTIONS = (
    *("start", "overwrite", "resume", "resume a step", "other seed", "child", "save", "prune", "end"),
    *("kill", "kill in a save", "sleep", "wake", "mix"),
)


def arguments(folder: Path, data: Path, *options: str) -> list[str]:
    return [
        "--job.config_file", str(JOB), "--job.output_dir", str(folder), "--data.path", str(data),
        "--training.steps", "1000000", "--checkpoint.enabled", "true", "--checkpoint.interval", "1",
        "--checkpoint.keep", str(KEEP), *options,
    ]  # fmt: skip


def checkpoints_below(path: Path) -> dict[tuple[str, int], bytes]:
    """The manifest of each published checkpoint below a folder, by run and step; manifests have all files' hashes."""
    found = {}
    for manifest in path.rglob(f"step-*/{MANIFEST_NAME}"):
        if ".tmp-" not in manifest.parent.name:
            read = read_manifest(manifest.parent)
            found[read.run, read.step] = manifest.read_bytes()
    return found


class Started:
    """A run in this process, with its lock."""

    def __init__(self, argv: list[str]) -> None:
        self.held, self.is_asleep = ExitStack(), False
        try:
            trainer = train.start(argv, Stop(), self.held)
        except BaseException:
            self.held.close()
            raise
        assert trainer is not None and trainer.checkpoints is not None
        self.trainer: Trainer = trainer
        self.id = trainer.checkpoints.run_info.run
        lock = json.loads((trainer.config.job.output_folder / LOCK).read_text())
        self.token, self.started = lock["token"], lock["started"]

    def weights(self) -> bytes:
        network = self.trainer.roles["student"].network
        return b"".join(p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in network.parameters())

    def close(self) -> None:
        self.trainer.metrics.close()
        self.held.close()


class Folder:
    """One output folder, what the runs in it have saved, and the one that lives."""

    def __init__(self, root: Path, data: Path, other: Path, draw: random.Random) -> None:
        self.root, self.folder, self.data, self.other, self.draw = root, root / "run", data, other, draw
        self.live: Started | None = None
        self.asleep: list[Started] = []
        self.weights: dict[tuple[str, int], bytes] = {}
        self.refusals = 0

    def do(self, action: str) -> None:
        before = checkpoints_below(self.root)
        actor = getattr(self, action.replace(" ", "_"))()
        after = checkpoints_below(self.root)
        assert {key: value for key, value in before.items() if key[0] != actor}.items() <= after.items(), action
        owner = read_run(self.folder)
        if owner is not None:
            own = [path for path in step_folders(self.folder / "checkpoints") if read_manifest(path).run == owner.id]
            assert list(complete_steps(self.folder / "checkpoints")) == own
            for path in own:
                verify_hashes(path, read_manifest(path))

    def _open(self, *options: str) -> str | None:
        """A start; returns the run's id. A start that the history forbids is one sentence."""
        owner, has_checkpoints = read_run(self.folder), bool(step_folders(self.folder / "checkpoints"))
        is_resume = "--checkpoint.resume_from" in options
        is_forbidden = self.live is not None or (has_checkpoints and not is_resume and "--job.overwrite" not in options)
        try:
            started = Started(arguments(self.folder, self.data, *options))
        except ValueError as error:
            self.refusals += 1
            assert "\n" not in str(error) and len(str(error)) > 40
            assert is_forbidden or is_resume, error
            return None
        assert not is_forbidden
        self.live = started
        if is_resume and started.trainer.state.step:
            assert owner is not None and started.id == owner.id
            assert started.weights() == self.weights[started.id, started.trainer.state.step]
        return started.id

    def start(self) -> str | None:
        return self._open()

    def overwrite(self) -> str | None:
        return self._open("--job.overwrite")

    def resume(self) -> str | None:
        own = list(complete_steps(self.folder / "checkpoints"))
        opened = self._open("--checkpoint.resume_from", "latest")
        assert opened is not None or not own or self.live is not None
        if opened is not None and self.live is not None:
            assert self.live.trainer.state.step == (read_manifest(own[0]).step if own else 0)
        return opened

    def resume_a_step(self) -> str | None:
        steps = step_folders(self.folder / "checkpoints")
        return self._open("--checkpoint.resume_from", str(self.draw.choice(steps))) if steps else None

    def other_seed(self) -> None:
        if any(complete_steps(self.folder / "checkpoints")):
            assert self._open("--checkpoint.resume_from", "latest", "--job.seed", "7") is None

    def child(self) -> str | None:
        """A new run that begins at a checkpoint of another folder."""
        is_used = bool(step_folders(self.folder / "checkpoints"))
        before, source = self.live, step_folders(self.other / "checkpoints")[0]
        try:
            started = Started(arguments(self.folder, self.data, "--checkpoint.resume_from", str(source)))
        except ValueError as error:
            assert (is_used or before) and "\n" not in str(error)
            return None
        run, parent = read_run(self.folder), read_run(self.other)
        assert not is_used and before is None and run is not None and parent is not None and run.parent == parent.id
        self.live = started
        return started.id

    def save(self) -> str | None:
        return self._save(self.live) if self.live is not None else None

    def prune(self) -> str | None:
        for _ in range(KEEP + 1):
            self.save()
        return self.live.id if self.live is not None else None

    def _save(self, run: Started) -> str:
        run.trainer.train_step()
        run.trainer.save()
        step = run.trainer.state.step
        self.weights[run.id, step] = run.weights()
        assert (run.id, step) in checkpoints_below(self.folder)
        own = [read_manifest(path).step for path in complete_steps(self.folder / "checkpoints")]
        assert step in own and len(own) <= KEEP + 2  # the step that the run resumed from, and this one, always stay
        return run.id

    def kill(self) -> None:
        """Leaves what SIGKILL leaves: a lock of a process that does not live."""
        if self.live is not None:
            lock = json.loads((self.folder / LOCK).read_text())
            self.live.close()
            (self.folder / LOCK).write_text(json.dumps({**lock, "started": "1"}))
            self.live = None

    def kill_in_a_save(self) -> None:
        if self.live is not None:
            step = self.live.trainer.state.step + 1
            (self.folder / "checkpoints" / f"{step_name(step)}.tmp-dead").mkdir(parents=True, exist_ok=True)
            self.kill()

    def sleep(self) -> None:
        """The run stops where it is (a frozen node), and others take it for dead."""
        if self.live is not None:
            lock = json.loads((self.folder / LOCK).read_text())
            (self.folder / LOCK).write_text(json.dumps({**lock, "started": "1"}))
            self.asleep.append(self.live)
            self.live = None

    def wake(self) -> str | None:
        """A run that slept saves: as if nothing had been where nobody took its folder, else never."""
        if not self.asleep:
            return None
        run = self.asleep.pop()
        if self.token() != run.token:  # somebody took the folder over, or has ended since
            with pytest.raises(RankFailure, match=r"was taken over by .*; nothing more is written here"):
                run.trainer.save()
            run.close()
            return None
        lock = json.loads((self.folder / LOCK).read_text())
        (self.folder / LOCK).write_text(json.dumps(lock | {"started": run.started}))
        self.live = run
        return self._save(run)

    def end(self) -> None:
        if self.live is not None:
            self.live.close()
            assert self.token() == ""
            self.live = None

    def mix(self) -> None:
        """Puts a checkpoint of another run here, as older versions did: its step is the next, or a later one."""
        newest = max((read_manifest(path).step for path in step_folders(self.folder / "checkpoints")), default=0)
        source = self.other / "checkpoints" / step_name(newest + self.draw.choice([1, 3]))
        if source.exists():
            shutil.copytree(source, self.folder / "checkpoints" / source.name)

    def token(self) -> str:
        path = self.folder / LOCK
        return str(json.loads(path.read_text())["token"]) if path.exists() else ""

    def close(self) -> None:
        for run in [*self.asleep, *([self.live] if self.live is not None else [])]:
            run.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_family.write_data(tmp_path_factory.mktemp("data") / "toy.parquet")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The folder of another run, with twenty checkpoints."""
    folder = tmp_path_factory.mktemp("other") / "run"
    started = Started(arguments(folder, data, "--checkpoint.keep", "100"))
    for _ in range(20):
        started.trainer.train_step()
        started.trainer.save()
    started.close()
    return folder


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(history=st.lists(st.sampled_from(ACTIONS), min_size=6, max_size=12), seed=st.integers(0, 99))
def test_sixty_histories(data: Path, other: Path, history: list[str], seed: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Folder(Path(root), data, other, random.Random(seed))
        try:
            for action in history:
                folder.do(action)
        finally:
            folder.close()


COMMANDS = {
    "start": (),
    "overwrite": ("--job.overwrite",),
    "resume": ("--checkpoint.resume_from", "latest"),
    "resume with another seed": ("--checkpoint.resume_from", "latest", "--job.seed", "7"),
}


def process(folder: Path, data: Path, command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "titan_distill.train", *arguments(folder, data, *COMMANDS[command])],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def first_save(run: subprocess.Popen[str], folder: Path) -> int:
    """Waits until a run has saved its first step, and returns that step; 0 where the run has ended before."""
    assert run.stdout is not None
    for line in run.stdout:
        if found := re.match(r"step (\d+)/", line):
            step, deadline = int(found[1]), time.monotonic() + 60
            while not (newest := step_folders(folder / "checkpoints")) or newest[0].name < step_name(step):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            return step
    return 0


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(6))
def test_a_history_of_processes(tmp_path: Path, data: Path, seed: int) -> None:
    """Ten command lines, two of them at once now and then, each ended by SIGKILL or SIGTERM at any moment."""
    draw, folder = random.Random(seed), tmp_path / "run"
    for command in ["start", *draw.choices(list(COMMANDS), [1, 2, 6, 1], k=9)]:
        before, owner = checkpoints_below(tmp_path), read_run(folder)
        run = process(folder, data, command)
        first = first_save(run, folder)
        if first and draw.random() < 0.4:
            other = draw.choice(["start", "overwrite", "resume"])
            _, errors = (second := process(folder, data, other)).communicate(timeout=120)
            assert second.returncode == 2 and errors.count("\n") == 1 and "is in use by process" in errors, errors
        time.sleep(draw.random() / 2)
        run.send_signal(end := draw.choice([signal.SIGKILL, signal.SIGTERM]))
        _, errors = run.communicate(timeout=120)
        after, now = checkpoints_below(tmp_path), read_run(folder)
        assert now is not None
        if before and command in ("start", "resume with another seed"):
            assert run.returncode == 2 and errors.count("\n") == 1 and not first, errors
            assert (after, now) == (before, owner)
            continue
        assert run.returncode == (-signal.SIGKILL if end == signal.SIGKILL else 75), errors
        assert (now == owner) == (command == "resume")
        newest = max((step for run_id, step in before if run_id == now.id), default=0)
        assert first == newest + 1
        others = {key: value for key, value in before.items() if key[0] != now.id}
        assert others.items() <= after.items()
        own = [path for path in step_folders(folder / "checkpoints") if read_manifest(path).run == now.id]
        assert list(complete_steps(folder / "checkpoints")) == own == step_folders(folder / "checkpoints")
        for path in own:
            verify_hashes(path, read_manifest(path))
