"""The GPU suite rehearsed on a CPU, with parts planted that crash, hang and run out of memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import titan_kernels
from runs import REPOSITORY

from benchmarks.gpu_suite.__main__ import FILES
from benchmarks.gpu_suite.plan import PARTS

PROGRAM = """
import sys
from pathlib import Path
from benchmarks.gpu_suite.__main__ import run_suite
from dataclasses import replace
from benchmarks.gpu_suite.plan import PARTS, Part

def planted(name):
    return Part(name, f"planted_parts:{name}", 1, 90, 1 if name == "hang" else 60, process="planted")

PLANTED = [planted(name) for name in sys.argv[2:]]
sys.exit(run_suite({parts}, Path(sys.argv[1]), {budget}, rehearse=True))
"""
BREAKING = {"crash": "crashed", "hang": "out of time", "out_of_memory": "out of memory"}


def start(out: Path, *names: str, parts: str = "PLANTED", budget: float = 540) -> subprocess.Popen:
    """A suite of planted parts, where `parts` says how they lie among the real ones."""
    program = PROGRAM.replace("{parts}", parts).replace("{budget}", str(budget))
    return subprocess.Popen(
        [sys.executable, "-c", program, str(out), *names], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def read_rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[Path, int]:
    """All real parts and three that break, one after the first real part and two at the end."""
    out = tmp_path_factory.mktemp("suite")
    suite = start(out, *BREAKING, parts="[PARTS[0], PLANTED[0], *PARTS[1:], *PLANTED[1:]]")
    output, _ = suite.communicate(timeout=500)
    assert suite.returncode in (0, 1), output
    return out, suite.returncode


def test_the_rehearsal_runs_every_part_and_only_what_was_planted_fails(rehearsed):
    out, code = rehearsed
    rows = read_rows(out)
    failed = [(row["part"], row["case"], row["failure"]) for row in rows if "failure" in row]
    assert failed == [(name, "broken", kind) for name, kind in BREAKING.items()]
    assert code == 1
    over = [row["part"] for row in rows if row["case"] == "part"]
    assert over == [PARTS[0].name, "crash", *(part.name for part in PARTS[1:]), "hang", "out_of_memory"]
    assert {row["card"] for row in rows} == {"CPU (rehearsal)"}


def test_whatever_broke_in_the_middle_the_cases_around_it_are_there(rehearsed):
    rows = read_rows(rehearsed[0])
    for name in BREAKING:
        values = [row["value"] for row in rows if row["part"] == name and "value" in row]
        assert values == [1, "half", 2], name


def test_each_kind_of_part_has_measured_something(rehearsed):
    rows = read_rows(rehearsed[0])

    def of(part: str, key: str) -> list:
        return [row[key] for row in rows if row["part"].startswith(part) and key in row]

    assert of("card", "right") == [True] and of("card", "tflops")[0] > 0 and of("card", "tb_per_second")[0] > 0
    assert all(of("smoke", "right")) and len(of("smoke", "right")) >= 5
    assert len(of("attention 75,600", "forward_ms")) == 2 + 2 * 2 * 2
    assert of("attention 75,600", "sorting_ms")[0] > 0
    rates = [row for row in rows if row["part"].startswith("attention") and row.get("sparsity") and "forward_ms" in row]
    assert rates and all(row["forward_tensor_tflops"] >= row["forward_tflops"] > 0 for row in rates)
    derivative = next(row for row in rows if row["case"].endswith(": jvp"))
    assert hasattr(titan_kernels, "attention_jvp") == ("forward_ms" in derivative) != ("unavailable" in derivative)
    assert set(of("finetune", "host_waits")) == {"in _sum_over_ranks only"}
    assert of("finetune", "seconds_per_step")[0] > 0 and len(of("finetune", "rank")) == 30
    assert of("GPU tests", "passed")[0] > 0
    assert {"critic", "student"} <= set(of("DMD2", "update"))
    assert of("training", "save_seconds") and of("training", "load_seconds")


def test_the_folder_holds_five_files_and_the_summary_names_what_broke(rehearsed):
    out, _ = rehearsed
    assert sorted(file.name for file in out.iterdir()) == sorted(FILES)
    assert set(FILES) == {"rows.jsonl", "summary.md", "junit.xml", "profile.json.gz", "logs.tar.gz"}
    text = (out / "summary.md").read_text()
    assert "## Failures: 3" in text
    assert all(f"**{name}: broken**: {kind}" in text for name, kind in BREAKING.items())
    assert "killed by SIGSEGV" in text and "_wait_for_ever" in text  # where it crashed, where it hung
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert {"kernels-0.log", "planted-0.log", "planted-1.log"} <= set(logs.getnames())


def test_a_part_that_cannot_be_imported_costs_only_itself(tmp_path):
    suite = start(tmp_path, "unimportable", "fine")
    suite.communicate(timeout=60)
    rows = read_rows(tmp_path)
    assert [(row["case"], row["failure"]) for row in rows if "failure" in row] == [("start", "error")]
    assert [row["value"] for row in rows if "value" in row] == [1, 2] and suite.returncode == 1


def test_a_spent_budget_names_what_it_did_not_reach(tmp_path):
    suite = start(tmp_path, "hang", "fine", budget=11)
    suite.communicate(timeout=60)
    rows = read_rows(tmp_path)
    assert [(row["part"], row["case"]) for row in rows if row.get("failure") == "not reached"] == [
        ("hang", "after"), ("fine", "part"),
    ]  # fmt: skip
    assert "not reached: fine: part" in (tmp_path / "summary.md").read_text()
    assert suite.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_loses_no_row(tmp_path, number):
    suite = start(tmp_path, "fine", "hang", parts="[PLANTED[0], replace(PLANTED[1], limit_s=300, case_limit_s=300)]")
    rows = tmp_path / "rows.jsonl"
    deadline = time.monotonic() + 60
    while "half" not in (rows.read_text() if rows.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = children_of(suite.pid)
    suite.send_signal(number)
    suite.communicate(timeout=30)
    assert [row["value"] for row in read_rows(tmp_path) if "value" in row] == [1, 2, 1, "half"]
    text = (tmp_path / "summary.md").read_text()
    if number == signal.SIGTERM:
        assert suite.returncode == 128 + number and "stopped by SIGTERM" in text
    else:
        assert suite.returncode == -number and "## fine" in text  # as it stood after the last part
    # A worker whose supervisor is gone must not keep the GPU.
    deadline = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers and not any(map(is_alive, workers))


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z" and os.getpgid(pid) > 0
