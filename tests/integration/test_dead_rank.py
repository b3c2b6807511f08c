"""A rank that is killed, stopped or stuck ends the job within the timeout, and the output names it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import toy_family
from runs import HELPERS, REPOSITORY, read_metrics

from titan_distill.fault_tolerance.watchdog import Beat, Silence

TOY = REPOSITORY / "tests" / "assets" / "toy_finetune.toml"
TIMEOUT_SECONDS = 8
MARGIN_SECONDS = 15  # for processes to end on a busy machine; a stopped rank would cost torchrun's 30 without us


def job(folder: Path, *overrides: str) -> list[str]:
    """Command line of an endless toy finetune."""
    data = toy_family.write_data(folder / "toy.parquet")
    return [
        "-m", "titan_distill.train", "--job.config_file", str(TOY),
        "--job.output_dir", str(folder / "run"), "--data.path", str(data),
        "--training.steps", "1000000", "--training.local_batch_size", "4",
        "--comm.train_timeout_seconds", str(TIMEOUT_SECONDS), *overrides,
    ]  # fmt: skip


@contextmanager
def torchrun(folder: Path, name: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A running torchrun and the file of its output; nothing of it outlives the block."""
    shown = folder / f"{name}.log"
    environment = {**os.environ, "PYTHONPATH": str(HELPERS)}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    with shown.open("wb") as log:
        agent = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
    try:
        yield agent, shown
    finally:
        for pid in [*workers(agent).values(), agent.pid]:
            if agent.poll() is None or pid != agent.pid:
                os.kill(pid, signal.SIGKILL)
        agent.wait()


def workers(agent: subprocess.Popen[bytes]) -> dict[int, int]:
    """Rank -> process id of an agent's live workers."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True, check=False)
    pids = [int(pid) for pid in found.stdout.split()]
    return {int(match[1]): pid for pid in pids if (match := re.search(r"\bRANK=(\d+)", _environment(pid)))}


def _environment(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text().replace("\0", "\n")
    except OSError:  # it has just ended
        return ""


def wait_for_steps(folder: Path, agent: subprocess.Popen[bytes], shown: Path, num_steps: int = 3) -> None:
    deadline = time.monotonic() + 90
    metrics = folder / "run" / "metrics.jsonl"
    while not metrics.exists() or len(read_metrics(folder / "run")) < num_steps:
        assert agent.poll() is None and time.monotonic() < deadline, shown.read_text()[-3000:]
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("number", "victim"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 1), (signal.SIGSTOP, 0)], ids=lambda v: str(v)
)
def test_lost_rank_ends_the_job_and_is_named(number: signal.Signals, victim: int, tmp_path: Path) -> None:
    """Stopping rank 0 matters because its output is all that is shown, and because it is first in everything."""
    with torchrun(
        tmp_path, "node", "--standalone", "--nproc-per-node", "2", "--local-ranks-filter", "0", "--tee", "3",
        *job(tmp_path),
    ) as (agent, shown):  # fmt: skip
        wait_for_steps(tmp_path, agent, shown)
        os.kill(workers(agent)[victim], number)
        assert agent.wait(TIMEOUT_SECONDS + MARGIN_SECONDS) != 0
    if number == signal.SIGKILL:  # torchrun has seen that one
        assert re.search(rf"rank +: {victim} ", shown.read_text().split("Root Cause")[-1])
    else:
        assert re.search(rf"no sign of life for \d\.\d s from rank {victim} \(.*after step \d+, at ", shown.read_text())


def test_stuck_rank_is_named_with_its_line(tmp_path: Path) -> None:
    """Its heart beats on, so only the others' collective tells; they say who it waits for and where that rank is."""
    stuck = ("--job.imports", "toy_family,stuck_method", "--recipe.method", "stuck")
    with torchrun(
        tmp_path, "node", "--standalone", "--nproc-per-node", "2", "--local-ranks-filter", "0", "--tee", "3",
        *job(tmp_path, *stuck),
    ) as (agent, shown):  # fmt: skip
        wait_for_steps(tmp_path, agent, shown, num_steps=2)
        assert agent.wait(TIMEOUT_SECONDS + MARGIN_SECONDS) != 0
    assert re.search(r"waited in vain for rank 1 \(.*after step 2, at stuck_method.py:\d+", shown.read_text())
    assert re.search(r"not there: rank 1 \(.*stuck_method.py:\d+", shown.read_text()), "said before the timeout, too"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda v: str(v))
def test_lost_node_is_named_by_the_other(number: signal.Signals, tmp_path: Path) -> None:
    """Two torchruns; the second loses its power, agent and all. The first cannot see why its worker fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [
        "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test",
        "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1",
    ]  # fmt: skip
    arguments = job(tmp_path)
    with (
        torchrun(tmp_path, "first", *line, "--rdzv-conf", "is_host=1", *arguments) as (first, shown),
        torchrun(tmp_path, "second", *line, "--rdzv-conf", "is_host=0", *arguments) as (second, _),
    ):
        wait_for_steps(tmp_path, first, shown)
        ((rank, worker),) = workers(second).items()
        for pid in (second.pid, worker):
            os.kill(pid, number)
        assert first.wait(TIMEOUT_SECONDS + MARGIN_SECONDS) != 0
    assert re.search(rf"no sign of life for \d\.\d s from rank {rank} \(.*pid {worker};", shown.read_text())


def test_silence_is_of_counters_and_ends_with_the_run() -> None:
    """Clocks of machines need not agree, and a rank that is done owes no beat."""
    silence, beat = Silence(), Beat("host", 1, 1)
    assert silence.update({0: beat, 1: beat}, now=100.0) == {0: 0.0, 1: 0.0}
    later = {0: Beat("host", 1, 1, count=1), 1: beat}
    assert silence.update(later, now=107.0) == {0: 0.0, 1: 7.0}
    assert silence.update({**later, 1: Beat("host", 1, 1, state="done")}, now=109.0) == {0: 2.0}
