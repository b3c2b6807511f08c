"""scripts/slurm/train.sbatch on two "nodes" of one rank each, over loopback.

Only SLURM is a stand-in (tests/helpers/slurm_stand_ins.py); the script, its torchrun line and the training are real.
test_real_slurm.py runs the script under a real SLURM.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import slurm_stand_ins
from runs import REPOSITORY, read_metrics

SMALL = (
    "--training.global_batch_size", "2",
    "--training.local_batch_size", "1",
    "--validation.enabled", "false",
)  # fmt: skip


@contextmanager
def started(folder: Path, *overrides: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The script as SLURM would start it, for a short finetune of the tiny Wan that writes to `folder/run`."""
    stand_ins = slurm_stand_ins.install(folder)
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


@pytest.mark.parametrize("lagging_node", [pytest.param("0", marks=pytest.mark.nightly), "1"])
def test_warned_both_nodes_stop_after_one_step_and_the_job_is_requeued(lagging_node: str, tmp_path: Path) -> None:
    """Whichever node leaves first: srun takes no stop for a crash. test_requeue.py starts such a job again."""
    endless = ("--training.steps", "1000000", "--checkpoint.interval", "2")
    with started(tmp_path, *endless, LAGGING_NODE=lagging_node) as job:
        wait_for_checkpoint(tmp_path / "run", job)
        job.send_signal(signal.SIGUSR1)
        output, _ = job.communicate(timeout=120)
    assert job.returncode == 75, output[-3000:]
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {os.getpid()}\n", output[-3000:]
    assert max(saved_steps(tmp_path / "run")) == read_metrics(tmp_path / "run")[-1]["step"]
    logs = [path.read_text() for path in (tmp_path / "run" / "logs").rglob("*.log")]
    assert "Traceback" not in output + "".join(logs) and "frame #" not in output + "".join(logs)


@pytest.mark.nightly
def test_a_crash_on_one_node_ends_both_and_the_job_is_not_requeued(tmp_path: Path) -> None:
    endless = ("--training.steps", "1000000", "--checkpoint.interval", "2", "--comm.train_timeout_seconds", "20")
    with started(tmp_path, *endless) as job:
        wait_for_checkpoint(tmp_path / "run", job)
        pid = rank_process(1)
        os.kill(pid, signal.SIGKILL)
        output, _ = job.communicate(timeout=120)
    assert job.returncode == 1, output[-3000:]
    assert not (tmp_path / "scontrol.log").exists()
    logs = [path.read_text() for path in (tmp_path / "run" / "logs").rglob("*.log")]
    assert "Traceback" not in output + "".join(logs) and "frame #" not in output + "".join(logs), output
    last = read_metrics(tmp_path / "run")[-1]["step"]
    (step,) = re.findall(
        rf"error: rank 1 \(.*, pid {pid}\) was ended by SIGKILL .* after step (\d+); .*/node-1/", output
    )
    assert int(step) in (last - 1, last), "rank 1 may die between the last collective of a step and its end"
    told = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(told) <= 2, "the launcher of the other node may know of it, too"


def rank_process(rank: int) -> int:
    """Process id of a rank of this test's job."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if {f"RANK={rank}", f"SLURM_JOB_ID={os.getpid()}"} <= set(environment.read_text().split("\0")):
                return int(environment.parent.name)
    raise AssertionError(f"no process is rank {rank}")


def saved_steps(folder: Path) -> list[int]:
    names = [path.name for path in (folder / "checkpoints").glob("step-*")]
    return [int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit()]


def wait_for_checkpoint(folder: Path, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 400
    while not saved_steps(folder):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
