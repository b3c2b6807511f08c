"""The sections of a configuration: every key with its type, default and meaning.

The string literal under a field is its line in ``--help``. Ranges, and contradictions within a section, are checked in
its ``__post_init__``; the message starts with the field's name, before which the parser puts the file and the section.
A key stands here only if something reads it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from titan_distill.config.lora import LoraConfig
from titan_distill.config.parsing import check_range, nearest_multiples

HEAD_FLAVOR = "head"
"""The `flavor` of a role that is a small head on another role's features."""


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
    """Training method, a file in titan_distill/methods/ (dmd2, self_forcing, finetune, knowledge_distillation,
    consistency, scm, rcm) or one registered by job.imports."""
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
    """Weights to start from: a diffusers folder, or a role in a checkpoint, PATH#ROLE:ema or PATH#ROLE:raw, where PATH
    is a step's folder or checkpoints/latest; "" starts from random weights."""
    attention: Literal["dense", "sparse", "causal"] = "dense"
    """Self-attention of this role; sparse follows [sparse_attention], causal makes a video block by block, each from
    those before it. Both may start from dense weights."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Storage of the weights; auto keeps fp32 masters for trained roles and training.dtype for frozen ones."""
    optimizer: OptimizerOverride = field(default_factory=OptimizerOverride)
    """Where this role's optimizer differs from [optimizer]."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters to train instead of all weights."""
    max_grad_norm: float | None = None
    """Gradient clip of this role; none takes training.max_grad_norm."""
    parallelism: ParallelismOverride = field(default_factory=lambda: ParallelismOverride())
    """Where this role's layout differs from [parallelism]."""

    def __post_init__(self) -> None:
        check_range(self, "max_grad_norm", above=0)
        if not self.path and not self.flavor and "#" not in self.init_from:
            raise ValueError(
                "path and flavor are both empty; set path to a diffusers folder, flavor to a known size, or init_from "
                "to a role in a checkpoint"
            )
        for other in ("flavor", "init_from"):
            if self.path and getattr(self, other):
                raise ValueError(
                    f"{other} = {getattr(self, other)!r} contradicts path = {self.path!r}, which already gives "
                    f"architecture and weights; remove one of the two"
                )
        self.lora.check_role(trainable=self.trainable, weights=self.path or self.init_from, attention=self.attention)
        if not self.trainable and (self.optimizer != OptimizerOverride() or self.max_grad_norm is not None):
            raise ValueError(
                "trainable = false leaves the optimizer and max_grad_norm of this role without effect; remove them"
            )


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
    max_nonfinite_skips: int = 0
    """Updates of a role that may be left out because a loss or gradient is not finite; one more ends the run."""

    def __post_init__(self) -> None:
        check_range(self, "steps", "global_batch_size", "local_batch_size", "gc_interval", least=1)
        check_range(self, "max_nonfinite_skips", least=0)
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
    """Copies of the sharded weights (HSDP); gradients are summed over them."""
    dp_shard: int = -1
    """Ranks with different samples that share one copy of the weights (FSDP2); -1 takes all that are left."""
    sequence: int = 1
    """Ranks that share the tokens of a sample; they shard weights, too."""
    tensor: int = 1
    """Ranks that share each weight matrix; must divide the heads."""
    sequence_method: Literal["auto", "ulysses", "all_gather"] = "auto"
    """How attention sees all tokens: ulysses exchanges tokens for heads and needs sequence × tensor to divide the
    heads; all_gather collects keys and values and needs nothing; auto takes ulysses where it can."""
    token_region: bool = False
    """Between tensor-parallel layers, each tensor rank keeps a run of the tokens: norms and residuals take less memory
    at equal traffic."""
    async_tensor: bool = False
    """Overlap tensor-parallel communication with matrix products (CUDA and compile only)."""
    reshard_after_forward: bool = True
    """Free gathered weights after a block's forward and gather them again for its backward."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in host memory."""

    def __post_init__(self) -> None:
        _check_degrees(self)
        if self.tensor == 1:
            for name in ("token_region", "async_tensor"):
                if getattr(self, name):
                    raise ValueError(f"{name} = true has no effect with tensor = 1; remove it or raise tensor")


