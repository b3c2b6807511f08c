"""The documents are true: commands parse, configurations load, and keys, options, files, headings, variables and
metrics that they name exist.

`tests/integration/test_documents_in_order.py` runs the commands.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_mutations import KEYS
from documents import (
    COMMANDS,
    DOCS,
    HISTORY,
    IN_ORDER,
    OTHERS,
    PAGES,
    PLACEHOLDERS,
    SMALL,
    TOOLS,
    TRAINING,
    Command,
    blocks,
    commands,
    prose,
    spans,
    words,
)
from noted_calls import note_calls
from runs import REPOSITORY
from toy_run import METHODS, toy_trainer

from titan_distill import cli, registry
from titan_distill.config.config import Config
from titan_distill.config.degrees import resolve_layout
from titan_distill.config.loading import load_config
from titan_distill.config.sections import DataSource
from titan_distill.config.text import field_types
from titan_distill.methods.base import method_class

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESENT = [page for page in PAGES if page not in HISTORY]
LANGUAGES = {"text", "toml", "python", "mermaid", "json"}
SECTIONS = field_types(Config)
ALL_KEYS = {re.sub(r"^roles\.\w+\.", "roles.*.", key) for key in KEYS}
for _method in METHODS:
    ALL_KEYS |= {f"method_config.{name}" for name in field_types(method_class(_method).config_class)}
ALL_KEYS |= {f"data.sources.{name}" for name in field_types(DataSource)}
ALL_KEYS |= {key.rpartition(".")[0] for key in ALL_KEYS} | {*SECTIONS, "roles.*", "job.dry_run"}
SOURCES = "\n".join(
    path.read_text(encoding="utf-8")
    for folder in ("titan_distill", "benchmarks", "scripts", "kernels", "tests/conftest.py")
    for path in ([REPOSITORY / folder] if "." in folder else sorted((REPOSITORY / folder).rglob("*")))
    if path.is_file() and path.suffix in ("", ".py", ".sbatch")
)
PROGRAMS = SOURCES + "".join((REPOSITORY / name).read_text(encoding="utf-8") for name in ("run_train.sh", "Makefile"))


def name(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def forms(commands: list[Command]) -> list[str]:
    """The commands as they are and, if they are run, at small size."""
    small = [command.small for command in commands if command in IN_ORDER]
    return list(dict.fromkeys([*(command.text for command in commands), *small]))


each_page = pytest.mark.parametrize("page", PRESENT, ids=name)


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_there_are_commands() -> None:
    assert len(TRAINING) >= 14 and len(TOOLS) >= 12
    assert all(any(part in command.text for command in COMMANDS) for part in SMALL)


@each_page
def test_languages_of_blocks(page: Path) -> None:
    """A block without one is commands; another language, or a block within a list, would be an unnoticed text."""
    assert not re.search(r"^[ >]+```", page.read_text(encoding="utf-8"), re.M)
    assert {language for language, _ in blocks(page)} <= {"", "bash", "sh", "shell", "console", *LANGUAGES}


@pytest.mark.parametrize("text", forms(TRAINING))
def test_training_command(text: str) -> None:
    ranks, arguments = words(text)
    if "--job.config_file" not in arguments:
        arguments = ["--job.config_file", "train_configs/tiny_wan_dmd2.toml", *arguments]
    resolve_layout(load_config(arguments), ranks)


@pytest.mark.parametrize("text", [command.text for command in OTHERS if "benchmarks.throughput" in command.text])
def test_measured_job_fits_its_ranks(text: str) -> None:
    ranks = re.search(r"--nproc-per-node (\d+)", text)
    after = shlex.split(text.partition("benchmarks.throughput")[2])
    assert after[1] == "--steps", "overrides follow"
    resolve_layout(load_config(["--job.config_file", after[0], *after[3:]]), int(ranks[1]) if ranks else 1)


@pytest.mark.parametrize("text", forms(TOOLS))
def test_tool_command(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word is parsed to its type, by the real command line in front of functions that only note their call."""
    called = note_calls(monkeypatch)
    cli.main(words(text)[1])
    assert len(called) == 1


