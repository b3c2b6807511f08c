"""FLOPs of a step, and utilisation: the achieved share of the machine's peak.

FLOPs of a Wan-like DiT follow from its configuration: 2 per multiply-add, matrix products and attention only (norms,
modulation and softmax are below half a percent). For N video tokens, T text tokens, width d, hidden width f and L
layers, one forward of one sample is

    L [ N (12 d² + 4 d f)  +  4 N² d  +  4 N T d + 4 T d² ]  +  embeddings
        linear layers         self      cross-attention

where 12 d² is q, k, v, out of self-attention and q, out of cross-attention. At 480p the second term leads already.
Sparse attention with M tiles, of which each query tile reads K, has (gate, selected tiles, coarse branch, its scores)

    2 N d²  +  4 N (K N / M) d  +  4 M² d  +  2 M² d      instead of      4 N² d

so TFLOP/s and MFU never count the dense products that are skipped.

`WorkCounter` counts forwards where they run instead of predicting them, so that random rollout exits, doubled batches
of guidance and update ratios are right for every method, including those not written yet. Two totals are kept:
*model* FLOPs are what the mathematics needs (a backward is two forwards), *hardware* FLOPs add what activation
checkpointing recomputes. MFU and HFU are their shares of the device's peak.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from titan_distill.attention.sparse import TilesRead
from titan_distill.config.sections import ActivationCheckpointConfig
from titan_distill.parallelisms.activation_checkpoint import is_checkpointed, is_kept

BACKWARD_FORWARDS = 2
"""Cost of a backward pass in forward passes: one for the gradients of the inputs, one for those of the weights."""

PEAK_BF16_FLOPS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
)
"""Dense bf16 tensor-core peak, FLOP/s, from NVIDIA's data sheets (halved where they quote sparsity), by a part of the
device's name; the first match counts. Float8 runs are measured against it too, so that MFU is comparable."""


class DiTConfig(Protocol):
    """Fields of a transformer's configuration that determine its cost, under diffusers' names."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def attention_head_dim(self) -> int: ...
    @property
    def ffn_dim(self) -> int: ...
    @property
    def in_channels(self) -> int: ...
    @property
    def out_channels(self) -> int: ...
    @property
    def patch_size(self) -> tuple[int, int, int]: ...
    @property
    def text_dim(self) -> int: ...
    @property
    def freq_dim(self) -> int: ...


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward of one sample, by kind."""

    linear: float
    self_attention: float
    """FLOPs of self-attention without its projections; the selection of tiles is included."""
    cross_attention: float
    embeddings: float
    """Patch, text and time embedding, and the output head."""
    data_layers: float
    """The part of the embeddings that reads data: a backward does not compute the gradients of its inputs."""
    selection: float = 0.0
    """The part of self-attention that scores tiles to choose some: it has no gradient."""

    @property
    def total(self) -> float:
        return self.linear + self.self_attention + self.cross_attention + self.embeddings

    @property
    def backward(self) -> float:
        """Exact where all weights are trained; `BACKWARD_FORWARDS * total` is 0.1 % more."""
        return BACKWARD_FORWARDS * (self.total - self.selection) - self.data_layers

    @property
    def backward_of_inputs(self) -> float:
        """Backward where only LoRA adapters are trained: no gradients of the weights; the FLOPs of the LoRA adapters
        themselves are left out."""
        return self.total - self.selection - self.data_layers


def forward_flops(
    config: DiTConfig,
    num_tokens: int,
    num_text_tokens: int = 512,
    sparse: TilesRead | None = None,
    num_keys: float | None = None,
) -> ForwardFlops:
    """Cost of one forward for one sample of `num_tokens` video tokens with one timestep; with dense attention, or
    with a sparse core that reads tiles of average length. `num_keys`: video tokens that each token attends to, on
    average, where that is not all of them: fewer in a causal forward, more where a KV cache holds others.

    The image tokens that I2V models attend to are left out (0.3 % of a 14B forward at 480p).
    """
    width = config.num_attention_heads * config.attention_head_dim
    patch_volume = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    patches_in, patches_out = (
        2 * num_tokens * width * patch_volume * channels for channels in (config.in_channels, config.out_channels)
    )
    text_in, text_out = (2 * num_text_tokens * rows * width for rows in (config.text_dim, width))
    time_in, time_out = 2 * config.freq_dim * width, 2 * 7 * width**2
    keys = num_tokens if num_keys is None else num_keys
    fine, coarse, selection = 4.0 * num_tokens * keys * width, 0.0, 0.0
    if sparse is not None:
        fine *= sparse.num_selected / sparse.num_tiles
        coarse = 4 * sparse.num_tiles**2 * width
        selection = 2 * sparse.num_lists * sparse.num_tiles * width
    return ForwardFlops(
        linear=config.num_layers * num_tokens * ((12 + 2 * bool(sparse)) * width**2 + 4 * width * config.ffn_dim),
        self_attention=config.num_layers * (fine + coarse + selection),
        cross_attention=config.num_layers * 4 * num_text_tokens * width * (num_tokens + width),
        embeddings=patches_in + patches_out + text_in + text_out + time_in + time_out,
        data_layers=patches_in + text_in + time_in,
        selection=config.num_layers * selection,
    )


