"""The sections of a configuration about the run: every key with its type, default and meaning.

The string literal under a field is its text in `--help`. The `__post_init__` of a section checks ranges and
contradictions within it. An error starts with the name of the field; the parser puts the file and the section before
it. The sections about models are in `role_sections.py`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from titan_distill.config.parsing import check_no_effect, check_range, nearest_multiples
from titan_distill.config.paths import is_url
from titan_distill.config.resume import free, logged, younger

Tile = tuple[int, int, int]
"""Tokens of a tile along (frames, height, width)."""
FIRST_TILE: Tile = (4, 4, 4)
"""Tile of sparse weights that do not say theirs: published ones, and those from before `sparse_attention.tile`."""
MAX_TILE_TOKENS = 128
MAX_FPS = 1000
"""Largest rate of a video, in frames per second."""


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    name: str = free()
    """Name of the run, used in the default output folder and in the trackers."""
    config_file: str = field(default="", compare=False)
    """TOML file with the configuration. Command line only."""
    output_dir: str = free("")
    """Folder for everything that the run writes. Default: outputs/<job.name>."""
    dry_run: bool = free(False)
    """Build the run without weights, print its memory plan, and exit."""
    overwrite: bool = field(default=False, compare=False)
    """Move the content of an output folder that an earlier run has used to NAME.old-TIME. Command line only; ignored
    after a requeue."""
    seed: int = 0
    """Seed of all random draws: data order, noise, timesteps, caption dropout."""
    imports: tuple[str, ...] = free(())
    """Python modules to import first. They register methods, model families and scorers that other keys can name."""

    def __post_init__(self) -> None:
        check_range(self, "seed", least=0)
        if self.name in ("", ".", "..") or re.search(r"[/\\\0]", self.name):
            raise ValueError(f"name = {self.name!r} names a folder, so it cannot be empty or a path; use a plain name")
        for module in self.imports:
            if not all(part.isidentifier() for part in module.split(".")):
                raise ValueError(f"imports has {module!r}, which is no module name; write it as in an import statement")

    @property
    def output_folder(self) -> Path:
        """Folder for everything that the run writes, with the default filled in."""
        return Path(self.output_dir or f"outputs/{self.name}")


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    method: str
    """Training method: dmd2, self_forcing, finetune, knowledge_distillation, consistency, scm, rcm, or one that a
    module of job.imports registers."""
    family: str = "wan"
    """Model family: wan, or one that a module of job.imports registers."""


TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
"""Ends of the names of tables of videos and prompts, in small letters (`titan_distill.data.tables`)."""


def is_table(path: str) -> bool:
    """Returns whether data is a table of videos and prompts, not parquet."""
    return path.lower().endswith(TABLE_SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class DataSource:
    path: str
    """Parquet file, folder of parquet files, or URL of one of them."""
    weight: float = 1.0
    """Passes over the set per epoch. 2 uses each row twice per epoch; 0.5 uses each row once in two epochs."""

    def __post_init__(self) -> None:
        if not self.path or is_table(self.path):
            raise ValueError(
                f"path = {self.path!r} is no parquet; one of several sources is a parquet file or a folder of them"
            )
        check_range(self, "weight", least=1e-6, most=1e6)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = logged("")
    """Parquet file or folder of parquet files with latents and text embeddings (only text, where the method needs no
    latents), or a table of videos and prompts (.csv, .tsv, .jsonl, .json), which the run encodes while it trains.
    Parquet may also be at a URL that fsspec opens, such as s3://bucket/folder."""
    sources: tuple[DataSource, ...] = logged(())
    """Several sets, in place of path: tables [[data.sources]] with the keys path and weight, the passes over the set
    per epoch (default 1.0, so each row occurs once per epoch)."""
    latents: Literal["raw", "normalised"] | None = logged(None)
    """Form of the latents in parquet data. raw: means of the VAE's posterior, as FastVideo stores them; they are
    normalised while they are read. normalised: as the networks take them, as `titan-distill data preprocess` stores
    them. It holds for sets without a titan_data.json that states the form. Default: found from the statistics of the
    first rows, and asked for where these are not clear."""
    max_text_tokens: int = logged(512)
    """Text tokens per sample. Shorter text embeddings are padded with zeros, longer ones in the data are refused;
    prompts that the run encodes itself (of a table or for validation) are cut."""
    num_workers: int = free(0)
    """Loader processes per rank. 0 reads in the training process."""
    max_bad_rows: int = logged(0)
    """Largest number of unreadable rows that may be skipped, each with a line in the log. One more ends the run."""
    fps: float | None = logged(None)
    """Frames per second to which the videos of a table are resampled. Default: every frame as it is."""

    def __post_init__(self) -> None:
        check_range(self, "max_text_tokens", least=1, most=2**16)
        check_range(self, "num_workers", least=0, most=1024)
        check_range(self, "max_bad_rows", least=0)
        if self.sources and self.path:
            raise ValueError(f"path = {self.path!r} and sources name data; keep one of the two")
        if not (self.sources or self.path):
            raise ValueError(
                "path is required but missing; set it to a parquet file, a folder of parquet files or a table of "
                "videos, or name several sets by [[data.sources]]"
            )
        if len(self.sources) == 1:
            raise ValueError(f"sources has one set, {self.sources[0].path!r}; set data.path to it, or add another set")
        if len(set(self.paths)) < len(self.paths):
            raise ValueError("sources names one set twice; give it one entry with a higher weight")
        if self.holds_videos and is_url(self.path):
            raise ValueError(f"path = {self.path!r} is a table at a URL, but videos must be on this machine; copy them")
        check_range(self, "fps", above=0, most=MAX_FPS)
        if self.fps is not None and not self.holds_videos:
            raise ValueError(
                f"fps = {self.fps} has no effect on path = {self.path!r}, which is no table of videos; remove it"
            )
        if self.latents is not None and self.holds_videos:
            raise ValueError(
                f"latents = {self.latents!r} has no effect on path = {self.path!r}, a table of videos; remove it"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all sets."""
        return tuple(self.keys.values())

    @property
    def keys(self) -> dict[str, str]:
        """Paths of all sets by the key that names them."""
        several = {f"data.sources[{at}].path": source.path for at, source in enumerate(self.sources)}
        return several or {"data.path": self.path}

    @property
    def holds_videos(self) -> bool:
        """Whether the data is a table of videos and prompts, which the run encodes while it trains."""
        return is_table(self.path)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    may_be_infinite: ClassVar = ("max_grad_norm",)

    steps: int = logged()
    """Training steps of the whole run, including the steps before a resume."""
    global_batch_size: int
    """Samples per step, over all ranks."""
    local_batch_size: int = free()
    """Micro-batch size per rank. `global_batch_size / (ranks × local_batch_size)` micro-batches must be a whole number.
    Ranks that share samples (sequence, tensor) count as one."""
    reduce_gradients: Literal["last", "every"] = free("last")
    """Micro-batches whose backward sums gradients over ranks. last: only the last one, and until then each rank holds
    whole gradients in float32. every: each one, and a rank holds its shard only but sends gradients every time."""
    dtype: Literal["float32", "bfloat16"] = logged("float32")
    """Compute type of forward and backward. Reductions, timesteps and trained weights stay in float32."""
    max_grad_norm: float = logged(10.0)
    """Gradient clipping: the largest L2 norm of a role's gradients, over all ranks. inf does not clip."""
    gc_interval: int = free(50)
    """Steps between runs of Python's garbage collector, which all ranks start at the same step."""
    max_nonfinite_skips: int = logged(0)
    """Largest number of updates per role that may be skipped because a loss or gradient is not finite. One more ends
    the run."""

    def __post_init__(self) -> None:
        check_range(self, "steps", "gc_interval", least=1)
        check_range(self, "global_batch_size", "local_batch_size", least=1, most=2**20)
        check_range(self, "max_nonfinite_skips", least=0)
        check_range(self, "max_grad_norm", above=0)
        if self.global_batch_size % self.local_batch_size:
            raise ValueError(
                f"global_batch_size = {self.global_batch_size} is not a multiple of local_batch_size = "
                f"{self.local_batch_size}; choose {nearest_multiples(self.global_batch_size, self.local_batch_size)}"
            )


@dataclass(frozen=True, kw_only=True)
class LrSchedulerConfig:
    warmup_steps: int = logged(0)
    """Updates of a role during which its learning rate rises linearly to its peak."""
    decay: Literal["constant", "linear", "cosine"] = logged("constant")
    """Learning-rate decay after the warm-up. linear and cosine reach min_lr_ratio at the role's last update."""
    min_lr_ratio: float = logged(0.0)
    """Final learning rate as a fraction of the peak."""

    def __post_init__(self) -> None:
        check_range(self, "warmup_steps", least=0)
        check_range(self, "min_lr_ratio", least=0, most=1)
        if self.decay == "constant":
            check_no_effect(self, "min_lr_ratio", given="decay")


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointConfig:
    mode: Literal["none", "full", "selective"] = free("none")
    """full stores only the input of each block and recomputes the rest in the backward: least memory, a third more
    FLOPs. selective also stores attention outputs and every selective_interval-th matrix product."""
    selective_interval: int | None = free(None)
    """With mode = selective, store the output of every n-th matrix product of a block. Default: 2."""
    store_hidden: bool = free(True)
    """With mode = selective, also store the hidden activations of the feed-forward, the largest output of a block.
    false recomputes them: for 1.3B at 480p 16 GiB less, and 3 % more FLOPs."""
    skip_interval: int = free(0)
    """Leave every n-th block without activation checkpointing. 0 checkpoints all blocks."""

    def __post_init__(self) -> None:
        check_range(self, "selective_interval", least=1)
        check_range(self, "skip_interval", least=0)
        if self.mode != "selective":
            check_no_effect(self, "selective_interval", "store_hidden", given="mode")
        if self.mode == "none":
            check_no_effect(self, "skip_interval", given="mode")
        if self.skip_interval == 1:
            raise ValueError(
                "skip_interval = 1 leaves all blocks without activation checkpointing; choose 2 or more, or set mode "
                "to 'none'"
            )

    @property
    def interval(self) -> int:
        """`selective_interval` with its default filled in."""
        return 2 if self.selective_interval is None else self.selective_interval


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    enabled: bool = free(False)
    """Compile each transformer block with torch.compile."""
    mode: Literal["default", "max-autotune-no-cudagraphs"] = free("default")
    """Mode of torch.compile. max-autotune-no-cudagraphs times kernel variants at start-up, which takes minutes."""

    def __post_init__(self) -> None:
        if not self.enabled:
            check_no_effect(self, "mode", given="enabled")


@dataclass(frozen=True, kw_only=True)
class Float8Config:
    enabled: bool = logged(False)
    """Compute the large linear layers of the blocks in float8. Stored weights and optimizer state do not change."""
    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = logged("tensorwise")
    """Scales: one per tensor (fastest), one per row (more exact), or one per row with weight gradients in high
    precision (most exact)."""
    backend: Literal["torchao", "transformer_engine"] = logged("torchao")
    """Float8 library. transformer_engine is an optional dependency and supports recipe = tensorwise only."""
    roles: tuple[str, ...] = logged(())
    """Roles in float8. Default: all, because the forwards of a large frozen teacher are most of the FLOPs."""
    min_features: int = logged(1024)
    """Linear layers with fewer inputs or outputs stay in high precision, because casting costs more than it saves."""
    all_gather: bool = logged(False)
    """Gather FSDP2 weights in float8 instead of the compute type. Needs recipe = tensorwise and backend = torchao."""
    emulate: bool = logged(False)
    """Round to float8 but multiply in float32. Slow; for tests on machines without float8 hardware."""

    def __post_init__(self) -> None:
        check_range(self, "min_features", least=16)
        if not self.enabled:
            check_no_effect(self, *(f.name for f in fields(self)), given="enabled")
        if self.backend == "transformer_engine":
            check_no_effect(self, "recipe", "all_gather", "emulate", given="backend")
        if self.all_gather and self.recipe != "tensorwise":
            raise ValueError(
                f"all_gather = true needs one scale per tensor, but recipe is {self.recipe!r}; set recipe to "
                "'tensorwise' or all_gather to false"
            )

    def for_role(self, role: str) -> Float8Config:
        """This section for a role in float8, a disabled section for any other role."""
        return self if not self.roles or role in self.roles else Float8Config()


def check_tile(section: Any) -> None:
    """Raises ValueError for a `section.tile` of no tokens or too many."""
    if section.tile in (None, "auto"):
        return
    check_range(section, "tile", least=1)
    if (num_tokens := math.prod(section.tile)) > MAX_TILE_TOKENS:
        raise ValueError(
            f"tile = {list(section.tile)} has {num_tokens} tokens; choose a tile of at most {MAX_TILE_TOKENS}"
        )


@dataclass(frozen=True, kw_only=True)
class SparseAttentionConfig:
    sparsity: float = logged(0.9)
    """Final sparsity: fraction of key tiles that a query tile skips."""
    schedule_rate: float = logged(0.0)
    """Amount added to the sparsity, which starts at 0, every schedule_interval steps. 0: the final sparsity from the
    first step."""
    schedule_interval: int = logged(1)
    """Steps between increases of the sparsity."""
    crossover: float = logged(0.5)
    """Lowest sparsity at which attention is sparse. Below it dense attention reads all tiles, which is faster at low
    sparsity. 0 is always sparse."""
    tiles_per_list: int = logged(1)
    """Neighbouring query tiles that share one list of key tiles. 2 uses the tensor cores better and differs slightly
    from the published method."""
    tile: Literal["auto"] | Tile = younger("auto", before=FIRST_TILE)
    """Tokens of a tile along (frames, height, width), at most 128 together. auto takes the tile that the weights were
    trained with ([4, 4, 4] if sparse weights do not say), and for dense weights the one of [4, 4, 4] and [3, 5, 4] that
    wastes less on the token grid. A run decides once and writes numbers into its config.toml, checkpoints, exports."""

    def __post_init__(self) -> None:
        check_range(self, "sparsity", least=0, below=1)
        check_range(self, "schedule_rate", least=0, below=1)
        check_range(self, "schedule_interval", least=1)
        check_range(self, "crossover", least=0, most=1)
        check_range(self, "tiles_per_list", least=1, most=2)
        check_tile(self)
        if not self.schedule_rate:
            check_no_effect(self, "schedule_interval", given="schedule_rate")
        if self.schedule_rate > self.sparsity:
            raise ValueError(
                f"schedule_rate = {self.schedule_rate} is more than sparsity = {self.sparsity}, where the schedule "
                f"ends; set it to {self.sparsity} or less"
            )


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    decay: float = logged(0.0)
    """Decay of the average per update of the role. 0 turns the average off."""
    start_step: int = logged(0)
    """Training steps, counted for every role alike, before the average begins. Until then it equals the weights. At
    200 steps and five steps per student update, the student has had 40 updates."""
    role: str = "student"
    """Trained role whose weights are averaged."""

    def __post_init__(self) -> None:
        check_range(self, "decay", least=0, below=1)
        check_range(self, "start_step", least=0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    enabled: bool = free(True)
    """Save a checkpoint every interval and after the last step."""
    interval: int = free(500)
    """Steps between checkpoints."""
    keep: int = free(3)
    """Number of newest complete checkpoints to keep. A step whose folder has a file named pin is never deleted."""
    mode: Literal["sync", "async"] = free("sync")
    """sync waits until a checkpoint is written. async trains while a process of low priority writes it, and needs host
    memory for one copy of the saved state. Both write the same files."""
    resume_from: str = free("")
    """Checkpoint to resume from: latest (of this run's output folder) or a path. Default: a fresh start."""
    allow_changed_data: bool = field(default=False, compare=False)
    """Resume although the files of data.path are not those of the checkpoint. Samples after the resume come in the
    order of the changed data. It holds for one start and is not recorded: give it on the command line."""

    def __post_init__(self) -> None:
        check_range(self, "interval", "keep", least=1)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    enabled: bool = free(True)
    """Sample and score videos during the run."""
    interval: int = free(0)
    """Steps between validations. 0 validates only before the first and after the last step."""
    prompts: str = logged("")
    """Parquet, txt or jsonl file with prompts. Default: the captions of data.path, or of the first of data.sources."""
    data: str = logged("")
    """Held-out data of the kind of data.path, which the run does not train on. Each validation measures the method's
    own losses and metrics on its rows, with the trained weights and always the same noise, as validation/loss/<role>
    and so on; finetune also measures its loss per noise level. It works without enabled, too."""
    num_rows: int = logged(64)
    """Number of rows of `data` to measure, from the first on. If there are fewer, all are measured."""
    num_prompts: int = logged(96)
    """Number of prompts to sample and score."""
    batch_size: int = free(16)
    """Videos per rank to sample at once."""
    seed: int = logged(0)
    """Seed of the initial noise. Runs with equal seeds have comparable validations."""
    num_videos: int = free(8)
    """Number of samples to write as mp4 and to show on the contact sheet."""
    fps: int = free(8)
    """Frames per second of the written videos."""
    scorer: str = logged("none")
    """Scorer of decoded videos: none, or one that a module of job.imports registers (tiny_world registers shapes, which
    reads colour, shape and direction from drawn clips)."""

    def __post_init__(self) -> None:
        check_range(self, "num_prompts", "num_rows", least=1, most=2**20)
        if not self.data:
            check_no_effect(self, "num_rows", given="data")
        check_range(self, "fps", least=1, most=MAX_FPS)
        check_range(self, "batch_size", least=1)
        check_range(self, "interval", "seed", least=0)
        check_range(self, "num_videos", least=0, most=1024)

    def clipped(self) -> list[str]:
        """Returns a sentence if there are fewer prompts than `num_videos`."""
        if not self.enabled or self.num_videos <= self.num_prompts:
            return []
        return [f"validation.num_videos = {self.num_videos} is clipped to num_prompts = {self.num_prompts}"]


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    enabled: bool = free(True)
    """Compare measures of the run with their healthy ranges (docs/doctor.md): in training at no forward of its own, in
    validations on their samples and a few more."""
    on_alarm: Literal["warn", "stop"] = free("warn")
    """Action when a measure leaves its healthy range. warn writes a line into log and doctor.jsonl. stop also ends the
    run after the next step, with a checkpoint and exit code 3."""

    def __post_init__(self) -> None:
        if not self.enabled:
            check_no_effect(self, "on_alarm", given="enabled")


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    log_interval: int = free(1)
    """Steps between lines of metrics.jsonl and between points in the trackers."""
    tensorboard: bool = free(False)
    """Write TensorBoard events, too."""
    wandb: bool = free(False)
    """Log to Weights & Biases, too. The API key comes from the environment (WANDB_API_KEY)."""
    wandb_project: str = free("titan_distill")
    """Weights & Biases project."""

    def __post_init__(self) -> None:
        check_range(self, "log_interval", least=1)


@dataclass(frozen=True, kw_only=True)
class ProfilingConfig:
    enabled: bool = free(False)
    """Record a torch.profiler trace in the folder profile/ of the run."""
    start_step: int = free(10)
    """Steps before the trace."""
    num_steps: int = free(3)
    """Number of steps in the trace."""

    def __post_init__(self) -> None:
        check_range(self, "start_step", least=0)
        check_range(self, "num_steps", least=1)


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    init_timeout_seconds: int = free(300)
    """Time limit per collective, in seconds, until the first step is done, which includes loading and compiling. It
    also limits saving and loading a checkpoint at any time, because ranks wait for the slowest disk."""
    train_timeout_seconds: int = free(100)
    """Time limit per collective after the first step, in seconds. A longer wait ends the run."""
    validation_timeout_seconds: int = free(3600)
    """Time limit, in seconds, for ranks that wait for each other while rank 0 reports a validation (scores, videos,
    uploads to trackers)."""

    def __post_init__(self) -> None:
        names = ("init_timeout_seconds", "train_timeout_seconds", "validation_timeout_seconds")
        check_range(self, *names, least=1, most=30 * 24 * 3600)
