"""From a command line to the checked configuration of a run.

Three layers, each overriding the one before: the defaults in `sections.py`, one TOML file (`--job.config_file`), dotted
overrides (`--training.steps 20`). The result is frozen and checked before any process group exists, so a run either
starts with exactly what its `config.toml` says or ends in one sentence.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from titan_distill.config.config import Config
from titan_distill.config.parsing import (
    COMMAND_LINE,
    ConfigError,
    Place,
    Text,
    apply_overrides,
    convert,
    parse_overrides,
    read_toml,
    reject_unknown_keys,
)
from titan_distill.config.sections import JobConfig, RecipeConfig
from titan_distill.config.text import field_types, schema_help
from titan_distill.registry import FAMILIES, METHODS, SCORERS, FamilyClass, MethodClass, import_user_modules, lookup

logger = logging.getLogger(__name__)


def load_config(argv: Sequence[str]) -> Config:
    """The checked configuration of a command line, e.g. ``["--job.config_file", "x.toml", "--training.steps", "20"]``.

    Without a file, all keys come from the command line. Raises ConfigError: one sentence that names the file (or the
    command line), key, value, what is allowed and the nearest key.
    """
    overrides = parse_overrides(argv)
    source, raw = _read_config_file(overrides)
    has_pipeline_table = "pipeline_config" in raw
    apply_overrides(raw, overrides)
    root = Place(source, "", Config)
    reject_unknown_keys(Config, raw, root)
    places = {name: root.child(name, raw.get(name)) for name in field_types(Config)}

    pipeline_file = convert(str, raw.get("pipeline_config_path", ""), places["pipeline_config_path"])
    if pipeline_file and has_pipeline_table:
        places["pipeline_config_path"].fail(pipeline_file, "contradicts [pipeline_config]; keep one of the two")
    if pipeline_file:
        table = {"pipeline_config": read_toml(pipeline_file)}
        apply_overrides(table, [item for item in overrides if item[0].startswith("pipeline_config.")])
        raw |= table
        places["pipeline_config"] = Place(pipeline_file, "pipeline_config", Config)

    kinds = _section_kinds(raw, places)
    values = {name: convert(kind, raw.get(name, {}), places[name]) for name, kind in kinds.items()}
    with _in_one_sentence(source):
        config = Config(**values, pipeline_config_path=pipeline_file)
        method, family = lookup(METHODS, config.recipe.method), lookup(FAMILIES, config.recipe.family)
        _import_scorer(config)
        method.validate(config)
        family.validate(config)
        if (given := family.given_parts(config)) and not method.uses_loss_mask:
            others = sorted(name for name, other in METHODS.entries.items() if other.uses_loss_mask)
            raise ValueError(
                f"{given}, which recipe.method = {config.recipe.method!r} would count in its loss; set it to 0, or "
                f"train with {', '.join(others)}"
            )
    return config


def _import_scorer(config: Config) -> None:
    """Raises ValueError for a scorer that nothing registers."""
    name = config.validation.scorer
    if name == "shapes" and name not in SCORERS.entries:
        logger.warning('validation.scorer = "shapes" needs job.imports = ["tiny_world"] from version 0.3 on')
        import_user_modules(["tiny_world"])
    lookup(SCORERS, name)


def help_text(config_file: str | None) -> str:
    """Every key with its type, default and meaning.

    With a file, also the keys of its method and family. Raises ConfigError when the file cannot say which those are.
    """
    kinds = field_types(Config)
    if config_file is not None:
        raw, root = read_toml(config_file), Place(config_file, "", Config)
        kinds = kinds | _section_kinds(raw, {name: root.child(name, raw.get(name)) for name in kinds})
    return "\n".join(["Each key of a configuration file is also an option:", "", *schema_help(Config, kinds)]) + "\n"


def check_paths(config: Config) -> None:
    """Raises ConfigError for the first file or folder that the configuration names and that does not exist."""
    folders: dict[str, str] = {}
    for name, role in config.roles.items():
        folders |= {f"roles.{name}.path": role.path, f"roles.{name}.init_from": role.init_from}
    either = {"data.path": config.data.path}
    if config.validation.enabled:
        either["validation.prompts"] = config.validation.prompts
    if config.checkpoint.resume_from != "latest":
        either["checkpoint.resume_from"] = config.checkpoint.resume_from
    for key, path in (folders | either).items():
        if key.endswith(".init_from") and "#" in path:
            continue  # a role in a checkpoint, which is looked up with more care
        # Not pathlib's: before Python 3.14 they raise OSError for a name that is too long to exist.
        exists = os.path.isdir(path) if key in folders else os.path.exists(path)
        if path and not exists:
            what = "folder" if key in folders else "file or folder"
            raise ConfigError(
                f"{_source(config)}: {key} = {path!r} is no existing {what} (seen from {Path.cwd()}); correct the path"
            )


def _read_config_file(overrides: Sequence[tuple[str, Text]]) -> tuple[str, dict[str, Any]]:
    """Name and tables of the chosen file; the command line and no tables when none is chosen."""
    chosen = dict(overrides).get("job.config_file")
    if chosen is None or chosen.text is None:  # an option without its value is refused when it is converted
        return COMMAND_LINE, {}
    raw = read_toml(chosen.text)
    job = raw.get("job")
    if isinstance(job, dict) and "config_file" in job:
        place = Place(chosen.text, "job.config_file", Config)
        place.fail(job["config_file"], "can only be given on the command line; remove it from the file")
    return chosen.text, raw


def _section_kinds(raw: dict[str, Any], places: dict[str, Place]) -> dict[str, Any]:
    """Section -> type, with those that the chosen method and family bring; imports the user's modules first."""
    job = convert(JobConfig, raw.get("job", {}), places["job"])
    with _in_one_sentence(places["job"].source):
        import_user_modules(job.imports)
    recipe = convert(RecipeConfig, raw.get("recipe", {}), places["recipe"])
    with _in_one_sentence(places["recipe"].source):
        method: type[MethodClass] = lookup(METHODS, recipe.method)
        family: type[FamilyClass] = lookup(FAMILIES, recipe.family)
    chosen = {"method_config": method.config_class, "pipeline_config": family.pipeline_config_class}
    return {name: kind for name, kind in (field_types(Config) | chosen).items() if name != "pipeline_config_path"}


@contextmanager
def _in_one_sentence(source: str) -> Iterator[None]:
    """Turns the ValueErrors of checks, which know keys but no file, into ConfigErrors."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def _source(config: Config) -> str:
    return config.job.config_file or COMMAND_LINE
