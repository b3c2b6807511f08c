"""The README's commands are real: configurations load, words parse, files that it names are there.

`tests/integration/test_readme_in_order.py` runs them.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from noted_calls import note_calls
from readme import COMMANDS, INSTALLATION, PLACEHOLDERS, SMALL, TEXT, small
from runs import REPOSITORY

from titan_distill import cli
from titan_distill.config.degrees import resolve_layout
from titan_distill.config.loading import load_config

TRAINING = [command for command in COMMANDS if "run_train.sh" in command]
TOOLS = [command for command in COMMANDS if "titan-distill" in command]


def words(command: str) -> tuple[int, list[str]]:
    """The number of ranks and the arguments."""
    *environment, arguments = re.split(r"(?:\./run_train\.sh|titan-distill)", command, maxsplit=1)
    ranks = re.search(r"NGPU=(\d+)", environment[0])
    return int(ranks[1]) if ranks else 1, shlex.split(arguments)


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_there_is_no_other_command() -> None:
    assert len(TRAINING) >= 14 and len(TOOLS) >= 12
    others = set(COMMANDS) - {*TRAINING, *TOOLS}
    assert all(command.startswith(INSTALLATION) for command in others) and len(others) == 1


@pytest.mark.parametrize("command", [form for command in TRAINING for form in (command, small(command))])
def test_training_command(command: str) -> None:
    ranks, arguments = words(command)
    if "--job.config_file" not in arguments:
        arguments = ["--job.config_file", "train_configs/tiny_wan_dmd2.toml", *arguments]
    resolve_layout(load_config(arguments), ranks)


@pytest.mark.parametrize("command", [form for command in TOOLS for form in dict.fromkeys((command, small(command)))])
def test_tool_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word is parsed to its type, by the real command line in front of functions that only note their call."""
    called = note_calls(monkeypatch)
    cli.main(words(command)[1])
    assert len(called) == 1


def test_capitals_stand_for_what_readers_bring() -> None:
    text = "\n".join(re.sub(r'"[^"]*"', "", command) for command in COMMANDS)
    assert set(re.findall(r"\b[A-Z]{3,}\b", text.replace("NGPU", ""))) == {*PLACEHOLDERS}
    assert f"{PLACEHOLDERS[0]} and {PLACEHOLDERS[1]} stand for folders of your own" in TEXT


def test_every_appended_option_has_commands() -> None:
    assert all(any(part in command for command in COMMANDS) for part in SMALL)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:titan_distill|kernels|docs|train_configs|scripts)/[\w/.-]*)`", TEXT)))
)
def test_named_file_is_there(path: str) -> None:
    assert (REPOSITORY / Path(path)).exists()
