"""The batch script is sound shell, names no cluster, says how it is used, and requeues when it should: its real lines,
with stand-ins for SLURM and for the run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
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


STAND_INS = {
    "python": "echo /tmp/run",  # checks the input and names the output folder
    "scontrol": """
if [[ $1 == show ]]; then echo node0; exit; fi
echo "$@" >>"$FOLDER/requeued"
kill -KILL "$(<"$FOLDER/step")" 2>/dev/null # as SLURM does
""",
    "srun": """
trap 'echo USR1 >>"$FOLDER/heard"; [[ -z ${OBEYS:-} ]] || exit "$OBEYS"' USR1
trap '' TERM
echo $$ >"$FOLDER/step"
if [[ -n ${ENDS:-} ]]; then exit "$ENDS"; fi
while :; do sleep 0.05; done
""",
}


def batch(folder: Path, *signals: signal.Signals, **variables: str) -> tuple[int, str, str]:
    """Exit code of the script, what its step heard, and what was requeued; signals are sent once the step runs."""
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {
        **os.environ, **variables, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python"),
        "FOLDER": str(folder), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node0", "SLURM_NNODES": "1",
    }  # fmt: skip
    job = subprocess.Popen(["bash", str(SCRIPT), "job.toml"], cwd=REPOSITORY, env=environment)
    deadline = time.monotonic() + 30
    while not (step := folder / "step").exists() or not step.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for number in signals:
        job.send_signal(number)
    code = job.wait(30)
    heard, requeued = (path.read_text() if path.exists() else "" for path in (folder / "heard", folder / "requeued"))
    return code, heard, requeued


@pytest.mark.parametrize("code", ["0", "1", "2", "130", "137"])
def test_what_ends_by_itself_is_not_requeued(code: str, tmp_path: Path) -> None:
    assert batch(tmp_path, ENDS=code) == (int(code), "", "")


def test_a_run_that_asks_to_come_again_is_requeued(tmp_path: Path) -> None:
    """Also when the script was not told: somebody signalled a rank."""
    assert batch(tmp_path, ENDS="75") == (75, "", "requeue 7\n")


def test_the_warning_is_passed_on_and_awaited(tmp_path: Path) -> None:
    assert batch(tmp_path, signal.SIGUSR1, OBEYS="75") == (75, "USR1\n", "requeue 7\n")


def test_a_run_that_finishes_when_warned_is_done(tmp_path: Path) -> None:
    assert batch(tmp_path, signal.SIGUSR1, OBEYS="0") == (0, "USR1\n", "")


def test_a_run_that_does_not_leave_in_time_is_requeued_once(tmp_path: Path) -> None:
    assert batch(tmp_path, signal.SIGUSR1, STOP_SECONDS="1") == (137, "USR1\n", "requeue 7\n")


def test_a_cancelled_job_saves_and_stays_cancelled(tmp_path: Path) -> None:
    assert batch(tmp_path, signal.SIGTERM, OBEYS="75") == (75, "USR1\n", "")
