"""The batch script is sound shell, names no cluster, says how it is used, and requeues when it should.

The lines of the script are real; SLURM (tests/helpers/slurm_stand_ins.py) and the run are stand-ins.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import slurm_stand_ins
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
    done = run(shellcheck, *SCRIPT.parent.iterdir(), "run_train.sh")
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


PYTHON = (
    f"#!{sys.executable}"
    + """
import os, pathlib, signal, sys, time

folder = pathlib.Path(os.environ["FOLDER"])
if sys.argv[1] == "-c":  # the check of the input, which names the output folder
    print(folder / "run")
    sys.exit()


def exit_code(variable):  # one for all nodes, or one for each
    codes = os.environ[variable].split(",")
    return int(codes[int(os.environ["SLURM_NODEID"]) % len(codes)])


def hear(number, frame):
    (folder / "heard").touch()
    if "OBEYS" in os.environ:
        os._exit(exit_code("OBEYS"))


signal.signal(signal.SIGUSR1, hear)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / "launched").write_text(" ".join([str(os.getpid()), *sys.argv[1:]]))
if "ENDS" in os.environ and exit_code("ENDS") >= 0:
    sys.exit(exit_code("ENDS"))
while True:
    time.sleep(0.05)
"""
)
SIGNAL_BEFORE_CHILD_IS_KNOWN = """
if [[ $0 == *train.sbatch ]]; then
    set -T
    trap '[[ $BASH_COMMAND != *=\\$! || -n ${SENT:-} ]] || { SENT=1; kill -USR1 $$; }' DEBUG
fi
"""


@dataclass
class Outcome:
    """The end of a batch script."""

    code: int
    """Exit code of the script."""
    heard: bool
    """Whether the launcher heard USR1."""
    requeued: str
    """The jobs that were requeued, as `scontrol` was told."""
    launched: str
    """Process id and arguments of the launcher; empty where none has started."""


def kill_slurmstepd(launcher: int) -> None:
    """Kills the stand-in for slurmstepd, which a node's task descends from."""
    pid = launcher
    while "slurmstepd" not in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
        pid = parent(pid)
    os.kill(pid, signal.SIGKILL)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def batch(folder: Path, event: signal.Signals | Callable[[int], None] | None = None, **variables: str) -> Outcome:
    """Runs the script with a stand-in for the interpreter. Once the launcher runs, `event` is sent to the script, or
    called with the launcher's process id."""
    programs = slurm_stand_ins.install(folder, python=PYTHON)
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": str(programs / "python"),
        "FOLDER": str(folder), "SCONTROL_LOG": str(folder / "requeued"),
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node0", "SLURM_NNODES": "1", **variables,
    }  # fmt: skip
    command = ["bash", str(SCRIPT), "job.toml", "--job.output_dir", "run-%a"]
    job = subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True)
    launched = folder / "launched"
    try:
        if event is not None:
            deadline = time.monotonic() + 30
            while not launched.exists() or not launched.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            if isinstance(event, signal.Signals):
                job.send_signal(event)
            else:
                event(int(launched.read_text().split()[0]))
        code = job.wait(30)
    finally:
        groups = {job.pid}
        with suppress(OSError, IndexError):  # of a launcher that does not obey
            groups.add(os.getpgid(int(launched.read_text().split()[0])))
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
    texts = [path.read_text() if path.exists() else "" for path in (folder / "requeued", launched)]
    return Outcome(code, (folder / "heard").exists(), *texts)


@pytest.mark.parametrize("code", ["0", "1", "2", "130", "137"])
def test_what_ends_by_itself_is_not_requeued(code: str, tmp_path: Path) -> None:
    ended = batch(tmp_path, ENDS=code)
    assert (ended.code, ended.heard, ended.requeued) == (int(code), False, "")


def test_a_run_that_asks_to_come_again_is_requeued(tmp_path: Path) -> None:
    """Also when the script was not told: somebody signalled a rank."""
    ended = batch(tmp_path, ENDS="75")
    assert (ended.code, ended.heard, ended.requeued) == (75, False, "requeue 7\n")


def test_the_warning_is_passed_on_and_awaited(tmp_path: Path) -> None:
    ended = batch(tmp_path, signal.SIGUSR1, OBEYS="75")
    assert (ended.code, ended.heard, ended.requeued) == (75, True, "requeue 7\n")


def test_a_run_that_finishes_when_warned_is_done(tmp_path: Path) -> None:
    ended = batch(tmp_path, signal.SIGUSR1, OBEYS="0")
    assert (ended.code, ended.heard, ended.requeued) == (0, True, "")


def test_a_run_that_does_not_leave_in_time_is_requeued_once(tmp_path: Path) -> None:
    ended = batch(tmp_path, signal.SIGUSR1, STOP_SECONDS="1")
    assert (ended.code, ended.heard, ended.requeued) == (137, True, "requeue 7\n")


def test_a_node_that_loses_another_while_both_start_is_no_crash(tmp_path: Path) -> None:
    """A rank that has its handlers already fails when the first node leaves with the store."""
    ended = batch(tmp_path, signal.SIGUSR1, SLURM_NNODES="2", OBEYS="75,1")
    assert (ended.code, ended.requeued) == (75, "requeue 7\n")


def test_a_crash_ends_the_other_nodes_and_is_not_requeued(tmp_path: Path) -> None:
    """Also where the other nodes take being ended for a request to stop."""
    ended = batch(tmp_path, SLURM_NNODES="2", ENDS="-1,1", OBEYS="75")
    assert (ended.code, ended.requeued) == (1, "")


def test_a_cancelled_job_saves_and_stays_cancelled(tmp_path: Path) -> None:
    ended = batch(tmp_path, signal.SIGTERM, OBEYS="75")
    assert (ended.code, ended.heard, ended.requeued) == (75, True, "")


def test_a_warning_while_srun_starts_is_a_requeue(tmp_path: Path) -> None:
    """Between the start of srun and the line that remembers its process id, which a busy machine makes long."""
    (tmp_path / "environment").write_text(SIGNAL_BEFORE_CHILD_IS_KNOWN)
    ended = batch(tmp_path, BASH_ENV=str(tmp_path / "environment"), OBEYS="75")
    assert (ended.code, ended.requeued) == (75, "requeue 7\n")


def test_a_warning_that_srun_drops_is_repeated(tmp_path: Path) -> None:
    ended = batch(tmp_path, signal.SIGUSR1, OBEYS="75", STARTING_SECONDS="3")
    assert (ended.code, ended.heard, ended.requeued) == (75, True, "requeue 7\n")


def test_a_node_without_slurmstepd_stops_and_the_job_is_requeued(tmp_path: Path) -> None:
    """srun waits for such a node for ever, and SLURM does not end what runs there."""
    ended = batch(tmp_path, kill_slurmstepd, OBEYS="75")
    assert (ended.code, ended.heard, ended.requeued) == (75, True, "requeue 7\n")


def test_a_job_without_an_exported_environment_trains(tmp_path: Path) -> None:
    ended = batch(tmp_path, ENDS="0", SLURM_EXPORT_ENV="NONE")
    assert ended.code == 0 and "-m titan_distill.launch" in ended.launched


@pytest.mark.parametrize(("task", "folder"), [("3", "run-3"), (None, "run-%a")])
def test_percent_a_is_the_number_of_an_array_task(task: str | None, folder: str, tmp_path: Path) -> None:
    variables = {} if task is None else {"SLURM_ARRAY_TASK_ID": task}
    assert batch(tmp_path, ENDS="0", **variables).launched.split()[-2:] == ["--job.output_dir", folder]
