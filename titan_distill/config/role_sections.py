"""The sections about models: `[roles.<name>]`, and `[optimizer]` and `[parallelism]`, which a role may override.

`[roles.<name>.optimizer]` names only the keys that differ from `[optimizer]`. Loading lays the role's table over the
section (`loading.complete_roles`), so each loaded role has a complete `OptimizerConfig` and `ParallelismConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from titan_distill.config.parsing import check_no_effect, check_range
from titan_distill.config.paths import is_reference
from titan_distill.config.resume import free, logged
from titan_distill.config.sections import Tile, check_tile

HEAD_FLAVOR = "head"
"""The `flavor` of a role that is a small head on another role's features."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw"] = "adamw"
    """Optimizer of all trained roles."""
    lr: float = logged(2e-6)
    """Peak learning rate."""
    betas: tuple[float, float] = logged((0.0, 0.999))
    """Decay rates of AdamW's first and second moment. The first is 0 because DMD2 trains without momentum."""
    eps: float = logged(1e-8)
    """Constant added to the square root of the second moment."""
    weight_decay: float = logged(0.01)
    """Decoupled weight decay."""

    def __post_init__(self) -> None:
        check_range(self, "lr", "eps", above=0, most=1)
        check_range(self, "betas", least=0, below=1)
        check_range(self, "weight_decay", least=0, most=10)


@dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
    dp_replicate: int = free(1)
    """Replicas of the sharded weights (HSDP). Gradients are summed over replicas."""
    dp_shard: int = free(-1)
    """Ranks that shard one replica of the weights and load different samples (FSDP2). -1 takes all remaining ranks."""
    sequence: int = free(1)
    """Ranks that share the tokens of each sample (sequence parallelism). They shard the weights, too."""
    tensor: int = free(1)
    """Ranks that share each weight matrix (tensor parallelism). Must divide the number of attention heads."""
    sequence_method: Literal["auto", "ulysses", "all_gather"] = free("auto")
    """Attention under sequence parallelism. ulysses exchanges tokens for heads; sequence × tensor must divide the
    heads. all_gather gathers keys and values and has no such condition. auto takes ulysses where the heads allow it."""
    token_region: bool = free(False)
    """Shard the tokens over the tensor ranks between tensor-parallel layers (Megatron's sequence parallelism). Norms
    and residuals take less memory at equal traffic."""
    async_tensor: bool = free(False)
    """Overlap tensor-parallel communication with matrix products. Needs CUDA and compile.enabled."""
    reshard_after_forward: bool = free(True)
    """Free a block's gathered weights after its forward and gather them again for its backward."""
    cpu_offload: bool = free(False)
    """Store weights, gradients and optimizer state in host memory."""
    exchange_groups: Literal["all", "in_turn"] = free("all")
    """Batches of a role whose sequence × tensor ranks span several groups of ranks with different samples. all runs the
    samples of all groups in one batch. in_turn runs one group's samples at a time, which takes the memory of one group
    (except for what a trained role stores for its backward) but gathers the weights for each."""

    def __post_init__(self) -> None:
        check_range(self, "dp_replicate", "sequence", "tensor", least=1)
        if self.dp_shard != -1:
            check_range(self, "dp_shard", least=1)
        if self.tensor == 1:
            check_no_effect(self, "token_region", "async_tensor", given="tensor")

    @property
    def model_parallel(self) -> int:
        """Number of ranks that share the same samples."""
        return self.sequence * self.tensor


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 0
    """Rank of the LoRA adapters, which train in place of the role's weights. 0 trains all weights."""
    alpha: float | None = None
    """LoRA scaling is alpha / rank. Default: alpha = rank."""
    target_modules: tuple[str, ...] = ()
    """Linear layers of the blocks with a LoRA adapter, by the end of their names (to_q, ffn.net.2). Default: all."""

    def __post_init__(self) -> None:
        check_range(self, "rank", least=0)
        check_range(self, "alpha", above=0)
        if not self.rank:
            check_no_effect(self, "alpha", "target_modules", given="rank")

    @property
    def enabled(self) -> bool:
        """Whether LoRA adapters train in place of the weights."""
        return self.rank > 0

    @property
    def scale(self) -> float:
        """LoRA scaling: factor on the product of a LoRA adapter's two matrices."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    may_be_infinite: ClassVar = ("max_grad_norm",)

    trainable: bool
    """Whether this role has an optimizer. The method refuses what contradicts it (DMD2 never trains its teacher)."""
    path: str = free("")
    """Diffusers folder of the transformer, which gives architecture and weights. Excludes flavor and init_from."""
    flavor: str = ""
    """Architecture by name, e.g. tiny, 1.3B, 14B. Weights come from init_from."""
    init_from: str = free("")
    """Initial weights: a diffusers folder, or a role in a checkpoint as PATH#ROLE:ema or PATH#ROLE:raw, where PATH is a
    step's folder or checkpoints/latest. Default: random weights."""
    attention: Literal["dense", "sparse", "causal"] = "dense"
    """Self-attention of this role. sparse follows [sparse_attention]. causal generates a video block by block, each
    from the blocks before it. Both may start from dense weights."""
    tile: Literal["auto"] | Tile | None = None
    """Tile of this role's sparse attention. Default: sparse_attention.tile."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Storage type of the weights. auto stores trained weights in float32 and frozen weights in training.dtype."""
    optimizer: OptimizerConfig
    """Keys of [optimizer] that differ for this role; optimizer.name cannot differ. Default: all as in [optimizer]."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """LoRA: train low-rank adapters of the linear layers and leave the role's weights as they are."""
    max_grad_norm: float | None = logged(None)
    """Gradient clipping norm of this role. Default: training.max_grad_norm."""
    parallelism: ParallelismConfig
    """Keys of [parallelism] that differ for this role; async_tensor cannot differ. Default: all as in [parallelism]. A
    role that sets one of the four degrees takes none of them from [parallelism]: an unset dp_replicate, sequence or
    tensor is then 1, and an unset dp_shard takes all remaining ranks."""

    def __post_init__(self) -> None:
        check_range(self, "max_grad_norm", above=0)
        check_tile(self)
        if self.attention != "sparse":
            check_no_effect(self, "tile", given="attention")
        if not self.path and not self.flavor and not is_reference(self.init_from):
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
        if not self.trainable and self.max_grad_norm is not None:
            raise ValueError("trainable = false leaves max_grad_norm of this role without effect; remove it")
        if self.lora.enabled:
            self._check_lora()

    @property
    def is_pretrained(self) -> bool:
        """Whether the role starts from stored weights, rather than from random ones."""
        return bool(self.path or self.init_from)

    def _check_lora(self) -> None:
        rank = self.lora.rank
        if not self.trainable:
            raise ValueError(f"trainable = false leaves lora.rank = {rank} without effect; remove [lora]")
        if not (self.path or self.init_from):
            raise ValueError(
                f"lora.rank = {rank} adapts weights, but the role has none; set path or init_from, or rank to 0"
            )
        if self.attention == "sparse":
            raise ValueError(
                f"lora.rank = {rank} does not go with attention = 'sparse': dense weights lack its gates, and LoRA "
                "adapters do not train them; set attention to 'dense' or rank to 0"
            )
