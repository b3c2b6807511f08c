"""Four hundred wrong inputs, each of which ends in one sentence with exit code 2 and leaves nothing behind.

CI takes every twentieth, the nightly tier all of them, in batches whose failure names its cases.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from config_mutations import bounded
from runs import REPOSITORY
from wrong_inputs import COMMAND, JOB, SHELL, Case, cases

from titan_distill import cli, train
from titan_distill.config.loading import load_config
from titan_distill.fault_tolerance import run_lock
from titan_distill.fault_tolerance.exit_codes import EXIT_BAD_INPUT

CASES = cases()
NUM_BATCHES = 20
MAX_CHARACTERS = 2500
NEW = ("out", "x")
"""Folders that a case asks for, below its own."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        job = ["--job.config_file", str(JOB), "--job.output_dir", str(folder), "--training.steps", "1"]
        assert train.main(job) == 0
    return folder


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("case", CASES[::NUM_BATCHES], ids=lambda case: case.name[:60])
def test_one_sentence(case: Case, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert not faults(case, tmp_path / "case", trained, capfd)


@pytest.mark.nightly
@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_all_in_one_sentence(batch: int, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    size = len(CASES) // NUM_BATCHES
    chosen = CASES[batch * size : (batch + 1) * size]
    found = {case.name: faults(case, tmp_path / str(index), trained, capfd) for index, case in enumerate(chosen)}
    assert not {name: of_case for name, of_case in found.items() if of_case}


def faults(case: Case, folder: Path, trained: Path, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """Runs a case. Returns all that is wrong with its end."""
    folder.mkdir()
    words = case.prepare(folder, trained)
    before, children = contents(folder), child_processes()
    capfd.readouterr()
    try:
        code = start(case, words)
    except Exception as error:
        return [f"raised {error!r}"]
    shown = capfd.readouterr().err
    sentences = [line for line in shown.splitlines() if line.startswith("error: ")]
    after = contents(folder)
    changed = sorted(name for name in before if before[name] != after.get(name))
    new = sorted(name for name in after.keys() - before.keys() if Path(name).parts[0] not in NEW)
    checks = {
        f"exit code {code}": code != EXIT_BAD_INPUT,
        f"{len(sentences)} sentences: {shown[-MAX_CHARACTERS:]}": len(sentences) != 1,
        "a traceback": "Traceback" in shown,
        f"not one short line: {sentences}": any(
            not sentence.isprintable() or len(sentence) > MAX_CHARACTERS for sentence in sentences
        ),
        f"changed {changed}": bool(changed),
        f"wrote {new}": bool(new),
        "a lock that is left": any(name.endswith(run_lock.NAME) for name in after.keys() - before.keys()),
        f"processes that are left: {child_processes() - children}": bool(child_processes() - children),
        "a process group that is left": dist.is_initialized(),
    }
    return [fault for fault, is_there in checks.items() if is_there]


def start(case: Case, words: list[str]) -> int:
    """Exit code of a case, in this process as far as it goes."""
    if case.program == SHELL:
        environment = os.environ | {"PYTHON": sys.executable, "NGPU": "1"} | case.environment
        if "CONFIG_FILE" in case.environment:
            words = words[2:]  # without the default job
        done = subprocess.run(["./run_train.sh", *words], env=environment, timeout=300, check=False)
        return done.returncode
    if any("num_workers" in word for word in words):  # were the value accepted, it would start that many processes
        with pytest.raises(ValueError, match="num_workers"):
            load_config(words)
    with pytest.MonkeyPatch.context() as patch, bounded():
        for name, value in case.environment.items():
            patch.setenv(name, value)
        if case.program != COMMAND:
            return train.main(words)
        try:
            cli.main(words)
        except SystemExit as leaving:
            return int(leaving.code or 0)
        return 0


def contents(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Size and time of all files below a folder, None for folders."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def child_processes() -> set[str]:
    """Numbers of the living children of this process."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {number for task in tasks for number in task.read_text().split()}