def missing(command: Command) -> list[str]:
    """What a command that neither trains nor is a tool of ours names, but is not there."""
    parts = [part for part in shlex.split(command.text) if not re.match(r"[A-Z_]+=", part)]
    program = Path(parts[0]).name or parts[0]
    if "-m" in parts[:-1] and program in {"python", "python3", "torchrun"}:
        return missing_module(parts[parts.index("-m") + 1 :], command)
    if program == "pip":
        return missing_extras(command)
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.M)
        return [part for part in parts[1:] if "=" not in part and part not in targets]
    if program == "sbatch":
        after = parts[parts.index("scripts/slurm/train.sbatch") + 1 :]
        load_config(["--job.config_file", after[0], *(part.replace("%a", "0") for part in after[1:])])
        return []
    if program in {"python", "python3"} and parts[1] == "-c":
        compile(parts[2], "-c", "exec")
        return []
    if program in {"pytest", "bash", "python", "python3"} or parts[0].startswith("scripts/"):
        paths = [part.partition("::")[0] for part in parts if "/" in part and not part.startswith("/")]
        return [path for path in paths if not (REPOSITORY / path).exists()]
    return [] if program in KNOWN else [program]


def missing_module(parts: list[str], command: Command) -> list[str]:
    """The module that follows -m, if it is not there, or its options that are not."""
    module = parts[0]
    if module == "pip":
        return missing_extras(command)
    path = REPOSITORY.joinpath(*module.split("."))
    if not (path.is_dir() or path.with_suffix(".py").is_file()):
        return [] if importlib.util.find_spec(module) else [module]
    files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    return [part for part in parts[1:] if part.startswith("--") and not known_option(part, text)]


