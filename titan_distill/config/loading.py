"""Loading: from a command line to the checked configuration of a run, and from that to its `config.toml`.

Three layers override each other in this order: the defaults of the sections, one TOML file (`--job.config_file`), and
dotted overrides (`--training.steps 20`). The configuration is frozen and checked before any process group exists. A run
either starts with what its `config.toml` says or ends in one sentence.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    plain_text,
    read_toml,
    reject_unknown_keys,
)
from titan_distill.config.paths import is_reference, is_url, seen_from
from titan_distill.config.role_sections import OptimizerConfig, ParallelismConfig
from titan_distill.config.sections import JobConfig, RecipeConfig, ValidationConfig
from titan_distill.config.text import NO_VALUE, field_types, schema_help, to_dict, toml_text
from titan_distill.registry import (
    FAMILIES,
    METHODS,
    SCORERS,
    FamilyClass,
    MethodClass,
    import_trusted_modules,
    import_user_modules,
    lookup,
    names,
)

logger = logging.getLogger(__name__)

HELP_HEADER = """\
Each key of a configuration file is also an option. A resume takes another value of a key without a word (free), takes
it and logs the old and the new one (logged), or refuses it (refused)."""
SHAPES = "shapes"
"""Scorer of `tiny_world`, which is installed with this package."""
OWN_DEGREES = {"dp_replicate": 1, "dp_shard": -1, "sequence": 1, "tensor": 1}
"""Defaults of the degrees of a role that sets one of them."""
ROLE_KEYS = {
    "optimizer": [key for key in field_types(OptimizerConfig) if key != "name"],
    "parallelism": [key for key in field_types(ParallelismConfig) if key != "async_tensor"],
}
"""Sections that a role may override, each with the keys that it may set."""


def load_config(argv: Sequence[str], trusted: Collection[str] | None = None) -> Config:
    """Loads the configuration of a command line, e.g. `["--job.config_file", "x.toml", "--training.steps", "20"]`.

    Without a file, all keys come from the command line. `trusted` is for a file that somebody else may have written:
    the modules of its job.imports that may run, see `import_trusted_modules`. Default: all.

    Raises ConfigError: one sentence with the file (or the command line), the key, the value, the allowed values and the
    nearest known key.
    """
    overrides = parse_overrides(argv)
    source, raw = _read_config_file(overrides)
    has_pipeline_table = "pipeline_config" in raw
    apply_overrides(raw, overrides)
    root = Place(source, "", Config)
    reject_unknown_keys(list(field_types(Config)), raw, root)
    places = {name: root.child(name, raw.get(name)) for name in field_types(Config)}

    pipeline_file = convert(str, raw.get("pipeline_config_path", ""), places["pipeline_config_path"])
    if pipeline_file and has_pipeline_table:
        places["pipeline_config_path"].fail(pipeline_file, "contradicts [pipeline_config]; keep one of the two")
    if pipeline_file:
        table = {"pipeline_config": read_toml(pipeline_file)}
        apply_overrides(table, [item for item in overrides if item[0].startswith("pipeline_config.")])
        raw |= table
        places["pipeline_config"] = Place(pipeline_file, "pipeline_config", Config)

    kinds = _section_kinds(raw, places, trusted)
    raw["roles"] = _complete_roles(raw, places["roles"])
    order = sorted(kinds, key=lambda name: name == "roles")  # last: a fault in [optimizer] is not a role's
    values = {name: convert(kinds[name], raw.get(name, {}), places[name]) for name in order}
    with in_one_sentence(source):
        config = Config(**values, pipeline_config_path=pipeline_file)
        method, family = lookup(METHODS, config.recipe.method), lookup(FAMILIES, config.recipe.family)
        _import_scorer(config.validation.scorer)
        method.validate(config)
        family.validate(config)
        if (given := family.given_parts(config)) and not method.uses_loss_mask:
            others = sorted(name for name, other in METHODS.entries.items() if other.uses_loss_mask)
            raise ValueError(
                f"{given}, which recipe.method = {config.recipe.method!r} would count in its loss; set it to 0, or "
                f"train with {', '.join(others)}"
            )
    return config


def to_toml(config: Config) -> str:
    """The text of `config.toml`: every key, secrets redacted. `load_config` reads an equal configuration from it.

    A role's own tables hold the keys that differ from [optimizer] and [parallelism]. Fields that say where a
    configuration came from (`compare=False`) are left out, because they do not hold for another file.
    """
    tables = to_dict(config, skip_origins=True)
    for role in tables["roles"].values():
        for section, keys in ROLE_KEYS.items():
            own, run = role.pop(section), tables[section]
            different = {key for key in keys if own[key] != run[key]}
            if different & OWN_DEGREES.keys():
                different |= OWN_DEGREES.keys()
            if different:
                role[section] = {key: own[key] for key in keys if key in different}
    return toml_text(tables)


def import_family(config_file: Path, family: str, trusted: Collection[str]) -> None:
    """Imports the modules that a run's configuration file names for its model family, as far as they are `trusted`. The
    file is read only if it is needed. Raises ConfigError as `load_config` does."""
    if (not trusted and family in names(FAMILIES)) or not config_file.is_file():
        return
    source = str(config_file)
    raw = read_toml(source).get("job", {})
    job = convert(JobConfig, raw, Place(source, "", Config).child("job", raw))
    with in_one_sentence(source):
        import_trusted_modules(job.imports, [(FAMILIES, family)], trusted)


def help_text(argv: Sequence[str]) -> str:
    """The text of `--help`: every key with its type, default and meaning.

    With a `--job.config_file`, it has the keys of the file's method and family, too. Raises ConfigError when the file
    does not name them.
    """
    overrides = parse_overrides(argv)
    source, raw = _read_config_file(overrides)
    apply_overrides(raw, overrides)
    kinds, root = field_types(Config), Place(source, "", Config)
    if source != COMMAND_LINE:
        kinds = kinds | _section_kinds(raw, {name: root.child(name, raw.get(name)) for name in kinds})
    return "\n".join([HELP_HEADER, "", *schema_help(Config, kinds)]) + "\n"


def check_paths(config: Config) -> None:
    """Raises ValueError if a file or folder in the configuration does not exist; the message names the first one."""
    folders: dict[str, str] = {}
    for name, role in config.roles.items():
        folders |= {f"roles.{name}.path": role.path, f"roles.{name}.init_from": role.init_from}
    either = {**config.data.keys, "validation.data": config.validation.data}
    if config.validation.enabled:
        either["validation.prompts"] = config.validation.prompts
    if config.checkpoint.resume_from != "latest":
        either["checkpoint.resume_from"] = config.checkpoint.resume_from
    for key, path in (folders | either).items():
        if key.endswith(".init_from") and is_reference(path):
            continue  # a role in a checkpoint: `resolve` finds it
        if (key in config.data.keys or key in ("validation.data", "validation.prompts")) and is_url(path):
            continue  # opened, not only looked for, in the next seconds
        # os.path, because pathlib before Python 3.14 raises OSError for a name that is too long to exist.
        exists = os.path.isdir(path) if key in folders else os.path.exists(path)
        if path and not exists:
            what = "folder" if key in folders else "file or folder"
            is_file = os.path.isfile(path)
            raise ValueError(
                f"{key} = {path!r} is a file{seen_from(path)}; name the folder that it is in"
                if is_file
                else f"{key} = {path!r} is no existing {what}{seen_from(path)}; correct the path"
            )


@contextmanager
def in_one_sentence(source: str) -> Iterator[None]:
    """Turns the ValueErrors of checks, which know keys but no file, into ConfigErrors that name `source`."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def _complete_roles(raw: dict[str, Any], at: Place) -> Any:
    """Returns the raw [roles.<name>] tables with [optimizer] and [parallelism] filled in below each role's own keys."""
    roles = raw.get("roles", {})
    if not isinstance(roles, Mapping):
        return roles  # `convert` refuses it
    return {name: _complete_role(role, raw, at.child(name, role)) for name, role in roles.items()}