@dataclass(frozen=True, kw_only=True)
class ParallelismOverride:
    dp_replicate: int | None = None
    """Copies of the sharded weights. A role that sets one of the four degrees has a layout of its own: those left out
    are 1, and dp_shard takes the ranks that are left."""
    dp_shard: int | None = None
    """Ranks with different samples that share one copy of the weights; -1 takes all that are left."""
    sequence: int | None = None
    """Ranks that share the tokens of a sample."""
    tensor: int | None = None
    """Ranks that share each weight matrix."""
    sequence_method: Literal["auto", "ulysses", "all_gather"] | None = None
    """How attention sees all tokens; none takes [parallelism]'s."""
    token_region: bool | None = None
    """Each tensor rank keeps a run of the tokens between layers; none takes [parallelism]'s."""
    reshard_after_forward: bool | None = None
    """Free gathered weights after a block's forward; none takes [parallelism]'s."""
    cpu_offload: bool | None = None
    """Keep weights, gradients and optimizer state in host memory; none takes [parallelism]'s."""

    def __post_init__(self) -> None:
        _check_degrees(self)

    def applied_to(self, default: ParallelismConfig) -> ParallelismConfig:
        """The layout of a role: ``default`` with what this sets."""
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        if given.keys() & _DEGREES:
            alone = ParallelismConfig()
            given = {name: getattr(alone, name) for name in _DEGREES} | given
        if given.get("tensor") == 1:
            given |= {"token_region": given.get("token_region", False), "async_tensor": False}
        return replace(default, **given)


_DEGREES = frozenset({"dp_replicate", "dp_shard", "sequence", "tensor"})


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointConfig:
    mode: Literal["none", "full", "selective"] = "none"
    """full keeps only each block's input and recomputes the rest in the backward: less memory, a third more work.
    selective also keeps attention outputs and every selective_interval-th matrix product."""
    selective_interval: int | None = None
    """With selective, keep the output of every n-th matrix product of a block; none stands for 2."""
    skip_interval: int = 0
    """Leave every n-th block without checkpointing; 0 leaves none."""

    def __post_init__(self) -> None:
        check_range(self, "selective_interval", least=1)
        check_range(self, "skip_interval", least=0)
        if self.selective_interval is not None and self.mode != "selective":
            raise ValueError(
                f"selective_interval = {self.selective_interval} has no effect with mode = {self.mode!r}; remove it or "
                "set mode to 'selective'"
            )
        if self.skip_interval and self.mode == "none":
            raise ValueError(
                f"skip_interval = {self.skip_interval} has no effect with mode = 'none'; remove it or set mode to "
                "'full' or 'selective'"
            )
        if self.skip_interval == 1:
            raise ValueError(
                "skip_interval = 1 leaves every block without checkpointing; choose 2 or more, or set mode to 'none'"
            )

    @property
    def interval(self) -> int:
        """``selective_interval`` with its default filled in."""
        return 2 if self.selective_interval is None else self.selective_interval


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    enabled: bool = False
    """Compile each transformer block with torch.compile."""
    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """The compiler's effort; the second tries kernels out at start-up, which takes minutes."""

    def __post_init__(self) -> None:
        if self.mode != "default" and not self.enabled:
            raise ValueError(f"mode = {self.mode!r} has no effect with enabled = false; set enabled to true")


