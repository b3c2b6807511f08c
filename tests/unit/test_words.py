"""Plain English wherever a person reads: docstrings, `--help`, error messages, documents.

The rules are few and mechanical; the rest is for readers. The first sentence of a docstring names the thing by its
noun, so no sentence opens with a question word; units are written with "per"; code stands between single backticks.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SOURCES = [path for folder in ("titan_distill", "kernels", "examples") for path in (REPOSITORY / folder).rglob("*.py")]
DOCUMENTS = [
    path
    for path in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
    if path.name not in {"log.md", "CHANGELOG.md"}
]

UNITS = "steps?|seconds?|minutes?|updates?|samples?|ranks?|tokens?|bytes|rows?|frames?|GiB|FLOPs|forwards?|messages?"
RULES = {
    "double backticks": r"``",
    "a sentence that opens with a question word": r"(?:^|[.!?]\s+)(?:What|How|Which|Of|In which)\b(?![^.]*\?)",
    "'a' for 'per'": rf"(?i)\b(?:{UNITS}) an? (?:{UNITS})\b",
    "a phrase that has to be read twice": r"\b(?:none takes|for ever|besides|dear|for people)\b",
}


def faults(text: str) -> list[str]:
    """The rules that a text breaks, each with the words around the place."""
    text = re.sub(r"\s+", " ", text.strip())
    return [
        f"{name}: …{text[max(0, m.start() - 30) : m.end() + 30]}…"
        for name, rule in RULES.items()
        for m in re.finditer(rule, text)
    ]


def texts(path: Path) -> list[str]:
    """Docstrings of modules, classes, functions and fields, and messages of raised errors."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.append(node.value.value)
        elif isinstance(node, ast.Raise) and node.exc is not None:
            parts = [part.value for part in ast.walk(node.exc) if isinstance(part, ast.Constant)]
            found.append(" ".join(part for part in parts if isinstance(part, str)))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_source(path: Path) -> None:
    assert not [fault for text in texts(path) for fault in faults(text)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_document(path: Path) -> None:
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    assert not [fault for paragraph in prose.split("\n\n") for fault in faults(paragraph)]


@pytest.mark.parametrize(
    "text",
    ["How a run ends.", "It works. What a rank holds.", "Samples a step over all ranks.", "``x``", "kept for ever"],
)
def test_faults_are_found(text: str) -> None:
    assert faults(text)


def test_questions_are_allowed() -> None:
    assert not faults("Two ranks share it. How many seconds per step? The planner says.")