def _complete_role(role: Any, raw: dict[str, Any], at: Place) -> Any:
    if not isinstance(role, Mapping):
        return role
    completed = dict(role)
    for section, keys in ROLE_KEYS.items():
        own, run, place = role.get(section, {}), raw.get(section, {}), at.child(section, role.get(section))
        if not (isinstance(own, Mapping) and isinstance(run, Mapping)):
            continue
        reject_unknown_keys(keys, own, place)
        own = {key: value for key, value in own.items() if plain_text(value) != NO_VALUE}
        if section == "optimizer" and own:
            trainable = role.get("trainable", True)
            if not convert(bool, trainable, at.child("trainable", trainable)):
                at.child("trainable", None).fail(False, f"leaves [{place.key}] without effect; remove the table")
        if own.keys() & OWN_DEGREES.keys():
            own = OWN_DEGREES | own
            if convert(int, own["tensor"], place.child("tensor", own["tensor"])) == 1:  # what needs tensor > 1
                run = {key: value for key, value in run.items() if key not in ("token_region", "async_tensor")}
        completed[section] = {**run, **own}
    return completed


def _import_scorer(name: str) -> None:
    """Raises ValueError if no module registers the scorer."""
    if name == SHAPES and name not in SCORERS.entries:
        logger.warning('validation.scorer = "shapes" needs job.imports = ["tiny_world"] from version 0.3 on')
        import_user_modules(["tiny_world"])
    lookup(SCORERS, name)


