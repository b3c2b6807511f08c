"""scripts/slurm/train.sbatch on two "nodes" of one rank each, over loopback.

Only SLURM is a stand-in: an `srun` that starts what it is given twice and passes signals on, and an `scontrol` that
knows one host name and writes down what it is asked to requeue. The script, its torchrun line and the
training are real.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runs import REPOSITORY, read_metrics

SMALL = (
    "--training.global_batch_size", "2",
    "--training.local_batch_size", "1",
    "--validation.enabled", "false",
)  # fmt: skip
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
trap 'kill -USR1 "${pids[@]}"' USR1
trap 'kill -TERM "${pids[@]}"' TERM
for pid in "${pids[@]}"; do
    while wait "$pid" && code=0 || code=$?; ((code == 138 || code == 143)) && kill -0 "$pid" 2>/dev/null; do :; done
    ((code == 0)) || status=$code
done
exit "${status:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >>"$SCONTROL_LOG"; fi
"""


@contextmanager
def started(folder: Path, *overrides: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The script as SLURM would start it, for a short finetune of the tiny Wan that writes to `folder/run`."""
    stand_ins = folder / "bin"
    stand_ins.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{stand_ins}:{os.environ['PATH']}", "PYTHON": sys.executable,
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2",
        "SCONTROL_LOG": str(folder / "scontrol.log"),
        **variables,
    }  # fmt: skip
    environment.pop("SLURM_GPUS_ON_NODE", None)
    command = ["bash", "scripts/slurm/train.sbatch", "train_configs/tiny_wan_finetune.toml"]
    job = subprocess.Popen(
        [*command, "--job.output_dir", str(folder / "run"), *SMALL, *overrides], cwd=REPOSITORY, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield job
    finally:
        if job.poll() is None:  # the test has failed: torchrun takes its workers with it
            os.killpg(job.pid, signal.SIGTERM)
            job.communicate()


def test_two_nodes_train_as_one_run(tmp_path: Path) -> None:
    with started(tmp_path, "--training.steps", "4", "--checkpoint.enabled", "false") as job:
        output, _ = job.communicate(timeout=240)
    assert job.returncode == 0, output[-3000:]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4], "written by one rank, once"
    assert "2 ranks" in output
    logs = sorted((tmp_path / "run" / "logs").rglob("stdout.log"))
    assert [path.relative_to(tmp_path / "run" / "logs").parts[1] for path in logs] == ["node-0", "node-1"]
    assert not (tmp_path / "scontrol.log").exists()


def test_wrong_input_ends_in_one_sentence(tmp_path: Path) -> None:
    with started(tmp_path, "--training.stepz", "4") as job:
        output, _ = job.communicate(timeout=120)
    assert job.returncode == 2
    assert output.startswith("error: ") and output.count("\n") == 1 and "training.steps" in output


def test_warned_both_nodes_stop_after_one_step_and_the_job_is_requeued(tmp_path: Path) -> None:
    """test_requeue.py starts such a job again."""
    with started(tmp_path, "--training.steps", "1000000", "--checkpoint.interval", "2") as job:
        wait_for_checkpoint(tmp_path / "run", job)
        job.send_signal(signal.SIGUSR1)
        output, _ = job.communicate(timeout=120)
    assert job.returncode == 75, output[-3000:]
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {os.getpid()}\n", output[-3000:]
    assert max(saved_steps(tmp_path / "run")) == read_metrics(tmp_path / "run")[-1]["step"]


def saved_steps(folder: Path) -> list[int]:
    names = [path.name for path in (folder / "checkpoints").glob("step-*")]
    return [int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit()]


def wait_for_checkpoint(folder: Path, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not saved_steps(folder):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
