"""The README's commands are real: configurations load, subcommands and options exist, files that it names are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from runs import REPOSITORY

from titan_distill import cli
from titan_distill.config.degrees import resolve_layout
from titan_distill.config.loading import load_config

README = (REPOSITORY / "README.md").read_text()
LINES = [line.split("  #")[0] for block in re.findall(r"```\n(.*?)```", README, re.S) for line in block.splitlines()]
TRAINING = [line for line in LINES if "run_train.sh" in line]
TOOLS = [line for line in LINES if "titan-distill" in line]


def words(line: str) -> tuple[int, list[str]]:
    """The number of ranks and the arguments."""
    *environment, command = re.split(r"(?:\./run_train\.sh|titan-distill)", line, maxsplit=1)
    ranks = re.search(r"NGPU=(\d+)", environment[0])
    return int(ranks[1]) if ranks else 1, shlex.split(command, comments=True)


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_there_are_commands() -> None:
    assert len(TRAINING) >= 6 and len(TOOLS) >= 8


@pytest.mark.parametrize("line", TRAINING)
def test_training_command(line: str) -> None:
    ranks, arguments = words(line)
    if "--job.config_file" not in arguments:
        arguments = ["--job.config_file", "train_configs/tiny_wan_dmd2.toml", *arguments]
    resolve_layout(load_config(arguments), ranks)


@pytest.mark.parametrize("line", TOOLS)
def test_tool_command(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, arguments = words(line)
    first = next(i for i, word in enumerate(arguments) if word not in cli.COMMANDS and not _is_inner(arguments, i))
    with pytest.raises(SystemExit) as leaving:
        cli.main([*arguments[:first], "--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in arguments[first:] if word.startswith("--"))


def _is_inner(arguments: list[str], index: int) -> bool:
    outer = cli.COMMANDS.get(arguments[0])
    return index == 1 and isinstance(outer, dict) and arguments[1] in outer


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:titan_distill|kernels|docs|train_configs|scripts)/[\w/.-]*)`", README)))
)
def test_named_file_is_there(path: str) -> None:
    assert (REPOSITORY / Path(path)).exists()
