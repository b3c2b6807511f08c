"""Runs own their folders: what `titan_distill.train` does in a used folder, twice at once, and with a bad folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from titan_distill import cli, train
from titan_distill.checkpoint.manifest import read_manifest
from titan_distill.fault_tolerance.run_folder import read_run

JOB = "tests/assets/version_0_1/job.toml"


def start(folder: Path, *options: str) -> int:
    return train.main(["--job.config_file", JOB, "--job.output_dir", str(folder), "--training.steps", "1", *options])


def test_a_fresh_start_in_a_used_folder_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert start(folder) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    for options in ((), ("--check",), ("--training.steps", "2")):
        assert start(folder, *options) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "has checkpoints of another start" in message
        assert "--checkpoint.resume_from latest" in message and "--job.name" in message and "--job.overwrite" in message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_identity_of_starts_resumes_and_children(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert start(first) == 0
    run = read_run(first)
    assert run is not None and run.parent == "" and "--training.steps" in run.command
    assert read_manifest(first / "checkpoints/step-00000001").run == run.id
    assert start(first, "--training.steps", "2", "--checkpoint.resume_from", "latest") == 0
    assert read_run(first) == run and read_manifest(first / "checkpoints/step-00000002").run == run.id
    resumed = ("--training.steps", "3", "--checkpoint.resume_from", str(first / "checkpoints/step-00000002"))
    assert start(second, *resumed) == 0
    child = read_run(second)
    assert child is not None and (child.parent, child.parent_step) == (run.id, 2) and child.id != run.id
    assert read_manifest(second / "checkpoints/step-00000003").run == child.id


def test_copied_checkpoints_resume_as_the_run_that_saved_them(tmp_path: Path) -> None:
    """Only `checkpoints/` was copied to another cluster."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert start(first) == 0
    shutil.copytree(first / "checkpoints", second / "checkpoints")
    assert start(second, "--training.steps", "2", "--checkpoint.resume_from", "latest") == 0
    run, copied = read_run(first), read_run(second)
    assert run is not None and copied is not None and copied.id == run.id
    assert read_manifest(second / "checkpoints/step-00000002").run == run.id


def test_overwrite_keeps_the_old_run_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert start(folder) == 0
    old = read_run(folder)
    assert start(folder, "--job.overwrite") == 0
    (moved,) = tmp_path.glob("run.old-*")
    assert read_run(moved) == old and read_run(folder) != old
    assert (moved / "checkpoints/step-00000001").is_dir() and (moved / "metrics.jsonl").is_file()
    assert "overwrite =" not in (folder / "config.toml").read_text()
    assert not list(tmp_path.rglob("run.lock*"))


def test_checkpoints_of_another_run_are_never_looked_at(tmp_path: Path) -> None:
    """A folder that an older version has mixed: higher steps of another run neither resume nor push ours out."""
    other, folder = tmp_path / "other", tmp_path / "run"
    assert start(other, "--training.steps", "3") == 0
    assert start(folder) == 0
    foreign = folder / "checkpoints/step-00000003"
    (other / "checkpoints/step-00000003").rename(foreign)
    assert start(folder, "--training.steps", "2", "--checkpoint.resume_from", "latest", "--checkpoint.keep", "1") == 0
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    assert sorted(path.name for path in foreign.parent.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.fixture
def running(tmp_path: Path) -> subprocess.Popen[str]:
    """A run in `tmp_path / "run"`, stopped (SIGSTOP) after its first step."""
    folder = tmp_path / "run"
    options = ["--job.config_file", JOB, "--job.output_dir", str(folder), "--training.steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "titan_distill.train", *options], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    process.send_signal(signal.SIGSTOP)
    yield process
    process.kill()
    process.wait()


def test_two_runs_at_once(tmp_path: Path, running: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    for options in (("--check",), ("--checkpoint.resume_from", "latest"), ("--job.overwrite",)):
        assert start(folder, *options) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and f"is in use by process {running.pid} on" in message
    running.kill()
    running.wait()
    assert start(folder, "--checkpoint.resume_from", "latest") == 0  # at once: this host knows that it is dead
    assert not list(tmp_path.rglob("run.lock*"))


def test_a_run_that_was_taken_over_publishes_nothing(
    tmp_path: Path, running: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    lock = json.loads((folder / "run.lock").read_text())
    (folder / "run.lock").write_text(json.dumps({**lock, "token": "other", "host": "elsewhere"}))
    running.send_signal(signal.SIGCONT)
    running.send_signal(signal.SIGTERM)  # saves, or tries to
    assert running.wait(60) == 1
    assert not list((folder / "checkpoints").glob("step-*"))
    assert json.loads((folder / "run.lock").read_text())["token"] == "other"


@pytest.mark.parametrize("where", ["file", "below a file", "long"])
def test_folders_that_cannot_be_written(tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    folder = {"file": tmp_path / "file", "below a file": tmp_path / "file/run", "long": tmp_path / ("x" * 300)}[where]
    for options in ((), ("--check",)):
        assert start(folder, *options) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and message.startswith("error: job.output_dir = ")
    assert os.listdir(tmp_path) == ["file"]


def test_a_video_is_not_sampled_for_a_file_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`generate` refuses its output before it looks for the checkpoint."""
    for out, message in ((tmp_path / "x.gif", "must end in .mp4"), (tmp_path / "file/x.mp4", "is a file")):
        (tmp_path / "file").touch()
        with pytest.raises(SystemExit, match="2"):
            cli.main(["generate", "--checkpoint", "nowhere", "--prompt", "a", "--out", str(out)])
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
