"""Resolving: from a configuration and a number of ranks to the run that everything after it takes.

A run is resolved once. Nothing after it derives the layout again, asks the registry for a class, or builds a family.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from titan_distill.checkpoint.initial_weights import resolve_reference
from titan_distill.checkpoint.resuming import follow_tiles
from titan_distill.config.config import Config
from titan_distill.config.degrees import RunLayout, resolve_layout
from titan_distill.config.loading import check_paths, in_one_sentence
from titan_distill.config.parsing import COMMAND_LINE
from titan_distill.config.paths import is_reference, of_key
from titan_distill.methods.base import TrainingMethod, method_class
from titan_distill.models.base import ModelFamily, model_family


@dataclass(frozen=True)
class ResolvedRun:
    """A run whose classes, layouts and weights are known.

    Attributes:
        config: the configuration, with references to weights and the family's own keys spelled out.
        family: the model family.
        method: the class of the training method, whose instance needs the built roles.
        layout: the layouts of the data and of all roles, and the number of micro-batches.
    """

    config: Config
    family: ModelFamily
    method: type[TrainingMethod]
    layout: RunLayout


def resolve(config: Config, world_size: int, *, without_files: bool = False) -> ResolvedRun:
    """Resolves a run of `world_size` ranks.

    `without_files` looks for no weights and no data, as a plan or a dry run needs none. Raises ConfigError, which names
    the configuration file, for a layout, a path or a reference that does not work.
    """
    config = config if without_files else follow_tiles(config)
    with in_one_sentence(config.job.config_file or COMMAND_LINE):
        layout = resolve_layout(config, world_size)
        if not without_files:
            check_paths(config)
            config = spell_out_references(config)
        family = model_family(config.recipe.family)(config)
        if not without_files:
            family.check_files()
            family.config = family.spelled_out()
        family.check_layouts(layout.roles)
    return ResolvedRun(family.config, family, method_class(config.recipe.method), layout)


def spell_out_references(config: Config, names: Collection[str] | None = None) -> Config:
    """Replaces `init_from = ".../latest#student:ema"` by the step that it means now, for `config.toml` to record.

    `names` are the roles to look at. Default: all. Raises ValueError for a reference that leads nowhere, or to another
    family's weights.
    """
    roles = dict(config.roles)
    for name, role in roles.items():
        if is_reference(role.init_from) and (names is None or name in names):
            with of_key(f"roles.{name}.init_from", role.init_from):
                found = resolve_reference(role.init_from)
            if found.manifest.family != config.recipe.family:
                raise ValueError(
                    f"roles.{name}.init_from = {role.init_from!r} is of family {found.manifest.family!r}, but "
                    f"recipe.family is {config.recipe.family!r}; choose a checkpoint of the same family"
                )
            roles[name] = replace(role, init_from=found.text)
    return replace(config, roles=roles)
