"""The configuration of a run: ``load_config`` fills the typed sections from TOML and the command line.

Three layers, each overriding the one before: the defaults in ``config_sections.py``, one TOML file
(``--job.config_file``), dotted overrides (``--training.steps 20``). The result is frozen and checked before any process
group exists, so a run either starts with exactly what its ``config.toml`` says or ends in one sentence.

Checks sit where their facts are: those within a section in its ``__post_init__``, those between sections in
``Config.__post_init__``, a method's and a family's own in their ``validate``; those that need the number of ranks in
``config_world.check_world``, those that need the file system in ``check_paths`` (a dry run has neither weights nor
data).
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from titan_distill.config_data import DataConfig
from titan_distill.config_parsing import (
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
from titan_distill.config_sections import (
    ActivationCheckpointConfig,
    CheckpointConfig,
    CommConfig,
    CompileConfig,
    EmaConfig,
    Float8Config,
    JobConfig,
    LrSchedulerConfig,
    MetricsConfig,
    OptimizerConfig,
    OptimizerOverride,
    ParallelismConfig,
    ParallelismOverride,
    ProfilingConfig,
    RecipeConfig,
    RoleConfig,
    SparseAttentionConfig,
    TrainingConfig,
    ValidationConfig,
)
from titan_distill.config_text import field_types, schema_help, to_dict, to_toml
from titan_distill.dispatch import method_class, model_family

__all__ = [
    "ActivationCheckpointConfig",
    "CheckpointConfig",
    "CommConfig",
    "CompileConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EmaConfig",
    "Float8Config",
    "JobConfig",
    "LrSchedulerConfig",
    "MetricsConfig",
    "OptimizerConfig",
    "OptimizerOverride",
    "ParallelismConfig",
    "ParallelismOverride",
    "ProfilingConfig",
    "RecipeConfig",
    "RoleConfig",
    "SparseAttentionConfig",
    "TrainingConfig",
    "ValidationConfig",
    "check_paths",
    "help_text",
    "load_config",
    "to_dict",
    "to_toml",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. ``method_config`` and ``pipeline_config`` are typed by the chosen method and family."""

    job: JobConfig
    """The run itself."""
    recipe: RecipeConfig
    """What is trained, and how."""
    roles: dict[str, RoleConfig]
    """The models of the run by name; the method says which it needs."""
    method_config: Any
    """The method's own knobs."""
    pipeline_config: Any
    """The model family's own knobs."""
    pipeline_config_path: str = field(default="", compare=False)
    """TOML file with the keys of [pipeline_config], instead of that table; relative to the working directory."""
    data: DataConfig
    """What is trained on."""
    training: TrainingConfig
    """Length, batch and numbers."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Default of all trained roles; [roles.<name>.optimizer] overrides it."""
    lr_scheduler: LrSchedulerConfig = field(default_factory=LrSchedulerConfig)
    """Learning rate over the updates of a role."""
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    """How the ranks are used; the product of the four degrees is the number of ranks."""
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    """Memory for work."""
    compile: CompileConfig = field(default_factory=CompileConfig)
    """torch.compile."""
    float8: Float8Config = field(default_factory=Float8Config)
    """Matrix products in 8 bits."""
    sparse_attention: SparseAttentionConfig = field(default_factory=SparseAttentionConfig)
    """Video sparse attention of the roles that have attention = "sparse"."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Moving average of one role's weights, used in validation and export."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Videos and scores during the run."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """Where numbers go; metrics.jsonl is always written."""
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    """Traces of a few steps."""
    comm: CommConfig = field(default_factory=CommConfig)
    """Timeouts between ranks."""

    def __post_init__(self) -> None:
        for name in self.roles:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
                raise ValueError(f"[roles.{name!r}] becomes part of keys and file names; use letters, digits, _ and -")
        if self.parallelism.async_tensor and not self.compile.enabled:
            raise ValueError(
                "parallelism.async_tensor = true is the compiler's work, but compile.enabled = false; set it to true"
            )
        self._check_ema()
        self._check_float8()
        self._check_sparse_attention()
        trace_end = self.profiling.start_step + self.profiling.num_steps
        if self.profiling.enabled and trace_end > self.training.steps:
            raise ValueError(
                f"profiling.start_step + profiling.num_steps = {trace_end} is beyond training.steps = "
                f"{self.training.steps}, so the trace would never be complete; lower profiling.start_step"
            )

    def _check_ema(self) -> None:
        trained = [name for name, role in self.roles.items() if role.trainable]
        if self.ema.decay and self.ema.role not in trained:
            raise ValueError(
                f"ema.role = {self.ema.role!r} is not a trained role; choose one of {', '.join(trained) or '(none)'} "
                f"or set ema.decay to 0"
            )

    def _check_float8(self) -> None:
        for name in self.float8.roles:
            if name not in self.roles:
                raise ValueError(f"float8.roles names {name!r}; the roles of this run are {', '.join(self.roles)}")
        if self.float8.enabled and self.float8.backend == "transformer_engine":
            # Its layers are opaque to torch: they break graphs, hide their products, cut weights in their own way.
            tensor = max(role.parallelism.applied_to(self.parallelism).tensor for role in self.roles.values())
            for key, value, other in (
                ("compile.enabled", "true", self.compile.enabled),
                ("activation_checkpoint.mode", "'selective'", self.activation_checkpoint.mode == "selective"),
                ("parallelism.tensor", str(tensor), tensor > 1),
            ):
                if other:
                    raise ValueError(
                        f"float8.backend = 'transformer_engine' does not go with {key} = {value}; change it or set "
                        "float8.backend to 'torchao'"
                    )

    def _check_sparse_attention(self) -> None:
        if any(role.attention == "sparse" for role in self.roles.values()):
            return
        for f in fields(self.sparse_attention):
            value = getattr(self.sparse_attention, f.name)
            if value != f.default:
                raise ValueError(
                    f"sparse_attention.{f.name} = {value} has no effect, because no role has attention = 'sparse'; set "
                    "it for a role or remove the section"
                )

    def optimizer_for(self, role: str) -> OptimizerConfig:
        """[optimizer] with the role's own table laid over it."""
        override = self.roles[role].optimizer
        changed = {f.name: getattr(override, f.name) for f in fields(override)}
        return replace(self.optimizer, **{name: value for name, value in changed.items() if value is not None})


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
        method_class(config.recipe.method).validate(config)
        model_family(config.recipe.family).validate(config)
    return config


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
    for module in job.imports:
        _import(module, places["job"].source)
    recipe = convert(RecipeConfig, raw.get("recipe", {}), places["recipe"])
    with _in_one_sentence(places["recipe"].source):
        method, family = method_class(recipe.method), model_family(recipe.family)
    chosen = {"method_config": method.config_class, "pipeline_config": family.pipeline_config_class}
    return {name: kind for name, kind in (field_types(Config) | chosen).items() if name != "pipeline_config_path"}


def _import(module: str, source: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists; what it imports does not
        raise ConfigError(f"{source}: job.imports names {module!r}, which is not found on PYTHONPATH") from error


@contextmanager
def _in_one_sentence(source: str) -> Iterator[None]:
    """Turns the ValueErrors of checks, which know keys but no file, into ConfigErrors."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def _source(config: Config) -> str:
    return config.job.config_file or COMMAND_LINE
