"""A rank that is killed, stopped or stuck ends the job within the timeout, and one paragraph names it."""

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


OURS, TORCHRUN = "titan_distill.launch", "torch.distributed.run"


@contextmanager
def launched(
    folder: Path, name: str, *arguments: str, launcher: str = OURS, **variables: str
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A running launcher and the file of its output; nothing of it outlives the block."""
    shown = folder / f"{name}.log"
    environment = {**os.environ, "PYTHONPATH": str(HELPERS), **variables}
    command = [sys.executable, "-m", launcher, *arguments]
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


def on_ranks(num_ranks: int) -> list[str]:
    """As run_train.sh gives it."""
    shown = ("--local-ranks-filter", "0", "--role", "rank", "--tee", "3")
    return ["--standalone", "--nproc-per-node", str(num_ranks), *shown]


def paragraph(shown: Path) -> str:
    """The one line that the launcher itself says, and which is no rank's."""
    (line,) = [line for line in shown.read_text().splitlines() if not re.match(r"\[rank\d+\]:", line)]
    return line


def assert_says_once(shown: Path, folder: Path, *patterns: str) -> None:
    """The launcher's paragraph has the patterns, the last step of the metrics, and a log; nobody has a traceback."""
    told = paragraph(shown)
    assert all(re.search(pattern, told) for pattern in patterns), told
    assert f"after step {read_metrics(folder / 'run')[-1]['step']}" in told
    (logs,) = [Path(path) for path in re.findall(r"its output is in ([^ ;,)]*)", told)]
    everything = [shown, *logs.parent.rglob("*.log"), *logs.parent.rglob("error.json")]
    assert logs.is_dir() and len(everything) >= 6
    assert not [path for path in everything if "Traceback" in path.read_text()], "the ranks that lost it are quiet"


@pytest.mark.parametrize(
    ("number", "victim"),
    [
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.nightly),
        pytest.param(signal.SIGABRT, 1, marks=pytest.mark.nightly),
    ],
    ids=lambda v: str(v),
)
def test_killed_rank_is_one_paragraph(number: signal.Signals, victim: int, tmp_path: Path) -> None:
    with launched(tmp_path, "node", *on_ranks(2), *job(tmp_path)) as (agent, shown):
        wait_for_steps(tmp_path, agent, shown, num_steps=6)
        pid = workers(agent)[victim]
        os.kill(pid, number)
        assert agent.wait(TIMEOUT_SECONDS + MARGIN_SECONDS) == 1
    assert_says_once(shown, tmp_path, rf"^error: rank {victim} \(.*pid {pid}\) was ended by {number.name} ")


@pytest.mark.parametrize(
    ("victim", "launcher"),
    [(0, OURS), pytest.param(1, OURS, marks=pytest.mark.nightly), pytest.param(1, TORCHRUN, marks=pytest.mark.nightly)],
    ids=str,
)
def test_stopped_rank_is_one_paragraph(victim: int, launcher: str, tmp_path: Path) -> None:
    """Stopping rank 0 matters because its output is all that is shown, and because it is first in everything."""
    with launched(tmp_path, "node", *on_ranks(2), *job(tmp_path), launcher=launcher) as (agent, shown):
        wait_for_steps(tmp_path, agent, shown)
        os.kill(workers(agent)[victim], signal.SIGSTOP)
        assert agent.wait(TIMEOUT_SECONDS + MARGIN_SECONDS) == 1
    said = rf"no sign of life for \d\.\d s from rank {victim} \(.*after step \d+, last seen at "
    if launcher == OURS:
        assert_says_once(shown, tmp_path, f"^error: {said}")
    else:
        assert re.search(said, shown.read_text().split("Root Cause")[-1])


@pytest.mark.nightly
def test_killed_rank_under_plain_torchrun_is_its_root_cause(tmp_path: Path) -> None:
    with launched(tmp_path, "node", *on_ranks(2), *job(tmp_path), launcher=TORCHRUN) as (agent, shown):
        wait_for_steps(tmp_path, agent, shown)
        os.kill(workers(agent)[1], signal.SIGKILL)
        assert agent.wait(TIMEOUT_SECONDS + MARGIN_SECONDS) != 0
    assert re.search(r"rank +: 1 ", shown.read_text().split("Root Cause")[-1])
    assert shown.read_text().count("Traceback") == 1, "torchrun's own"


@pytest.mark.parametrize("rank", ["1", pytest.param("0", marks=pytest.mark.nightly)])
def test_error_on_one_rank_is_its_traceback_and_one_line(rank: str, tmp_path: Path) -> None:
    raising = ("--job.imports", "toy_family,raising_method", "--recipe.method", "raising")
    with launched(tmp_path, "node", *on_ranks(2), *job(tmp_path, *raising), RAISING_RANK=rank) as (agent, shown):
        assert agent.wait(120) == 1
    said = shown.read_text()
    assert said.count("Traceback") == 1 and said.count("raise RuntimeError") == 1, said
    sentence = rf"error: rank {rank} \(.*\) failed after step 1 with RuntimeError: a fault of the method; its "
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.match(sentence, line)


@pytest.mark.nightly
def test_stuck_rank_is_named_with_its_line(tmp_path: Path) -> None:
    """Its heart beats on, so only the others' collective tells; they say who it waits for and where that rank is."""
    stuck = ("--job.imports", "toy_family,stuck_method", "--recipe.method", "stuck")
    with launched(tmp_path, "node", *on_ranks(2), *job(tmp_path, *stuck)) as (agent, shown):
        wait_for_steps(tmp_path, agent, shown, num_steps=2)
        assert agent.wait(TIMEOUT_SECONDS + MARGIN_SECONDS) != 0
    said = r"^error: the other ranks waited in vain for rank 1 \(.*after step 2, last seen at stuck_method.py:\d+"
    assert_says_once(shown, tmp_path, said)
    assert re.search(r"not there: rank 1 \(.*stuck_method.py:\d+", shown.read_text()), "said before the timeout, too"


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGKILL, marks=pytest.mark.nightly), signal.SIGSTOP], ids=lambda v: str(v)
)
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
        launched(tmp_path, "first", *line, "--rdzv-conf", "is_host=1", *arguments) as (first, shown),
        launched(tmp_path, "second", *line, "--rdzv-conf", "is_host=0", *arguments) as (second, _),
    ):
        wait_for_steps(tmp_path, first, shown)
        ((rank, worker),) = workers(second).items()
        for pid in (second.pid, worker):
            os.kill(pid, number)
        assert first.wait(TIMEOUT_SECONDS + MARGIN_SECONDS) != 0
    last = read_metrics(tmp_path / "run")[-1]["step"]
    (told,) = [line for line in shown.read_text().splitlines() if line.startswith("error: ")]
    assert re.search(rf"no sign of life for \d\.\d s from rank {rank} \(.*pid {worker}; after step {last},", told)


def test_silence_is_of_counters_and_ends_with_the_run() -> None:
    """Clocks of machines need not agree, and a rank that is done owes no beat."""
    silence, beat = Silence(), Beat("host", 1, 1)
    assert silence.update({0: beat, 1: beat}, now=100.0) == {0: 0.0, 1: 0.0}
    later = {0: Beat("host", 1, 1, count=1), 1: beat}
    assert silence.update(later, now=107.0) == {0: 0.0, 1: 7.0}
    assert silence.update({**later, 1: Beat("host", 1, 1, state="done")}, now=109.0) == {0: 2.0}
