"""Every module of every package can be imported. A failure names the module that a library's version breaks."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest
import tiny_world
import titan_kernels
from runs import REPOSITORY

import benchmarks
import titan_distill

PACKAGES = (titan_distill, titan_kernels, tiny_world, benchmarks)
MODULES = [
    module.name
    for package in PACKAGES
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith(".__main__")  # which is to be run
]


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name: str) -> None:
    importlib.import_module(name)


def test_every_file_is_a_module_of_the_list() -> None:
    """A folder without an `__init__.py` would be passed over."""
    folders = (folder for package in PACKAGES for folder in package.__path__)
    files = [(Path(folder), path) for folder in folders for path in Path(folder).rglob("*.py")]
    found = {".".join(path.relative_to(folder.parent).with_suffix("").parts) for folder, path in files}
    assert {name for name in found if not name.endswith(("__init__", "__main__"))} <= set(MODULES)


def test_helpers_of_tests_stand_in_one_folder() -> None:
    files = {path.relative_to(REPOSITORY / "tests") for path in (REPOSITORY / "tests").rglob("*.py")}
    strays = {path for path in files if not path.name.startswith("test_") and path.parts[0] != "helpers"}
    assert strays == {Path("conftest.py")}
