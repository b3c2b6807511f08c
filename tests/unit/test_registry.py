"""Names in a TOML, and names that user modules import: found, or answered in one sentence that says where they are."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY, tiny_argv

from titan_distill import registry
from titan_distill.config import ConfigError, load_config

MODULES = [name for name in registry.MOVED if "." in name]
NAMES = [name for name in registry.MOVED if "." not in name]
PUBLIC = """
from titan_distill.config import Config, ConfigError, load_config
from titan_distill.registry import register_method, register_model, register_scorer
from titan_distill.methods.base import LossResult, Passes, TrainingMethod, Update
from titan_distill.models.base import Adapter, Condition, Guidance, ModelFamily
"""
"""What a user's method or family imports."""


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend(tmp_path)


def answer(code: str, folder: Path) -> str:
    """The one sentence about a user's module with this code."""
    module = f"user_module_{abs(hash(code))}"
    (folder / f"{module}.py").write_text(code)
    with pytest.raises(ConfigError) as caught:
        load_config(tiny_argv("dmd2", folder / "run", "--job.imports", module))
    assert module in str(caught.value)
    return str(caught.value)


def test_public_names_stay(tmp_path: Path) -> None:
    (tmp_path / "public_names.py").write_text(PUBLIC)
    load_config(tiny_argv("dmd2", tmp_path / "run", "--job.imports", "public_names"))


@pytest.mark.parametrize("old", MODULES)
def test_a_moved_module_is_found_by_its_error(old: str, tmp_path: Path) -> None:
    assert importlib.util.find_spec(registry.MOVED[old]), "the table leads nowhere"
    message = answer(f"from {old} import anything\n", tmp_path)
    assert f"imports {old}; import it from {registry.MOVED[old]}, where it is since 0.2" in message


@pytest.mark.parametrize("old", NAMES)
def test_a_moved_name_is_found_by_its_error(old: str, tmp_path: Path) -> None:
    assert hasattr(importlib.import_module(registry.MOVED[old]), old), "the table leads nowhere"
    message = answer(f"from titan_distill.config import {old}\n", tmp_path)
    assert f"imports {old}; import it from {registry.MOVED[old]}" in message


SCORER = """
import sys
from titan_distill.config import load_config
from titan_distill.registry import SCORERS
assert "tiny_world" not in sys.modules
config = load_config(sys.argv[1:])
assert config.validation.scorer == "shapes" and "shapes" in SCORERS.entries
"""


def test_the_scorer_of_drawn_shapes_imports_itself_with_a_notice(tmp_path: Path) -> None:
    """For one release. In a process of its own, in which nothing has imported it."""
    argv = tiny_argv("dmd2", tmp_path, "--validation.scorer", "shapes", "--job.imports=")
    done = subprocess.run([sys.executable, "-c", SCORER, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'job.imports = ["tiny_world"]' in done.stderr


def test_a_named_import_needs_no_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_config(tiny_argv("dmd2", tmp_path, "--validation.scorer", "shapes", "--job.imports", "tiny_world"))
    assert not caplog.records


def test_a_method_is_no_name_of_a_file() -> None:
    known = registry.names(registry.METHODS)
    assert "adversarial" not in known and {"dmd2", "finetune", "self_forcing"} <= set(known)
    assert "head" not in registry.names(registry.FAMILIES)