def _read_config_file(overrides: Sequence[tuple[str, Text]]) -> tuple[str, dict[str, Any]]:
    """Returns name and tables of the configuration file. Without a file it returns the command line's name and no
    tables."""
    chosen = dict(overrides).get("job.config_file")
    if chosen is None or chosen.text is None:  # `convert` refuses an option without its value
        return COMMAND_LINE, {}
    raw = read_toml(chosen.text)
    job = raw.get("job")
    if isinstance(job, dict) and "config_file" in job:
        place = Place(chosen.text, "job.config_file", Config)
        place.fail(job["config_file"], "can only be given on the command line; remove it from the file")
    return chosen.text, raw


def _section_kinds(
    raw: dict[str, Any], places: dict[str, Place], trusted: Collection[str] | None = None
) -> dict[str, Any]:
    """Types of the sections by name, including those of the method and the family. Imports the modules of job.imports
    first, all of them or those that are `trusted`."""
    job = convert(JobConfig, raw.get("job", {}), places["job"])
    if trusted is None:
        with in_one_sentence(places["job"].source):
            import_user_modules(job.imports)
    recipe = convert(RecipeConfig, raw.get("recipe", {}), places["recipe"])
    if trusted is not None:
        scorer = convert(ValidationConfig, raw.get("validation", {}), places["validation"]).scorer
        needed = [(METHODS, recipe.method), (FAMILIES, recipe.family)]
        needed += [] if scorer == SHAPES else [(SCORERS, scorer)]  # SHAPES comes with this package: `_import_scorer`
        with in_one_sentence(places["job"].source):
            import_trusted_modules(job.imports, needed, trusted)
    with in_one_sentence(places["recipe"].source):
        method: type[MethodClass] = lookup(METHODS, recipe.method)
        family: type[FamilyClass] = lookup(FAMILIES, recipe.family)
    chosen = {"method_config": method.config_class, "pipeline_config": family.pipeline_config_class}
    return {name: kind for name, kind in (field_types(Config) | chosen).items() if name != "pipeline_config_path"}
