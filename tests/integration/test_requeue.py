"""A preempted SLURM job, for real but for SLURM: a signal to one of two ranks, a checkpoint, exit code 75, a requeue,
and a second start whose losses are those of a run that nobody disturbed, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import slurm_stand_ins
import toy_family
from forked import train_forked
from runs import HELPERS, REPOSITORY, read_metrics

from titan_distill.checkpoint.discovery import complete_steps

TOY = REPOSITORY / "tests" / "assets" / "toy_finetune.toml"


def arguments(folder: Path, name: str, steps: int) -> list[str]:
    return [
        "--data.path", str(folder / "toy.parquet"), "--job.output_dir", str(folder / name),
        "--training.steps", str(steps), "--training.local_batch_size", "4",
        "--checkpoint.enabled", "true", "--checkpoint.interval", "1000000",
    ]  # fmt: skip


def environment(folder: Path, **more: str) -> dict[str, str]:
    toy_data = folder / "toy.parquet"
    if not toy_data.exists():
        toy_family.write_data(toy_data)
    python_path = f"{HELPERS}:{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": python_path, **more}


@contextmanager
def running(command: list[str], folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, nothing of which outlives the block."""
    job = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(folder, **variables), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield job
    finally:
        if job.poll() is None:
            for pid in [*descendants(job.pid), job.pid]:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGKILL)
            job.communicate()


def sbatch(folder: Path, steps: int, **variables: str) -> list[str]:
    """The script's command line, its stand-ins put in place."""
    slurm_stand_ins.install(folder)
    return ["bash", "scripts/slurm/train.sbatch", str(TOY), *arguments(folder, "run", steps)]


def slurm(folder: Path, **more: str) -> dict[str, str]:
    return {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid()), "RANKS_PER_NODE": "2",
        "SLURM_JOB_NODELIST": "node0", "SLURM_NNODES": "1", "SCONTROL_LOG": str(folder / "scontrol.log"), **more,
    }  # fmt: skip


def descendants(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    children = [int(child) for child in found.stdout.split()]
    return children + [below for child in children for below in descendants(child)]


def rank_process(job: subprocess.Popen[str], rank: int) -> int:
    for pid in descendants(job.pid):
        with suppress(OSError):  # it has just ended
            if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
                return pid
    raise AssertionError(f"no process is rank {rank}")


def wait_for_steps(folder: Path, job: subprocess.Popen[str], num_steps: int = 3) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(read_metrics(folder)) < num_steps:
        assert job.poll() is None and time.monotonic() < deadline, job.communicate(timeout=5)[0][-3000:]
        time.sleep(0.02)


def losses(folder: Path) -> list[float]:
    return [line["loss/student"] for line in read_metrics(folder)]


def test_signal_to_one_rank_is_a_checkpoint_a_requeue_and_an_exact_continuation(tmp_path: Path) -> None:
    with running(sbatch(tmp_path, steps=1_000_000), tmp_path, **slurm(tmp_path)) as job:
        wait_for_steps(tmp_path / "run", job)
        os.kill(rank_process(job, 1), signal.SIGUSR1)
        output, _ = job.communicate(timeout=60)
    assert job.returncode == 75, output[-3000:]
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {os.getpid()}\n"
    assert "stopped as asked after step" in output and "Traceback" not in output
    (saved,) = complete_steps(tmp_path / "run" / "checkpoints")
    stopped_at = len(losses(tmp_path / "run"))
    assert saved.name == f"step-{stopped_at:08d}", "the step at hand was finished and saved"

    steps = stopped_at + 3
    with running(sbatch(tmp_path, steps), tmp_path, **slurm(tmp_path, SLURM_RESTART_COUNT="1")) as job:
        output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output[-3000:]
    undisturbed = ["--job.config_file", str(TOY), *arguments(tmp_path, "whole", steps)]
    assert train_forked(2, undisturbed, tmp_path) == [0, 0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "run")) == steps
    assert (tmp_path / "scontrol.log").read_text().count("requeue") == 1


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("num_ranks", ["1", "2"])
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGUSR1, 75), (signal.SIGTERM, 75), (signal.SIGINT, 130)],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_signal_to_the_launcher(number: signal.Signals, code: int, num_ranks: str, mode: str, tmp_path: Path) -> None:
    """Twice, while every step is saved: what was published before stays whole, and the next start goes on from it."""
    saving = ("--checkpoint.interval", "1", "--checkpoint.keep", "1000", "--checkpoint.mode", mode)
    command = ["./run_train.sh", "--job.config_file", str(TOY), *arguments(tmp_path, "run", 1_000_000), *saving]
    with running(command, tmp_path, NGPU=num_ranks) as job:
        wait_for_steps(tmp_path / "run", job)
        before = list(complete_steps(tmp_path / "run" / "checkpoints"))
        job.send_signal(number)
        if number != signal.SIGINT:  # a second Ctrl-C kills
            job.send_signal(number)
        output, _ = job.communicate(timeout=60)
    assert job.returncode == code, output[-3000:]
    assert "Traceback" not in output
    after = list(complete_steps(tmp_path / "run" / "checkpoints"))
    assert set(before) <= set(after)
    if code == 75:
        assert max(after).name == f"step-{len(losses(tmp_path / 'run')):08d}"
