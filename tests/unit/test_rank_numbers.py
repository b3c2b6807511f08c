"""Numbers of ranks from the environment and the command line: garbage is one sentence and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY, tiny_argv

from titan_distill.launch import Relay, launch
from titan_distill.parallelisms import mesh
from titan_distill.train import main


def run(*command: str, **variables: str) -> tuple[int, str]:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **variables}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("number", ["0", "abc", "-1", "1.5", " 2", "0x2", "9" * 30])
def test_ngpu(number: str) -> None:
    code, shown = run("./run_train.sh", NGPU=number)
    assert code == 2
    assert (
        shown == f"error: NGPU = '{number}' is not a number of processes; set it to a positive integer, or unset it\n"
    )


@pytest.mark.parametrize(("shown_ranks", "said"), [("x", "'x' is not a list"), ("0,2", "names rank 2"), ("0,", "'0,'")])
def test_log_rank(shown_ranks: str, said: str) -> None:
    code, shown = run("./run_train.sh", NGPU="2", LOG_RANK=shown_ranks)
    assert code == 2 and shown.startswith("error: LOG_RANK") and said in shown and shown.count("\n") == 1


@pytest.mark.parametrize("variable", ["RANKS_PER_NODE", "STOP_SECONDS"])
@pytest.mark.parametrize("number", ["0", "abc", "-1"])
def test_numbers_of_the_batch_script(variable: str, number: str) -> None:
    code, shown = run("bash", "scripts/slurm/train.sbatch", "x.toml", **{variable: number})
    assert (code, shown) == (2, f"error: {variable} = '{number}' is not a positive integer; correct or unset it\n")


@pytest.mark.parametrize("number", ["0", "-1", "abc"])
def test_nproc_per_node(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launch(["--nproc-per-node", number, "-m", "titan_distill.train"], Relay())
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: --nproc-per-node") and repr(number) in shown and shown.count("\n") == 1


ENVIRONMENTS = {
    "no number of ranks": ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two'"),
    "no rank at all": ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0', which must be a whole number of at least 1"),
    "a negative rank": ({"RANK": "-1"}, "RANK = '-1'"),
    "a rank beyond the last": ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = 2, but WORLD_SIZE = 2"),
    "a rank without ranks": ({"RANK": "1"}, "RANK = 1, but WORLD_SIZE = 1"),
    "no local rank": ({"LOCAL_RANK": "x"}, "LOCAL_RANK = 'x'"),
    "no local ranks": ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE = ''"),
    "no place to meet": ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE = 2, but no MASTER_ADDR"),
    "no port": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
        "MASTER_PORT = 'x'",
    ),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment_of_torchrun(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    variables, said = ENVIRONMENTS[name]
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert main(tiny_argv("finetune", tmp_path / "run", "--training.local_batch_size", "1")) == 2
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("error: ") and said in shown and "unset" in shown and "\n" not in shown
    assert not (tmp_path / "run").exists(), "nothing is written before"


def test_numbers_as_torchrun_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("RANK", "10")
    assert mesh.num_ranks() == 16 and not mesh.is_main_process()
    monkeypatch.setenv("RANK", "0")
    assert mesh.is_main_process()
