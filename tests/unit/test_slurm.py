"""The batch script is sound shell, names no cluster, and says how it is used."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "slurm" / "train.sbatch"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_bash_parses_it() -> None:
    assert run("bash", "-n", SCRIPT).returncode == 0


def test_shellcheck_finds_nothing() -> None:
    beside_python = Path(sys.executable).parent / "shellcheck"  # where the dev extra puts it
    shellcheck = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip('needs shellcheck: pip install -e ".[dev]"')
    done = run(shellcheck, SCRIPT, "run_train.sh")
    assert done.returncode == 0, done.stdout


def test_sbatch_is_told_to_warn_and_requeue_and_nothing_of_a_cluster() -> None:
    options = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(), flags=re.MULTILINE)
    assert dict(options) == {
        "job-name": "titan_distill",
        "ntasks-per-node": "1",
        "signal": "B:USR1@300",
        "requeue": "",
        "open-mode": "append",
    }


@pytest.mark.parametrize("arguments", [(), ("--training.steps", "4")])
def test_without_a_configuration_it_says_how_it_is_used(arguments: tuple[str, ...]) -> None:
    done = run("bash", SCRIPT, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch")
