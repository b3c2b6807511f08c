"""The whole configuration: all sections, and the checks between them.

Checks sit where their facts are: within a section in its `__post_init__`, between sections here, a method's and a
family's own in their `validate`. Those that need the number of ranks are in `layouts.check_world`, those that need the
file system in `loading.check_paths`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from titan_distill.config.data import DataConfig
from titan_distill.config.sections import (
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
    ParallelismConfig,
    ProfilingConfig,
    RecipeConfig,
    RoleConfig,
    SparseAttentionConfig,
    TrainingConfig,
    ValidationConfig,
)


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
