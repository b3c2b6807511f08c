"""Names in a TOML become classes here: ``recipe.method`` and ``recipe.family``.

A method is one file in ``titan_distill/methods/``, a family is one folder in ``titan_distill/models/``. The file or
folder is imported when its name is first asked for, so adding one touches no list anywhere. Classes that live outside
this package (a user's own method, the toy family of the tests) register themselves when ``job.imports`` imports their
module.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from titan_distill.methods.base import TrainingMethod
    from titan_distill.models.base import ModelFamily

_METHODS: dict[str, type[TrainingMethod]] = {}
_FAMILIES: dict[str, type[ModelFamily]] = {}
_METHOD_PACKAGE = "titan_distill.methods"
_MODEL_PACKAGE = "titan_distill.models"

T = TypeVar("T", bound=type)


def register_method(name: str) -> Callable[[T], T]:
    """Class decorator: makes a TrainingMethod available as ``recipe.method = name``."""
    return _register(_METHODS, name)


def register_model(name: str) -> Callable[[T], T]:
    """Class decorator: makes a ModelFamily available as ``recipe.family = name``."""
    return _register(_FAMILIES, name)


def method_class(name: str) -> type[TrainingMethod]:
    """The method registered under ``name``. Raises ValueError naming the known methods and the nearest one."""
    return _find(_METHODS, name, _METHOD_PACKAGE, name, "recipe.method")


def model_family(name: str) -> type[ModelFamily]:
    """The model family registered under ``name``. Raises ValueError naming the known families and the nearest one."""
    return _find(_FAMILIES, name, _MODEL_PACKAGE, f"{name}.plugin", "recipe.family")


def known_methods() -> list[str]:
    """Names of all methods in the package and of those registered from elsewhere."""
    return sorted(set(_METHODS) | _submodules(_METHOD_PACKAGE) - {"base", "losses"})


def known_families() -> list[str]:
    """Names of all model families in the package and of those registered from elsewhere."""
    return sorted(set(_FAMILIES) | _submodules(_MODEL_PACKAGE) - {"base"})


def _register(table: dict[str, type], name: str) -> Callable[[T], T]:
    def decorate(cls: T) -> T:
        assert table.get(name, cls).__qualname__ == cls.__qualname__, f"two classes are registered as {name!r}"
        table[name] = cls
        return cls

    return decorate


def _find(table: dict[str, type], name: str, package: str, module: str, key: str) -> type:
    if name not in table and name in _submodules(package):
        importlib.import_module(f"{package}.{module}")
    if name in table:
        return table[name]
    known = known_methods() if table is _METHODS else known_families()
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"{key} = {name!r} is not known; it must be one of {', '.join(known)}{hint}")


def _submodules(package: str) -> set[str]:
    return {info.name for info in pkgutil.iter_modules(importlib.import_module(package).__path__)}
