"""Signals in the seconds in which a program imports torch: Ctrl-C is exit code 130 without a traceback, a request to
stop is kept."""

from __future__ import annotations

import os
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

TOY = REPOSITORY / "tests" / "assets" / "toy_finetune.toml"


@contextmanager
def importing(*command: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is loading torch's libraries."""
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **variables}
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    maps = Path(f"/proc/{process.pid}/maps")
    try:
        deadline = time.monotonic() + 60
        while "libtorch" not in maps.read_text():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.005)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "command",
    [
        (sys.executable, "-m", "titan_distill.train", "--job.config_file", str(TOY)),
        ("./run_train.sh", "--job.config_file", str(TOY)),
        (sys.executable, "-m", "titan_distill.cli", "plan", str(TOY)),
        (sys.executable, "-m", "titan_distill.launch", "--nproc-per-node", "2", "-m", "titan_distill.train"),
    ],
    ids=["train", "run_train.sh", "cli", "launch"],
)
def test_ctrl_c_is_130_without_a_traceback(command: tuple[str, ...]) -> None:
    with importing(*command, NGPU="1") as process:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "interrupted before any work was done\n")


def test_the_installed_command_listens_as_well() -> None:
    """It imports `titan_distill.cli` under its own name."""
    code = f"import sys; sys.argv[0] = {sys.prefix + '/bin/titan-distill'!r}; import titan_distill.cli"
    with importing(sys.executable, "-c", code) as process:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "interrupted before any work was done\n")


def test_ctrl_c_in_a_command_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from titan_distill import cli

    monkeypatch.setattr("titan_distill.data.summary.inspect", lambda path: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "inspect", "--path", "x"])
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_stop_listens_to_what_came_before_it() -> None:
    code = (
        "import os, signal; from titan_distill.fault_tolerance.signals import Stop, listen_early; import sys;"
        "assert 'torch' not in sys.modules; listen_early(); os.kill(os.getpid(), signal.SIGTERM);"
        "stop = Stop(); assert not stop.is_signalled; stop.__enter__(); assert stop.is_signalled"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60, check=False).returncode == 0


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=str)
@pytest.mark.parametrize("num_ranks", ["1", "2"])
def test_a_stop_during_imports_is_a_stop_before_step_1(number: signal.Signals, num_ranks: str, tmp_path: Path) -> None:
    data = toy_family.write_data(tmp_path / "toy.parquet")
    arguments = ("--job.config_file", str(TOY), "--data.path", str(data), "--job.output_dir", str(tmp_path / "run"))
    layout = ("--training.steps", "1000000", "--training.local_batch_size", "4")
    program = ("-m", "titan_distill.train", *arguments, *layout)
    if num_ranks == "2":
        program = ("-m", "titan_distill.launch", "--standalone", "--nproc-per-node", "2", *program)
    python_path = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])
    with importing(sys.executable, *program, PYTHONPATH=python_path) as process:
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "stopped as asked before" in output and "Traceback" not in output
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or read_metrics(tmp_path / "run") == []


LAUNCHER = """
import os, signal, subprocess, sys
from titan_distill.launch import Relay

relay = Relay()
if sys.argv[1] == "early":
    os.kill(os.getpid(), signal.SIGUSR1)
worker = subprocess.Popen([sys.executable, "-c", '''
import os, signal, time
time.sleep(1.2)
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
time.sleep(60)
'''])
if sys.argv[1] == "late":
    os.kill(os.getpid(), signal.SIGUSR1)
print(worker.wait(), relay.exit_code({worker.returncode}))
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_launcher_keeps_a_signal_until_its_workers_listen(when: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, when], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "75 75\n"


def test_a_launcher_that_has_ended_keeps_its_exit_code() -> None:
    """Python drops handlers before it ends, and then signals kill."""
    code = (
        "import atexit, os, signal, sys; from titan_distill import launch;"
        "launch.launch = lambda argv, relay: 75;"
        "os.kill(os.getpid(), signal.SIGUSR1) if '--before' in sys.argv else None;"
        "number = launch.main();"
        "[os.kill(os.getpid(), number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGALRM)];"
        "sys.exit(number)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60, check=False)
    assert done.returncode == 75


@pytest.mark.nightly
def test_a_stop_before_the_first_node_is_there_prints_no_stack() -> None:
    """The second node's launcher waits for the first one's. torch's own wait would answer each signal with a C++
    stack."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    program = ["--no-python", "sleep", "0"]
    with importing(sys.executable, "-m", "titan_distill.launch", "--node-rank", "1", *nodes, *program) as second:
        for _ in range(5):
            time.sleep(1)  # the first node's launcher is late
            second.send_signal(signal.SIGUSR1)
        first = [sys.executable, "-m", "titan_distill.launch", "--node-rank", "0", *nodes, *program]
        assert subprocess.run(first, cwd=REPOSITORY, timeout=120, check=False).returncode == 0
        output, _ = second.communicate(timeout=120)
    assert "frame #" not in output and "Traceback" not in output, output