def missing_extras(command: Command) -> list[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [extra for names in re.findall(r"\[([\w,-]+)\]", command.text) for extra in names.split(",")]
    return [extra for extra in named if extra not in project["optional-dependencies"]]


KNOWN = {"git", "hf", ".", "cd", "touch", "tensorboard", "cp", "mkdir"}
"""Programs of others, whose arguments are theirs."""


def known_option(option: str, text: str) -> bool:
    """Whether a program's text has an option: as it is written, or as a name or key that makes it."""
    word = option.lstrip("-").partition("=")[0]
    if "." in word:
        return as_key(word) in ALL_KEYS
    return f'"--{word}"' in text or re.search(rf"\b{word.replace('-', '_')}\b", text) is not None


def as_key(text: str) -> str:
    """A dotted key with the role's name left out."""
    return re.sub(r"^roles\.(?:\w+|<\w+>|\*)", "roles.*", text)


@pytest.mark.parametrize("command", OTHERS, ids=str)
def test_other_command(command: Command) -> None:
    assert not missing(command)


@pytest.mark.parametrize(
    "text",
    [
        "make nothing", 'pip install -e ".[nothing]"', "pytest tests/unit/test_nothing.py",
        "python -m benchmarks.nothing", "python -m benchmarks.throughput X.toml --nothing 5", "nothing --here",
        "scripts/nothing",
    ],
)  # fmt: skip
def test_a_wrong_command_is_found(text: str) -> None:
    assert missing(Command(DOCS / "index.md", text))


def test_capitals_stand_for_what_readers_bring() -> None:
    for command in commands(DOCS / "tasks.md"):
        text = re.sub(r'"[^"]*"|\b[A-Z_]+=', "", command.text)
        assert set(re.findall(r"\b[A-Z]{3,}\b", text)) <= {*PLACEHOLDERS}
    assert f"{PLACEHOLDERS[0]} and {PLACEHOLDERS[1]} stand for folders of your own" in prose(DOCS / "tasks.md")


def named_keys(page: Path) -> Iterator[str]:
    """Dotted keys and tables of a job that a page names in its text or in a block of TOML."""
    start = "|".join(SECTIONS)
    for span in spans(page):
        for found in re.findall(rf"(?:^|[\s\[(-])((?:{start})\.[\w.<>*-]+)", span):
            key = found.rstrip(".")
            if not re.search(r"\.(?:py|md|toml|json|jsonl|png|mp4|csv)$", key):
                yield key
    for language, content in blocks(page):
        if language == "toml":
            yield from _leaves(tomllib.loads(content))


def _leaves(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for entry in value:
                yield from _leaves(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@each_page
def test_named_keys_exist(page: Path) -> None:
    assert not [key for key in named_keys(page) if as_key(key) not in ALL_KEYS]


def test_a_wrong_key_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`training.steps = 3`, `training.stepz`, `--roles.critic.optimizer.lr 1`\n\n```toml\n[ema]\nx = 1\n```\n"
    )
    assert [key for key in named_keys(page) if as_key(key) not in ALL_KEYS] == ["training.stepz", "ema.x"]


@each_page
def test_named_options_exist(page: Path) -> None:
    """Options of commands, such as `--num-frames`; those with a dot are keys."""
    named = {option for span in spans(page) for option in re.findall(r"(?:^|\s)(--[a-z][a-z-]+)\b(?!\.)", span)}
    assert not [option for option in named if option not in OF_OTHERS and not known_option(option, PROGRAMS)]


OF_OTHERS = {"--export", "--signal", "--nproc-per-node", "--batch", "--local-dir", "--logdir", "--help", "--array"}
"""Options of sbatch, scancel, torchrun, hf and tensorboard."""


@each_page
def test_named_files_exist(page: Path) -> None:
    folders = "titan_distill|kernels|docs|train_configs|scripts|benchmarks|examples|tests"
    files = [f for span in spans(page) for f in re.findall(rf"^((?:{folders})/[\w./-]*)(?:::.*)?$", span)]
    assert not [file for file in files if not (REPOSITORY / file).exists() and "NAME" not in file]


def anchors(page: Path) -> set[str]:
    """Names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = (re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h)).strip().lower() for h in headings)
    return {heading.replace(" ", "-") for heading in plain}


def broken_links(page: Path) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "CHANGELOG.md"], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One, two\n\n[a](#one-two) [b](#three) [c](page.md#one-two) [d](other.md) [e](https://example.org)\n"
    )
    assert broken_links(page) == ["#three", "other.md"]


def test_readme_is_two_screens() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 80


def test_the_planned_figures_are_those_of_the_job() -> None:
    job = (REPOSITORY / "train_configs/wan14b_to_1.3b_8gpu.toml").read_text(encoding="utf-8")
    figures = r"([\d.]+ of [\d.]+) GiB\D+?([\d.]+) s per step"
    [page] = re.findall(figures, prose(DOCS / "start_to_finish.md"))
    [planned] = re.findall(f"Planned: .*?{figures}", job)
    assert page == planned


def test_every_page_is_in_the_index() -> None:
    """A reader on GitHub has no list of contents beside the page. Recipes have a page of their own."""
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert not [page.name for page in DOCS.glob("*.md") if page.name != "index.md" and f"]({page.name})" not in index]


def table_names(page: Path, heading: str) -> list[str]:
    """The code in the first column of the table below a heading."""
    section = page.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [name for row in re.findall(r"^\| (`[^|]*) \|", section, re.M) for name in re.findall(r"`([^`]+)`", row)]


def test_environment_variables_are_those_that_are_read() -> None:
    page = DOCS / "environment_variables.md"
    ours = table_names(page, "Read by this project")
    assert not [variable for variable in ours if not re.search(rf"\b{variable}\b", PROGRAMS)]
    read = set(re.findall(r'environ(?:\.get|\.setdefault)?[(\[]\s*"([A-Z_]+)"', SOURCES_OF_RUNS))
    read |= set(re.findall(r'_from_environment\("([A-Z_]+)"', SOURCES_OF_RUNS))
    headers = "".join(
        (REPOSITORY / script).read_text(encoding="utf-8").split("set -euo")[0]
        for script in ("run_train.sh", "scripts/slurm/train.sbatch", "scripts/environment", "scripts/gpu_versions")
    )
    read |= set(re.findall(r"^# (?:Environment:)? +([A-Z][A-Z0-9_]+)  ", headers, re.M))
    assert not read - {*ours, *table_names(page, "Set by launchers")}


SOURCES_OF_RUNS = "\n".join(
    path.read_text(encoding="utf-8")
    for folder in ("titan_distill", "kernels")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
)


@pytest.mark.parametrize("method", ["dmd2", "adversarial", "scm", "finetune"])
def test_metrics_are_those_of_the_page(method: str, tmp_path: Path) -> None:
    """Whatever a run writes is on the page, where <name> stands for any word."""
    toy_trainer(tmp_path, method, "--training.steps", "2", "--training.max_nonfinite_skips", "1").run()
    listed = table_names(DOCS / "metrics.md", "Every key")
    patterns = [re.compile(re.sub(r"<\w+>", r"[\\w.]+", re.escape(name).replace(r"\<", "<"))) for name in listed]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    keys = {key for line in lines for key in json.loads(line)}
    assert {"loss/student", "step"} <= keys
    assert not [key for key in keys if not any(pattern.fullmatch(key) for pattern in patterns)]


@pytest.fixture
def own_registrations() -> Iterator[None]:
    """Takes back what a test registers."""
    tables = (registry.METHODS.entries, registry.SCORERS.entries)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before):
        for added in set(table) - set(entries):
            del table[added]


@pytest.mark.usefixtures("own_registrations")
def test_the_method_and_scorer_of_extending_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [content for language, content in blocks(DOCS / "extending.md") if language == "python"]
    for kind in ("method", "scorer"):
        [example] = [text for text in examples if f"@register_{kind}" in text]
        (tmp_path / f"page_{kind}.py").write_text(example, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    overrides = ("--job.imports", '["toy_family", "page_method", "page_scorer"]', "--recipe.method", "plain")
    trainer = toy_trainer(tmp_path, "finetune", *overrides, "--training.steps", "2")
    trainer.run()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and all(json.loads(line)["loss/student"] > 0 for line in lines)
    video = np.full((2, 4, 4, 3), 51, dtype=np.uint8)
    assert registry.SCORERS.entries["brightness"](video, "") == {"brightness": pytest.approx(0.2)}


# The two commands of the README.


def environment(*arguments: str, path: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    keep = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "PYTHONPATH", "VIRTUAL_ENV")}
    command = ["bash", str(cwd / "scripts" / "environment"), *arguments]
    return subprocess.run(command, env=keep | {"PATH": path}, capture_output=True, text=True, check=False)


def folder_of(tmp_path: Path, programs: dict[str, str]) -> str:
    """A PATH with the shell's own programs and these Pythons."""
    for program in ("bash", "dirname"):
        (tmp_path / program).symlink_to(shutil.which(program) or "")
    for program, text in programs.items():
        (tmp_path / program).write_text(f"#!/usr/bin/env -S bash\n{text}\n")
        (tmp_path / program).chmod(0o755)
    return str(tmp_path)


def test_an_old_python_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = folder_of(tmp_path, {"python3": "exit 1"})  # as one that is too old, or has no module venv
    done = environment(str(tmp_path / "venv"), ".", path=path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: no Python 3.10 or later") and done.stderr.count("\n") == 1


def test_the_supported_one_of_several_pythons_is_chosen(tmp_path: Path) -> None:
    """The first is too old, as pyenv's are whose version is not chosen; the second makes the environment."""
    made = tmp_path / "venv" / "bin" / "python"
    working = f'case "$*" in "-m venv "*) mkdir -p {made.parent}; cp "$0" {made};; *install*) echo "$@";; esac'
    path = folder_of(tmp_path, {"python3.11": "exit 1", "python3.12": working, "python3": "exit 1"})
    for program in ("mkdir", "cp", "env"):
        (tmp_path / program).symlink_to(shutil.which(program) or "")
    done = environment(str(tmp_path / "venv"), ".[dev]", path=path)
    assert done.returncode == 0, done.stderr
    assert "-e .[dev] -c constraints.txt" in done.stdout


def test_ci_calls_the_commands_of_the_readme() -> None:
    run = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    shown = [command.text for command in commands(REPOSITORY / "README.md")]
    assert {"make demo", "make test"} <= set(shown)
    called = re.findall(r"make (?:demo|test)\b[^\n]*", run)
    assert len(called) == 2 and all(call in shown for call in called)


def test_readmes_commands_reach_the_job() -> None:
    [short] = [c.text for c in commands(REPOSITORY / "README.md") if "ARGS" in c.text]
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", *shlex.split(short)[1:]],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    arguments = dict(part.split("=", 1) for part in shlex.split(short) if "=" in part)["ARGS"]
    assert f"./run_train.sh {arguments}" in done.stdout
    assert "scripts/environment .venv ." in done.stdout
    load_config(["--job.config_file", "train_configs/tiny_wan_dmd2.toml", *shlex.split(arguments)])
