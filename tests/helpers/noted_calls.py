"""The real command line in front of functions that only note their call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from titan_distill import cli


def note_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the functions of all commands. Returns the names of those that were called since, in order."""
    called: list[str] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(function)(lambda *args, **kwargs: called.append(function.__name__))

    commands = {
        name: {inner: noting(f) for inner, f in entry.items()} if isinstance(entry, dict) else noting(entry)
        for name, entry in cli.COMMANDS.items()
    }
    monkeypatch.setattr(cli, "COMMANDS", commands)
    monkeypatch.setattr(cli.planning, "plan", commands["plan"])
    return called
