"""The command line: its version, and one way of naming paths, beside the earlier one."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import pytest

from titan_distill import cli
from titan_distill.observability.quiet import quiet_libraries


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"titan-distill {importlib.metadata.version('titan_distill')}\n"


def test_help_that_was_asked_for_is_output(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    shown = capsys.readouterr()
    assert (ended.value.code, shown.err) == (0, "") and "checkpoint reshard" in shown.out
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out) == (2, "") and "checkpoint reshard" in shown.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("generate --prompt x --checkpoint c --out o", "generate c --prompt x --out o"),
        ("generate --checkpoint=c --out o", "generate c --out o"),
        ("checkpoint export --out o --checkpoint c --role r", "checkpoint export c --out o --role r"),
        ("data inspect --path d", "data inspect d"),
        ("data preprocess d --path x", "data preprocess d --path x"),
        ("generate c --checkpoint", "generate c --checkpoint"),
        ("", ""),
    ],
)
def test_earlier_names_of_paths_still_work(words: str, expected: str) -> None:
    assert cli._without_earlier_names(words.split()) == expected.split()


def options_of(command: Callable[..., Any]) -> dict[str, bool]:
    """The options of a command by name: whether each is given without it."""
    found = {}
    for name, hint in get_type_hints(command, include_extras=True).items():
        kind = getattr(hint, "__origin__", hint)
        inner = get_type_hints(kind, include_extras=True) if is_dataclass(kind) else {name: hint}
        found |= {option: "Positional" in repr(each) or "POSITIONAL" in repr(each) for option, each in inner.items()}
    return found


def test_every_command_takes_what_it_reads_without_a_name_and_writes_to_out() -> None:
    for name, group in cli.COMMANDS.items():
        for inner, command in group.items() if isinstance(group, dict) else [("", group)]:
            options = options_of(command)
            unnamed = [option for option, is_positional in options.items() if is_positional]
            assert len(unnamed) == (2 if inner == "diff" else 1), (name, inner, options)
            assert not {"path", "checkpoint", "run", "config", "folder"} & options.keys() - set(unnamed), (name, inner)


def test_libraries_are_told_to_report_errors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers sets the level of its loggers at import, after `quiet_libraries`, from the environment."""
    from diffusers.utils import logging

    monkeypatch.delenv("DIFFUSERS_VERBOSITY", raising=False)
    assert logging._get_default_logging_level() == logging.WARNING
    quiet_libraries()
    try:
        assert logging._get_default_logging_level() == logging.ERROR
    finally:
        os.environ.pop("TRANSFORMERS_VERBOSITY", None)