def block_matmuls(
    config: DiTConfig, num_tokens: int, num_text_tokens: int = 512, *, gated: bool = False
) -> tuple[float, ...]:
    """FLOPs of the matrix products of one block for one sample, in the order in which they run, without attention
    itself. Self-attention: query, key, value, gate (if any), output; cross-attention: query, key, value, output;
    feed-forward: both layers."""
    width = config.num_attention_heads * config.attention_head_dim
    video, text = 2 * num_tokens * width**2, 2 * num_text_tokens * width**2
    hidden = 2 * num_tokens * width * config.ffn_dim
    return (video, video, video, *[video] * gated, video, video, text, text, video, hidden, hidden)


def recomputed_share(
    config: DiTConfig,
    checkpointing: ActivationCheckpointConfig,
    num_tokens: int,
    num_text_tokens: int = 512,
    sparse: TilesRead | None = None,
    num_keys: float | None = None,
) -> float:
    """Share of a forward's FLOPs that its backward computes again: in each checkpointed block the matrix products that
    are not kept and, where only inputs are kept, attention. Embeddings and head are never recomputed."""
    forward = forward_flops(config, num_tokens, num_text_tokens, sparse, num_keys)
    gated = sparse is not None
    recomputed = recomputed_matmuls(config, checkpointing, num_tokens, num_text_tokens, gated=gated)
    if checkpointing.mode == "full":
        matmuls = config.num_layers * sum(block_matmuls(config, num_tokens, num_text_tokens, gated=gated))
        attention = forward.total - forward.embeddings - matmuls
        recomputed += checkpointed_share(config, checkpointing) * attention
    return recomputed / forward.total


def recomputed_matmuls(
    config: DiTConfig, checkpointing: ActivationCheckpointConfig, num_tokens: int, num_text_tokens: int, *, gated: bool
) -> float:
    """FLOPs of the blocks' matrix products, without attention, that a backward of one sample computes again."""
    matmuls = block_matmuls(config, num_tokens, num_text_tokens, gated=gated)
    hidden = len(matmuls) - 2
    recomputed = sum(
        flops for at, flops in enumerate(matmuls) if not is_kept(at, checkpointing, is_hidden=at == hidden)
    )
    return checkpointed_share(config, checkpointing) * config.num_layers * recomputed


def checkpointed_share(config: DiTConfig, checkpointing: ActivationCheckpointConfig) -> float:
    """Fraction of the blocks with activation checkpointing."""
    return sum(is_checkpointed(index, checkpointing) for index in range(config.num_layers)) / config.num_layers


@dataclass(frozen=True)
class Work:
    """FLOPs that one rank has executed."""

    model_flops: float = 0.0
    hardware_flops: float = 0.0


class WorkCounter:
    """Adds up the FLOPs of this rank's networks; the family's adapter reports every forward."""

    def __init__(self, tokens_per_sample: int) -> None:
        self.tokens_per_sample = tokens_per_sample
        self._step_tokens: list[int] = []
        self._model_flops = self._hardware_flops = 0.0
        self._copies = 1

    def paused(self) -> AbstractContextManager[None]:
        """Suspends counting within the block, for instance for a validation."""
        return self._counting(0)

    def forward_mode(self) -> AbstractContextManager[None]:
        """Counts every forward twice for the duration of the block: it carries a tangent, which doubles the FLOPs of
        matrix products and triples those of self-attention."""
        return self._counting(2)

    @contextmanager
    def _counting(self, copies: int) -> Iterator[None]:
        self._copies, before = copies, self._copies
        try:
            yield
        finally:
            self._copies = before

    def forward(
        self, flops: float, *, backward: bool, recompute: float, frozen: bool = False, self_attention: float = 0.0
    ) -> None:
        """Counts one forward of `flops`, of them `self_attention`, for all its samples and, where there is one, its
        backward, which computes the share `recompute` of the forward again. `frozen`: the weights themselves have no
        gradients, only LoRA adapters beside them, so that half of a backward falls away."""
        flops = flops * self._copies + self_attention * (self._copies > 1)
        backwards = 1 if frozen else BACKWARD_FORWARDS
        self._model_flops += flops * (1 + backwards * backward)
        self._hardware_flops += flops * (1 + (backwards + recompute) * backward)

    def count_step(self, tokens_per_sample: int) -> None:
        """Counts the tokens of each sample of a training step, which in a run with buckets differ between steps;
        nothing while counting is paused."""
        if self._copies:
            self._step_tokens.append(tokens_per_sample)

    def drain_tokens(self) -> float:
        """Returns the mean tokens per sample of the steps since the last call; `tokens_per_sample` for no steps."""
        counted, self._step_tokens = self._step_tokens, []
        return sum(counted) / len(counted) if counted else self.tokens_per_sample

    def drain(self) -> Work:
        """Returns the FLOPs since the last call."""
        work = Work(self._model_flops, self._hardware_flops)
        self._model_flops = self._hardware_flops = 0.0
        return work


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of a device; None on CPUs and on GPUs that the table lacks, whose utilisation is not logged."""
    if device.type != "cuda":
        return None
    return peak_flops_by_name(torch.cuda.get_device_name(device))


def peak_flops_by_name(name: str) -> float | None:
    """Peak bf16 FLOP/s by device name, e.g. `NVIDIA H100 80GB HBM3`; None when it is unknown."""
    return next((peak for part, peak in PEAK_BF16_FLOPS if part in name), None)


def utilization(work: Work, seconds: float, peak: float | None) -> dict[str, float]:
    """`tflops`: model TFLOP/s of this device; `mfu` and `hfu`: shares of `peak` FLOP/s, where it is known."""
    values = {"tflops": work.model_flops / seconds / 1e12}
    if peak is not None:
        values |= {"mfu": work.model_flops / seconds / peak, "hfu": work.hardware_flops / seconds / peak}
    return values
