"""Every module can be imported: one that a version of a library breaks is named."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import titan_kernels

import benchmarks
import titan_distill

MODULES = [
    module.name
    for package in (titan_distill, titan_kernels, benchmarks)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith(".__main__")  # which is to be run
]


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name: str) -> None:
    importlib.import_module(name)


def test_all_packages_were_walked() -> None:
    assert {"titan_distill.models.wan.transformer", "titan_kernels.tuning", "benchmarks.throughput"} <= set(MODULES)
