"""The structure of the code: who may import whom, how large files are, and which words stay in their room."""

from __future__ import annotations

import ast
import graphlib
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from titan_distill import registry
from titan_distill.models.wan.pipeline_config import WanPipelineConfig

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "titan_distill"
FILES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
WAN = "titan_distill.models.wan"


def imports_of(module: str) -> Iterator[str]:
    """Modules of titan_distill that a file imports anywhere, also inside functions and for type checkers."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "titan_distill":
            assert node.level == 0
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in FILES else node.module


IMPORTS = {module: sorted({*imports_of(module)} - {module, "titan_distill"}) for module in FILES}


def room(module: str) -> str:
    """The folder, or the loose file, below titan_distill."""
    return module.split(".")[1] if "." in module else ""


def tiers() -> dict[str, int]:
    """Room -> its line in the order that CONTRIBUTING.md states, counted from the top."""
    block = re.search(r"```text\n(cli, launch\n.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.S)
    assert block is not None
    return {name: tier for tier, line in enumerate(block[1].splitlines()) for name in line.split(", ")}


def climbs(imports: dict[str, list[str]]) -> list[str]:
    """Imports that do not lead downward."""
    tier = tiers()
    return [
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in others
        if room(module) != room(other) and tier[room(module)] >= tier[room(other)]
    ]


def test_every_room_has_a_tier() -> None:
    assert {room(module) for module in FILES} - {""} == set(tiers())


def test_imports_lead_downward() -> None:
    assert not climbs(IMPORTS)


def test_climbs_are_found() -> None:
    assert climbs({"titan_distill.roles": ["titan_distill.checkpoint.manager"]})
    assert climbs({"titan_distill.methods.base": ["titan_distill.validation.video"]})


def test_no_circle_between_files() -> None:
    graphlib.TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the files
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({**IMPORTS, "titan_distill.registry": ["titan_distill.train"]}).prepare()


def test_only_the_registry_imports_by_name() -> None:
    words = ("import_module", "__import__")
    found = [module for module in FILES for name in identifiers(module) if name in words]
    assert set(found) == {"titan_distill.registry"}


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("kernels/titan_kernels", ()), ("examples/tiny_world", ("titan_distill.registry",))],
)
def test_packages_beside_ours(package: str, allowed: tuple[str, ...]) -> None:
    for path in (REPOSITORY / package).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ours = [name for name in names if name.startswith("titan_distill")]
            assert set(ours) <= set(allowed), path


def test_few_loose_files() -> None:
    loose = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert len(loose) <= 8, loose


def test_files_are_short_and_folders_flat() -> None:
    for folder in ("titan_distill", "kernels", "examples", "scripts", "benchmarks"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 500, path
            assert len(path.relative_to(REPOSITORY).parts) <= 4, path


def identifiers(module: str) -> set[str]:
    """Names in a file's code: no comments, no strings."""
    tokens = tokenize.generate_tokens(io.StringIO(FILES[module].read_text()).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


def strings(module: str) -> Iterator[str]:
    """String literals of a file but docstrings."""
    tree = ast.parse(FILES[module].read_text())
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


COMMON = {"height", "width", "path", "num_frames", "flow_shift"}
"""Fields of the Wan family's [pipeline_config] that are the field's common words: of videos and of noise schedules."""

WAN_EXCEPTIONS = {
    ("titan_distill.config.sections", "wan"),  # the default of recipe.family
    # Options of a command that scripts use. The command hands them to [pipeline_config] by name.
    ("titan_distill.commands.generate", "cache_window_frames"),
    ("titan_distill.commands.generate", "sink_frames"),
}
"""(module, word) that may name the Wan family outside its folder."""


def wan_words() -> set[str]:
    """Names of the family that nobody else needs: its classes and constants, its files, its configuration fields."""
    words = {field.name for field in fields(WanPipelineConfig)} - COMMON
    for module in FILES:
        if module.startswith(f"{WAN}."):
            for node in ast.parse(FILES[module].read_text()).body:
                if isinstance(node, ast.ClassDef):
                    words.add(node.name)
                elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    words.add(node.targets[0].id)
    return {word for word in words if not word.startswith("_")}


def test_no_word_of_the_wan_family_elsewhere() -> None:
    words = {word for word in wan_words() if word.isupper() or not word.islower() or "_" in word}
    found = set()
    for module in FILES:
        if module.startswith(WAN):
            continue
        defined = {
            node.name if isinstance(node, ast.ClassDef) else getattr(getattr(node, "targets", [None])[0], "id", "")
            for node in ast.parse(FILES[module].read_text()).body
        }
        imported = {
            alias.name
            for node in ast.walk(ast.parse(FILES[module].read_text()))
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(WAN)
            for alias in node.names
        }
        names = identifiers(module) - defined - imported
        found |= {(module, name) for name in names if name in words or re.search(r"(^|_)wan(_|$)|Wan(?!db)", name)}
        found |= {
            (module, text)
            for text in strings(module)
            if text in words or re.search(r"(?i)\bwan\b|pipeline_config\.\w", text)
        }
        found |= {(module, name) for name in IMPORTS[module] if name.startswith(WAN)}
    assert not found - WAN_EXCEPTIONS


def test_no_method_word_in_models() -> None:
    words = {*registry.names(registry.METHODS), "teacher", "student", "critic", "discriminator", "fake_score"}
    for module in FILES:
        if room(module) == "models":
            parts = {part.lower() for name in identifiers(module) for part in (name, *name.split("_"))}
            text = " ".join(strings(module)).lower()
            assert not {word for word in words if word in parts or re.search(rf"\b{word}\b", text)}, module
