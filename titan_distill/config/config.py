"""The whole configuration: all sections, and the checks between them.

A check stands where its facts are: within a section in its `__post_init__`, between sections here, for a method or a
family in its `validate`. `resolve.py` makes the checks that need the number of ranks or the file system.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from titan_distill.config import sections
from titan_distill.config.role_sections import OptimizerConfig, ParallelismConfig, RoleConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of a run. The method types `method_config`, the model family types `pipeline_config`."""

    job: sections.JobConfig
    """The run: name, output folder, seed, imports."""
    recipe: sections.RecipeConfig
    """Training method and model family."""
    roles: dict[str, RoleConfig]
    """The models of the run by name. The method says which roles it needs."""
    method_config: Any
    """Keys of the training method."""
    pipeline_config: Any
    """Keys of the model family."""
    pipeline_config_path: str = field(default="", compare=False)
    """TOML file with the keys of [pipeline_config], in place of that table. Relative to the working directory."""
    data: sections.DataConfig
    """Training data."""
    training: sections.TrainingConfig
    """Steps, batch size, compute type, gradient clipping."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of all trained roles. [roles.<name>.optimizer] overrides it."""
    lr_scheduler: sections.LrSchedulerConfig = field(default_factory=sections.LrSchedulerConfig)
    """Learning-rate schedule over the updates of a role."""
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    """Layout of the ranks. The product of the four degrees (dp_replicate, dp_shard, sequence, tensor) is the number of
    ranks. [roles.<name>.parallelism] overrides it."""
    activation_checkpoint: sections.ActivationCheckpointConfig = field(
        default_factory=sections.ActivationCheckpointConfig
    )
    """Activation checkpointing: recompute activations in the backward to save memory."""
    compile: sections.CompileConfig = field(default_factory=sections.CompileConfig)
    """torch.compile."""
    float8: sections.Float8Config = field(default_factory=sections.Float8Config)
    """Matrix products in float8."""
    sparse_attention: sections.SparseAttentionConfig = field(default_factory=sections.SparseAttentionConfig)
    """Video sparse attention of the roles with attention = "sparse"."""
    ema: sections.EmaConfig = field(default_factory=sections.EmaConfig)
    """Exponential moving average of one role's weights, for validation and export."""
    checkpoint: sections.CheckpointConfig = field(default_factory=sections.CheckpointConfig)
    """Checkpoints and resume."""
    validation: sections.ValidationConfig = field(default_factory=sections.ValidationConfig)
    """Sampled videos and their scores during the run."""
    metrics: sections.MetricsConfig = field(default_factory=sections.MetricsConfig)
    """Trackers. The run always writes metrics.jsonl."""
    profiling: sections.ProfilingConfig = field(default_factory=sections.ProfilingConfig)
    """Profiler traces of a few steps."""
    comm: sections.CommConfig = field(default_factory=sections.CommConfig)
    """Time limits for communication between ranks."""

    def __post_init__(self) -> None:
        for name in self.roles:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
                raise ValueError(f"[roles.{name!r}] becomes part of keys and file names; use letters, digits, _ and -")
        if self.parallelism.async_tensor and not self.compile.enabled:
            raise ValueError(
                "parallelism.async_tensor = true needs the compiler, but compile.enabled = false; set it to true"
            )
        self._check_exchange()
        self._check_held_out()
        self._check_ema()
        self._check_float8()
        self._check_sparse_attention()
        trace_end = self.profiling.start_step + self.profiling.num_steps
        if self.profiling.enabled and trace_end > self.training.steps:
            raise ValueError(
                f"profiling.start_step + profiling.num_steps = {trace_end} is beyond training.steps = "
                f"{self.training.steps}, so the trace would never be complete; lower profiling.start_step"
            )

    def _check_exchange(self) -> None:
        num_ranks = self.parallelism.model_parallel
        in_turn = [name for name, role in self.roles.items() if role.parallelism.exchange_groups == "in_turn"]
        spanning = [name for name in in_turn if self.roles[name].parallelism.model_parallel > num_ranks]
        if self.parallelism.exchange_groups == "in_turn":
            wrong = [] if spanning else ["parallelism"]
        else:
            wrong = [f"roles.{name}.parallelism" for name in in_turn if name not in spanning]
        for key in wrong:
            raise ValueError(
                f"{key}.exchange_groups = 'in_turn' has no effect, because the ranks of one sample are sequence × "
                f"tensor = {num_ranks} for the data and for {'all roles' if key == 'parallelism' else 'this role'}; "
                "set it to 'all'"
            )

    def _check_held_out(self) -> None:
        held_out = self.validation.data
        if held_out and held_out in self.data.paths:
            raise ValueError(
                f"validation.data = {held_out!r} is data that the run trains on; name rows that are left out of it"
            )
        if held_out and sections.is_table(held_out) != self.data.holds_videos:
            kinds = ("a table of videos", "parquet") if self.data.holds_videos else ("parquet", "a table of videos")
            raise ValueError(
                f"validation.data = {held_out!r} is {kinds[1]}, but the run trains on {kinds[0]}; use one kind for both"
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
            # torch cannot see into its layers: they break graphs, hide their matrix products, shard in their own way.
            tensor = max(role.parallelism.tensor for role in self.roles.values())
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

    @property
    def sparse_roles(self) -> list[str]:
        """Names of the roles with sparse attention, sorted."""
        return sorted(name for name, role in self.roles.items() if role.attention == "sparse")

    def tile(self, role: str) -> Literal["auto"] | sections.Tile:
        """Returns the tile of a role with sparse attention, as configured."""
        return self.roles[role].tile or self.sparse_attention.tile

    def check_tile(self, role: str, stored: sections.Tile, source: str) -> None:
        """Raises ValueError if a role is to have another tile than `source` was trained with."""
        if self.tile(role) not in ("auto", stored):
            key = f"roles.{role}.tile" if self.roles[role].tile else "sparse_attention.tile"
            raise ValueError(
                f"{key} = {list(self.tile(role))}, but {source} was trained with tile = {list(stored)}; set {key} to "
                f'{list(stored)} or "auto" for roles.{role}, or choose other weights'
            )

    def with_tiles(self, tiles: Mapping[str, sections.Tile]) -> Config:
        """Returns the configuration with these tiles of roles, in one form: [sparse_attention] has the first role's,
        and other roles have their own where it differs."""
        if not tiles:
            return self
        chosen = {name: self.tile(name) for name in self.sparse_roles} | dict(tiles)
        common = chosen[self.sparse_roles[0]]
        own = {name: replace(self.roles[name], tile=None if tile == common else tile) for name, tile in chosen.items()}
        section = replace(self.sparse_attention, tile=common)
        return replace(self, roles={**self.roles, **own}, sparse_attention=section)

    def _check_sparse_attention(self) -> None:
        if self.sparse_roles:
            return
        for f in fields(self.sparse_attention):
            value = getattr(self.sparse_attention, f.name)
            if value != f.default:
                raise ValueError(
                    f"sparse_attention.{f.name} = {value} has no effect, because no role has attention = 'sparse'; set "
                    "it for a role or remove the section"
                )
