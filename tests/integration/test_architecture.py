"""docs/architecture.md is true: its map is complete, its files exist, and its walks are what a run does."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import pytest
from runs import REPOSITORY

from titan_distill import train

TEXT = (REPOSITORY / "docs/architecture.md").read_text()
WALKS = {
    block.partition("\n")[0]: re.findall(r"^\d+\. `(\S+\.py)` `([\w.]+)`", block, re.M)
    for block in TEXT.split("\n## ")
    if block.startswith("Walk ")
}
JOB = "tests/assets/version_0_1/job.toml"


def test_the_map_lists_every_folder_and_loose_file() -> None:
    listed = set(re.findall(r"^\| `([^`]+)`", TEXT, re.M))
    package = REPOSITORY / "titan_distill"
    expected = {f"titan_distill/{path.name}/" for path in package.iterdir() if (path / "__init__.py").is_file()}
    expected |= {f"titan_distill/{path.name}" for path in package.glob("*.py") if path.name != "__init__.py"}
    hidden = {"build", "dist", "outputs", "wandb"}
    top = {path.name for path in REPOSITORY.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))}
    for name in sorted(top - {"titan_distill"} - hidden):
        if not name.endswith(".egg-info") and not (REPOSITORY / name / "pyvenv.cfg").is_file():
            assert any(entry.startswith(f"{name}/") for entry in listed), name
    assert {entry for entry in listed if entry.startswith("titan_distill/")} == expected
    assert all((REPOSITORY / entry).exists() for entry in listed)


def test_named_files_exist() -> None:
    for name in re.findall(r"`((?:titan_distill|kernels|examples|tests|train_configs)/[\w./]+\.(?:py|toml))`", TEXT):
        assert (REPOSITORY / name).is_file(), name


def test_walks_are_short() -> None:
    assert [len(walk) for walk in WALKS.values()] == [8, 10, 10]


def code_of(file: str, name: str) -> CodeType:
    """The code object of a function, by its file and its name within it."""
    found: Any = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)
    return inspect.unwrap(found).__code__


def trace(run: Callable[[], Any]) -> list[tuple[str, str]]:
    """The functions of all walks that `run` calls, in order."""
    wanted = {code_of(*step): step for walk in WALKS.values() for step in walk}
    called: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in wanted:
            called.append(wanted[frame.f_code])

    sys.setprofile(note)
    try:
        assert run() == 0
    finally:
        sys.setprofile(None)
    return called


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, str]]]:
    folder = tmp_path_factory.mktemp("run")
    job = ["--job.config_file", JOB, "--job.output_dir", str(folder / "run"), "--roles.student.optimizer.lr", "1e-4"]
    fresh = trace(lambda: train.main([*job, "--training.steps", "1"]))
    resumed = trace(lambda: train.main([*job, "--training.steps", "2", "--checkpoint.resume_from", "latest"]))
    return {"Walk 1": fresh, "Walk 2": fresh, "Walk 3": [*fresh, *resumed]}


@pytest.mark.parametrize("title", WALKS)
def test_walks_are_what_a_run_does(title: str, traces: dict[str, list[tuple[str, str]]]) -> None:
    """The functions of a walk are called in its order."""
    called = iter(traces[title.partition(":")[0]])
    for step in WALKS[title]:
        assert step in called, f"{step} is not called after the one before it"
