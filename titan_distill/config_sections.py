"""The sections of a configuration: every key with its type, default and meaning.

The string literal under a field is its line in ``--help``. Ranges, and contradictions within a section, are checked in
its ``__post_init__``; the message starts with the field's name, before which the parser puts the file and the section.
A key stands here only if something reads it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from titan_distill.config_parsing import check_range, nearest_multiples


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    name: str
    """Names the run: its default output folder and its entry in the trackers."""
    config_file: str = field(default="", compare=False)
    """TOML file with the configuration; command line only."""
    output_dir: str = ""
    """Folder of everything the run writes; "" stands for outputs/<job.name>."""
    dry_run: bool = False
    """Build everything without weights and without steps, print the plan, and stop."""
    seed: int = 0
    """Root of every random draw: data order, noise, timesteps, dropout of captions."""
    imports: tuple[str, ...] = ()
    """Python modules to import first, so that methods and model families registered there can be named in [recipe]."""

    def __post_init__(self) -> None:
        check_range(self, "seed", least=0)
        if self.name in ("", ".", "..") or re.search(r"[/\\\0]", self.name):
            raise ValueError(f"name = {self.name!r} names a folder, so it cannot be empty or a path; use a plain name")
        for module in self.imports:
            if not all(part.isidentifier() for part in module.split(".")):
                raise ValueError(f"imports has {module!r}, which is no module name; write it as in an import statement")

    @property
    def output_folder(self) -> Path:
        """Where the run writes, with the default filled in."""
        return Path(self.output_dir or f"outputs/{self.name}")


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    method: str
    """Training method, a file in titan_distill/methods/ (dmd2, finetune) or one registered by job.imports."""
    family: str = "wan"
    """Model family, a folder in titan_distill/models/ or one registered by job.imports."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw"] = "adamw"
    """Optimizer of every trained role."""
    lr: float = 2e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.0, 0.999)
    """Decay rates of AdamW's two moments; DMD2 trains without momentum, hence the first 0."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""

    def __post_init__(self) -> None:
        _check_optimizer(self)


@dataclass(frozen=True, kw_only=True)
class OptimizerOverride:
    lr: float | None = None
    """Peak learning rate of this role; none takes [optimizer]'s."""
    betas: tuple[float, float] | None = None
    """Decay rates of AdamW's two moments; none takes [optimizer]'s."""
    weight_decay: float | None = None
    """Decoupled weight decay; none takes [optimizer]'s."""
    eps: float | None = None
    """Added to the root of the second moment; none takes [optimizer]'s."""

    def __post_init__(self) -> None:
        _check_optimizer(self)


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    trainable: bool
    """Whether this role gets an optimizer; the method refuses what contradicts it (DMD2 never trains its teacher)."""
    path: str = ""
    """Diffusers folder of the transformer: architecture and weights. Either this or flavor."""
    flavor: str = ""
    """Architecture by name, e.g. tiny, 1.3B, 14B; weights come from init_from."""
    init_from: str = ""
    """Diffusers folder with the weights of a flavor; "" starts from random weights."""
    attention: Literal["dense"] = "dense"
    """Self-attention of this role."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Storage of the weights; auto keeps fp32 masters for trained roles and training.dtype for frozen ones."""
    optimizer: OptimizerOverride = field(default_factory=OptimizerOverride)
    """Where this role's optimizer differs from [optimizer]."""
    max_grad_norm: float | None = None
    """Gradient clip of this role; none takes training.max_grad_norm."""

    def __post_init__(self) -> None:
        check_range(self, "max_grad_norm", above=0)
        if not self.path and not self.flavor:
            raise ValueError("path and flavor are both empty; set path to a diffusers folder or flavor to a known size")
        for other in ("flavor", "init_from"):
            if self.path and getattr(self, other):
                raise ValueError(
                    f"{other} = {getattr(self, other)!r} contradicts path = {self.path!r}, which already gives "
                    f"architecture and weights; remove one of the two"
                )
        if not self.trainable and (self.optimizer != OptimizerOverride() or self.max_grad_norm is not None):
            raise ValueError(
                "trainable = false leaves the optimizer and max_grad_norm of this role without effect; remove them"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str
    """Parquet file, or folder of them, with latents and text embeddings (or only text, where the method allows it)."""
    max_text_tokens: int = 512
    """Text embeddings are zero-padded or cut to this many tokens."""
    num_workers: int = 0
    """Loader processes a rank; 0 reads in the training process."""
    max_bad_rows: int = 0
    """Unreadable rows to skip, each named in the log, before the run stops."""

    def __post_init__(self) -> None:
        check_range(self, "max_text_tokens", least=1)
        check_range(self, "num_workers", "max_bad_rows", least=0)
        if not self.path:
            raise ValueError('path = "" names no data; set it to a parquet file or to a folder of them')


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    steps: int
    """Training steps of the run, counted from its very first start, resumed or not."""
    global_batch_size: int
    """Samples a step over all ranks."""
    local_batch_size: int
    """Samples a rank holds at once; the number of micro-batches follows and must be whole."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of forward and backward; reductions, timesteps and masters stay in float32."""
    max_grad_norm: float = 10.0
    """Gradients of a role are scaled down to this global L2 norm; inf never clips."""
    gc_interval: int = 50
    """Steps between two runs of Python's garbage collector, on all ranks at once."""

    def __post_init__(self) -> None:
        check_range(self, "steps", "global_batch_size", "local_batch_size", "gc_interval", least=1)
        check_range(self, "max_grad_norm", above=0)
        if self.global_batch_size % self.local_batch_size:
            raise ValueError(
                f"global_batch_size = {self.global_batch_size} is no multiple of local_batch_size = "
                f"{self.local_batch_size}; choose {nearest_multiples(self.global_batch_size, self.local_batch_size)}"
            )


@dataclass(frozen=True, kw_only=True)
class LrSchedulerConfig:
    warmup_steps: int = 0
    """Updates of a role over which its learning rate rises linearly to its peak."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up, down to min_lr_ratio at the role's last update."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a share of the peak."""

    def __post_init__(self) -> None:
        check_range(self, "warmup_steps", least=0)
        check_range(self, "min_lr_ratio", least=0, most=1)
        if self.decay == "constant" and self.min_lr_ratio:
            raise ValueError(
                f"min_lr_ratio = {self.min_lr_ratio} has no effect with decay = 'constant'; choose linear or cosine"
            )


@dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
    dp_replicate: int = 1
    """Copies of the sharded weights (HSDP); gradients are averaged over them."""
    dp_shard: int = -1
    """Ranks that share one copy of the weights (FSDP2); -1 takes all that are left."""
    sequence: int = 1
    """Ranks that share the tokens of a sample; only 1 in this version."""
    tensor: int = 1
    """Ranks that share each weight matrix; only 1 in this version."""

    def __post_init__(self) -> None:
        check_range(self, "dp_replicate", "sequence", "tensor", least=1)
        if self.dp_shard != -1:
            check_range(self, "dp_shard", least=1)
        for name in ("sequence", "tensor"):
            if getattr(self, name) != 1:
                raise ValueError(
                    f"{name} = {getattr(self, name)} needs a layout that this version does not have; set it to 1"
                )


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointConfig:
    mode: Literal["none", "full"] = "none"
    """full keeps only each block's input and recomputes the rest in the backward: less memory, a third more work."""


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    enabled: bool = False
    """Compile each transformer block with torch.compile."""


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    decay: float = 0.0
    """Share of the average kept at each update of the role; 0 keeps no average."""
    start_step: int = 0
    """Updates of the role during which the average merely follows the weights."""
    role: str = "student"
    """Role whose weights are averaged."""

    def __post_init__(self) -> None:
        check_range(self, "decay", least=0, below=1)
        check_range(self, "start_step", least=0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    enabled: bool = True
    """Save checkpoints every interval and after the last step."""
    interval: int = 500
    """Steps between two checkpoints."""
    keep: int = 3
    """Newest complete checkpoints to keep."""
    resume_from: str = ""
    """Where to continue: latest (of this run's output folder), a checkpoint's path, or "" for a fresh start."""

    def __post_init__(self) -> None:
        check_range(self, "interval", "keep", least=1)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    enabled: bool = True
    """Sample, score and show videos during the run."""
    interval: int = 0
    """Steps between two validations; 0 validates only before the first and after the last step."""
    prompts: str = ""
    """Parquet, txt or jsonl file with the prompts; "" takes the captions of data.path."""
    num_prompts: int = 96
    """Prompts to sample and score."""
    batch_size: int = 16
    """Videos sampled at once on a rank."""
    seed: int = 0
    """Seed of the initial noise: equal seeds make validations comparable."""
    num_videos: int = 8
    """Of the samples, how many are written as mp4 and shown on the contact sheet."""
    fps: int = 8
    """Frames per second of the written videos."""
    scorer: Literal["none", "shapes"] = "none"
    """Rule that scores decoded videos; shapes reads colour, shape and direction of drawn clips (data/synthetic.py)."""

    def __post_init__(self) -> None:
        check_range(self, "num_prompts", "batch_size", "fps", least=1)
        check_range(self, "interval", "seed", "num_videos", least=0)
        if self.enabled and self.num_videos > self.num_prompts:
            raise ValueError(
                f"num_videos = {self.num_videos} is more than num_prompts = {self.num_prompts}; lower it to "
                f"{self.num_prompts} or raise num_prompts"
            )


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    log_interval: int = 1
    """Steps between two lines of metrics.jsonl and two points in the trackers."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    wandb: bool = False
    """Also log to Weights & Biases; the key comes from the environment (WANDB_API_KEY)."""
    wandb_project: str = "titan_distill"
    """Project of the W&B run."""

    def __post_init__(self) -> None:
        check_range(self, "log_interval", least=1)


@dataclass(frozen=True, kw_only=True)
class ProfilingConfig:
    enabled: bool = False
    """Record a torch.profiler trace under profile/."""
    start_step: int = 10
    """First step of the trace."""
    num_steps: int = 3
    """Steps in the trace."""

    def __post_init__(self) -> None:
        check_range(self, "start_step", least=0)
        check_range(self, "num_steps", least=1)


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    init_timeout_seconds: int = 300
    """How long a collective may take until the first step is done: start-up includes loading and compiling."""
    train_timeout_seconds: int = 100
    """How long a collective may take afterwards, before the run is ended."""

    def __post_init__(self) -> None:
        check_range(self, "init_timeout_seconds", "train_timeout_seconds", least=1)


def _check_optimizer(section: OptimizerConfig | OptimizerOverride) -> None:
    check_range(section, "lr", "eps", above=0, below=math.inf)
    check_range(section, "betas", least=0, below=1)
    check_range(section, "weight_decay", least=0, below=math.inf)
