"""The part that runs pytest on `tests/gpu`: eight processes, bf16 first."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_suite.worker import Cases, Context, Row, die_with_parent

REPOSITORY = Path(__file__).parents[2]
PROCESSES = 8
SECONDS_TO_REPORT = 12
SECONDS_PER_TEST = 45
MOST_TEXT = 3000
REHEARSED = "tests/unit/test_tile_layout.py"


def gpu_tests(context: Context) -> Cases:
    """One case: pytest, with a row for its totals and one for every test that failed."""
    return {"pytest": lambda: run(context)}


def command(context: Context, report: Path) -> list[str]:
    """Return pytest's command line; it needs pytest-xdist. Other options of pyproject.toml are left out."""
    chosen = [REHEARSED] if context.rehearse else ["-m", "gpu", "tests/gpu"]
    processes = ["-n", str(2 if context.rehearse else PROCESSES), "--dist", "load"]
    # By thread: a kernel that hangs sits in a C call, where no signal reaches Python. xdist replaces the lost process.
    timeout = ["-o", f"timeout={SECONDS_PER_TEST}", "-o", "timeout_method=thread"]
    return [
        *(sys.executable, "-m", "pytest", "-v", "-o", "addopts=-ra", "-p", "no:cacheprovider"),
        *(*processes, *timeout, f"--junitxml={report}", *chosen),
    ]


def run(context: Context) -> Iterator[Row]:
    """Runs pytest for as long as the part has, and reads its report."""
    report = context.out / "junit.xml"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    tests = subprocess.Popen(command(context, report), cwd=REPOSITORY, env=environment, preexec_fn=die_with_parent)
    try:
        code: int | None = tests.wait(context.seconds - SECONDS_TO_REPORT)
    except subprocess.TimeoutExpired:
        # pytest writes its report when it is interrupted.
        tests.send_signal(2)
        code = None
        try:
            tests.wait(SECONDS_TO_REPORT / 2)
        except subprocess.TimeoutExpired:
            tests.kill()
    yield from rows(report, code)


def rows(report: Path, code: int | None) -> Iterator[Row]:
    """Yield what a JUnit report says: a row per failed test, then the totals.

    `code` is pytest's exit code; None when it was out of time.
    """
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    outcomes = {case: [child for child in case if child.tag in ("failure", "error", "skipped")] for case in cases}
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case, outcome in outcomes.items():
        kind = "passed" if not outcome else "skipped" if outcome[0].tag == "skipped" else "failed"
        counts[kind] += 1
        if kind == "failed":
            text = f"{outcome[0].get('message', '')}\n{outcome[0].text or ''}"
            test = f"{case.get('classname')}::{case.get('name')}"
            yield {"test": test, "failure": "test failed", "text": text[:MOST_TEXT]}
    totals: Row = {**counts, "exit_code": code}
    if code is None:
        totals |= {"failure": "out of time", "text": "tests that ran until then are in junit.xml, if pytest wrote it"}
    elif code != 0 and not counts["failed"]:
        totals |= {"failure": "error", "text": f"pytest ended with {code}; its output is in logs.tar.gz"}
    yield totals
