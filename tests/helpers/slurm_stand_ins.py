"""Stand-ins for `srun` and `scontrol`, for tests of the batch script on machines without SLURM.

`srun` does what SLURM 22.05 was seen to do on two nodes:

- It starts one task per node, each under a `slurmstepd` and in its own process group, which gets all its signals.
- With `--kill-on-bad-exit=1` the first task that ends with any code but 0 ends the others: SIGTERM, then SIGKILL.
- It returns the largest exit code of its tasks, 128 + N for signal N. It waits for a killed `slurmstepd` without end.
- Where `SLURM_EXPORT_ENV` is NONE, as after `sbatch --export=NONE`, only `--export=ALL` hands the environment on.
- It drops signals while it starts the tasks, which takes `$STARTING_SECONDS`.

The variable `LAGGING_NODE` names the node whose task leaves two seconds after its command, as on a busy machine.
`scontrol` knows the address of the nodes and writes the jobs that it is asked to requeue to `$SCONTROL_LOG`; `scancel`
sends USR1 to the batch script.
"""

from __future__ import annotations

import sys
from pathlib import Path

SRUN = (
    f"#!{sys.executable}"
    + r'''
import os, signal, subprocess, sys, time

KILL_WAIT_SECONDS = 30
LAGGING = 'trap : USR1; "$@"; code=$?; sleep 2; exit "$code"'
SLURMSTEPD = """
trap : USR1 TERM
[[ ${LAGGING_NODE:-} != "$SLURM_NODEID" ]] || set -- bash -c "$LAGGING" lagging "$@"
"$@"
"""

signals = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: signals.append(number))
command = sys.argv[1:]
options = []
while command[0].startswith("--"):
    options.append(command.pop(0))
environment = dict(os.environ)
if environment.get("SLURM_EXPORT_ENV") == "NONE" and "--export=ALL" not in options:
    environment = {name: value for name, value in environment.items() if name.startswith(("SLURM", "PATH"))}


def start(node):
    variables = {"SLURM_NODEID": str(node), "BATCH_SCRIPT": str(os.getppid()), "LAGGING": LAGGING}
    command_line = ["bash", "-c", SLURMSTEPD, "slurmstepd", *command]
    return subprocess.Popen(command_line, env=environment | variables, start_new_session=True)


def exit_code(task):  # None of a slurmstepd that was killed
    code = task.poll()
    return None if code == -signal.SIGKILL and not is_killing else code


tasks = [start(node) for node in range(int(os.environ["SLURM_NNODES"]))]
time.sleep(float(os.environ.get("STARTING_SECONDS", 0)))
signals.clear()
kill_at, is_killing = None, False
while None in (codes := [exit_code(task) for task in tasks]):
    if "--kill-on-bad-exit=1" in options and kill_at is None and any(codes):
        kill_at = time.monotonic() + KILL_WAIT_SECONDS
        signals.append(signal.SIGTERM)
    if kill_at is not None and time.monotonic() > kill_at:
        is_killing = True
        signals.append(signal.SIGKILL)
    while signals:
        number = signals.pop(0)
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, number)
    time.sleep(0.02)
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
'''
)
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >>"$SCONTROL_LOG"; fi
"""
SCANCEL = """#!/usr/bin/env bash
kill -USR1 "$BATCH_SCRIPT"
"""


def install(folder: Path, **others: str) -> Path:
    """Writes the stand-ins, and `others` by name, to `folder / "bin"`. Returns that folder."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, **others}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return programs