@dataclass(frozen=True, kw_only=True)
class Float8Config:
    enabled: bool = False
    """Run the large linear layers of the blocks in float8; storage and state stay as they are."""
    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """One scale a tensor (fastest), a row (more exact), or a row with weight gradients in high precision (most exact).
    """
    backend: Literal["torchao", "transformer_engine"] = "torchao"
    """Library that does it; transformer_engine is an extra and knows tensorwise only."""
    roles: tuple[str, ...] = ()
    """Roles in float8; empty takes all, frozen ones too, since a large teacher's forwards are most of the work."""
    min_features: int = 1024
    """Linear layers with fewer inputs or outputs stay in high precision: casting would cost more than it saves."""
    all_gather: bool = False
    """FSDP2 gathers weights in float8 instead of the compute type; tensorwise with torchao only."""
    emulate: bool = False
    """Round to float8 but multiply in float32: for tests on machines without float8 hardware; slow."""

    def __post_init__(self) -> None:
        check_range(self, "min_features", least=16)
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default and f.name != "enabled"]
        if changed and not self.enabled:
            raise ValueError(f"{changed[0]} has no effect with enabled = false; remove it or set enabled to true")
        if self.backend == "transformer_engine":
            for name in ("recipe", "all_gather", "emulate"):
                if name in changed:
                    raise ValueError(
                        f"{name} = {getattr(self, name)!r} is only for backend = 'torchao', but backend is "
                        "'transformer_engine'; remove one of the two"
                    )
        if self.all_gather and self.recipe != "tensorwise":
            raise ValueError(
                f"all_gather = true needs one scale a tensor, but recipe is {self.recipe!r}; set recipe to "
                "'tensorwise' or all_gather to false"
            )

    def for_role(self, role: str) -> Float8Config:
        """This section for a role in float8, a disabled one for all others."""
        return self if not self.roles or role in self.roles else Float8Config()


@dataclass(frozen=True, kw_only=True)
class SparseAttentionConfig:
    sparsity: float = 0.9
    """Share of the video's tiles that a tile does not attend to, in the end."""
    schedule_rate: float = 0.0
    """Sparsity grows from 0 by this much every schedule_interval steps; 0 starts with all of it."""
    schedule_interval: int = 1
    """Steps between two changes of the sparsity."""
    crossover: float = 0.5
    """Below this sparsity all tiles are read, by dense attention, which is then the faster one; 0 never is dense."""
    tiles_per_list: int = 1
    """Neighbouring tiles that choose together what they read: 2 make better use of the tensor cores, and are no longer
    quite the published method."""

    def __post_init__(self) -> None:
        check_range(self, "sparsity", least=0, below=1)
        check_range(self, "schedule_rate", least=0, below=1)
        check_range(self, "schedule_interval", least=1)
        check_range(self, "crossover", least=0, most=1)
        check_range(self, "tiles_per_list", least=1, most=2)
        if self.schedule_interval > 1 and not self.schedule_rate:
            raise ValueError(
                f"schedule_interval = {self.schedule_interval} has no effect with schedule_rate = 0; set "
                "schedule_rate, or remove it"
            )
        if self.schedule_rate > self.sparsity:
            raise ValueError(
                f"schedule_rate = {self.schedule_rate} is more than sparsity = {self.sparsity}, where the schedule "
                f"ends; set it to {self.sparsity} or less"
            )


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
    """Newest complete checkpoints to keep. A step whose folder has a file named pin is kept besides, for ever."""
    mode: Literal["sync", "async"] = "sync"
    """Whether training waits until a checkpoint is written (sync), or goes on beside that (async), for which the host
    needs memory for one copy of what is saved. Both write the same files."""
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
    scorer: str = "none"
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
    """Time limit of a collective until the first step is done (start-up includes loading and compiling), in seconds. It
    also limits saving and loading a checkpoint at any time, because ranks wait for the slowest disk."""
    train_timeout_seconds: int = 100
    """Time limit of a collective after the first step, in seconds; then the run ends."""
    validation_timeout_seconds: int = 3600
    """Time limit for ranks that wait for each other in a validation's report (scores, videos, uploads to trackers), in
    seconds."""

    def __post_init__(self) -> None:
        check_range(self, "init_timeout_seconds", "train_timeout_seconds", "validation_timeout_seconds", least=1)


def _check_degrees(section: ParallelismConfig | ParallelismOverride) -> None:
    check_range(section, "dp_replicate", "sequence", "tensor", least=1)
    if section.dp_shard != -1:
        check_range(section, "dp_shard", least=1)


def _check_optimizer(section: OptimizerConfig | OptimizerOverride) -> None:
    check_range(section, "lr", "eps", above=0, below=math.inf)
    check_range(section, "betas", least=0, below=1)
    check_range(section, "weight_decay", least=0, below=math.inf)
