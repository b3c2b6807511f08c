"""A GPU machine without a package registry: which packages it lacks, and what runs without them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compiled_cache, fetch_wheels
from benchmarks.fetch_wheels import requirements

REPOSITORY = Path(__file__).parents[2]
LEFT_OUT = {"av", "wandb", "transformer_engine", "mypy", "ruff"}
CARRIED = {line.split("==")[0].replace("-", "_") for line in requirements()}

WITHOUT = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *others):
        return None if name.split(".")[0] in missing else self.finder.find_spec(name, *others)
missing = set(sys.argv.pop(1).split(","))
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
"""Start of a program for which the packages named by its first argument are not installed."""


def run_without(missing: set[str], program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT + program, ",".join(sorted(missing)), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("modules", "missing"),
    [
        ("benchmarks.throughput, titan_distill.train", CARRIED - {"torchdata"}),
        ("benchmarks.attention, titan_kernels.triton_kernels", CARRIED | {"titan_distill", "pyarrow", "safetensors"}),
    ],
)
def test_entry_points_need_none_of_what_the_machine_lacks(modules: str, missing: set[str]) -> None:
    finished = run_without(missing | LEFT_OUT, f"import {modules}")
    assert finished.returncode == 0, finished.stderr


def test_the_wheels_are_pinned_as_the_tests_ran_with_them() -> None:
    pinned = {line.split(" ;")[0].strip() for line in (REPOSITORY / "constraints.txt").read_text().splitlines()}
    assert set(requirements()) <= pinned


def test_wheels_go_into_an_empty_folder_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "torch.whl").touch()
    with pytest.raises(SystemExit) as stopped:
        fetch_wheels.main([str(tmp_path)])
    assert stopped.value.code == 2 and "is not empty; name a new folder" in capsys.readouterr().err


def test_only_a_folder_that_was_made_is_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        compiled_cache.main(["pack", str(tmp_path), str(tmp_path / "packed")])
    assert stopped.value.code == 2 and "run `python -m benchmarks.compiled_cache make" in capsys.readouterr().err
