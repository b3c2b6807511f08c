"""The registry: from names in a TOML (`recipe.method`, `recipe.family`, `validation.scorer`) to classes.

A method is one file in `titan_distill/methods/`, a family one folder in `titan_distill/models/` with a `plugin.py`. The
first lookup of an unknown name imports them, so a new one needs no entry in a list. Classes elsewhere (a user's method,
the scorer of `tiny_world`) register when `job.imports` names their module. The registry knows names and modules only.
`methods.base.method_class` and `models.base.model_family` return typed classes.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import pkgutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)

SHIPPED = ("titan_distill", "titan_kernels", "tiny_world")
"""Packages that are installed with this one."""
MOVED = {
    "titan_distill.dispatch": "titan_distill.registry",
    "titan_distill.exit_codes": "titan_distill.fault_tolerance.exit_codes",
    "titan_distill.keyed": "titan_distill.diffusion.noise",
    "titan_distill.transfer": "titan_distill.diffusion.transfer",
    "titan_distill.config_data": "titan_distill.config.sections",
    "titan_distill.config_lora": "titan_distill.config.role_sections",
    "titan_distill.config_parsing": "titan_distill.config.parsing",
    "titan_distill.config_sections": "titan_distill.config.sections",
    "titan_distill.config_text": "titan_distill.config.text",
    "titan_distill.config_world": "titan_distill.config.degrees",
    "titan_distill.parallelisms.degrees": "titan_distill.config.degrees",
    "titan_distill.data.synthetic": "tiny_world.shapes",
    "titan_distill.validation.base": "titan_distill.validation.sampling",
    "titan_distill.validation.shapes": "tiny_world.reader",
    "HEAD_FLAVOR": "titan_distill.config.role_sections",
    "LoraConfig": "titan_distill.config.role_sections",
    "OptimizerConfig": "titan_distill.config.role_sections",
    "ParallelismConfig": "titan_distill.config.role_sections",
    "RoleConfig": "titan_distill.config.role_sections",
    "SCORERS": "titan_distill.registry",
    "SampleRequest": "titan_distill.diffusion.requests",
    "TrajectoryRequest": "titan_distill.diffusion.requests",
    "ValidationRequest": "titan_distill.diffusion.requests",
    "Validator": "titan_distill.validation.validator",
    "copy_full_tensor": "titan_distill.parallelisms.shards",
    "read_mp4": "titan_distill.data.footage",
}
"""Modules and names that moved in version 0.2, with the module that has them now."""


@dataclass(frozen=True)
class Table:
    """The entries that one key of the configuration can name."""

    key: str
    package: str
    entries: dict[str, Any] = field(default_factory=dict)


METHODS = Table("recipe.method", "titan_distill.methods")
FAMILIES = Table("recipe.family", "titan_distill.models")
SCORERS = Table("validation.scorer", "titan_distill.validation")
PROMPT_CHECKS: dict[str, Callable[[str], object]] = {}
"""Check of a prompt by the name of the scorer that asks for it."""


class MethodClass(Protocol):
    """The part of a training method that loading a configuration needs."""

    config_class: ClassVar[type]

    @classmethod
    def validate(cls, config: Any) -> None: ...


class FamilyClass(Protocol):
    """The part of a model family that loading a configuration needs."""

    pipeline_config_class: ClassVar[type]

    @classmethod
    def validate(cls, config: Any) -> None: ...


def register_method(name: str) -> Callable[[T], T]:
    """Class decorator that registers a TrainingMethod as `recipe.method = name`."""
    return _register(METHODS, name)


def register_model(name: str) -> Callable[[T], T]:
    """Class decorator that registers a ModelFamily as `recipe.family = name`."""
    return _register(FAMILIES, name)


def register_scorer(name: str, check_prompt: Callable[[str], object] | None = None) -> Callable[[T], T]:
    """Decorator that registers a function (video uint8 [T, H, W, 3], prompt) -> scores by name as
    `validation.scorer = name`. `check_prompt` raises ValueError for a prompt that the scorer cannot rate."""
    if check_prompt is not None:
        PROMPT_CHECKS[name] = check_prompt
    return _register(SCORERS, name)


def names(table: Table) -> list[str]:
    """All names of the package and those registered from elsewhere so far, sorted."""
    for info in pkgutil.iter_modules(importlib.import_module(table.package).__path__, f"{table.package}."):
        module = f"{info.name}.plugin" if info.ispkg else info.name
        if importlib.util.find_spec(module) is not None:  # a folder without a plugin registers nothing
            importlib.import_module(module)
    return sorted(table.entries)


def lookup(table: Table, name: str) -> Any:
    """Returns the entry of `name`. Raises ValueError with the known names and the nearest one."""
    known = [name] if name in table.entries else names(table)
    if name in table.entries:
        return table.entries[name]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"{table.key} = {name!r} is not known; it must be one of {', '.join(known)}{hint}")


def import_user_modules(modules: Sequence[str]) -> None:
    """Imports the modules of `job.imports`, which register their classes. Raises ValueError for a module that does not
    exist, and for a module that imports a name from where it was before version 0.2."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name in MOVED:
                raise _moved(module, error.name) from error
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module exists; what it imports does not
            raise ValueError(f"job.imports names {module!r}, which is not found on PYTHONPATH") from error
        except ImportError as error:
            name = next((name for name in MOVED if f"import name {name!r} from 'titan_distill" in str(error)), None)
            if name is None:
                raise
            raise _moved(module, name) from error


def import_trusted_modules(
    modules: Sequence[str], needed: Sequence[tuple[Table, str]], trusted: Collection[str]
) -> None:
    """Imports modules of a `job.imports` that somebody else may have written. Importing a module runs its code.

    Args:
        modules: the modules. Those that are installed with this package, and those in `trusted`, are imported.
        needed: the names that must be known afterwards, each with its table.
        trusted: names of modules to trust, each one of `modules`.

    Raises:
        ValueError: a needed name of which only a module that is not trusted may know, and the errors of
            `import_user_modules`. No module that is not trusted has been imported then.
    """
    if unknown := sorted(set(trusted) - set(modules)):
        listed = f"which names {', '.join(modules)}" if modules else "which names none"
        raise ValueError(f"--trust-imports {unknown[0]}: the module is not in job.imports, {listed}; leave it out")
    foreign = [name for name in modules if name.partition(".")[0] not in SHIPPED and name not in trusted]
    import_user_modules([name for name in modules if name not in foreign])
    missing = [f"{table.key} = {name!r}" for table, name in needed if name not in names(table)]
    if missing and foreign:
        raise ValueError(
            f"{missing[0]} is not part of titan_distill, and importing what job.imports names would run code from "
            f"elsewhere; if you trust its author, add --trust-imports {' '.join(foreign)}"
        )
    if foreign:
        logger.warning("Not imported, because nothing here needs it: %s of job.imports", ", ".join(foreign))


def _moved(module: str, name: str) -> ValueError:
    return ValueError(
        f"job.imports names {module!r}, which imports {name}; import it from {MOVED[name]}, where it is since 0.2"
    )


def _register(table: Table, name: str) -> Callable[[T], T]:
    def decorate(entry: T) -> T:
        known = table.entries.get(name, entry)
        assert known.__qualname__ == entry.__qualname__, f"two classes are registered as {name!r}"  # type: ignore[attr-defined]
        table.entries[name] = entry
        return entry

    return decorate
