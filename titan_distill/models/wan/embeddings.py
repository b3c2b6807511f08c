"""The inputs of the Wan blocks: patches, timesteps, text and image, each projected to the model's width.

Timesteps are never rounded: 937.5 would be 936 in bf16, another noise level. They arrive in fp32 or fp64, and the
dtype is a choice: *fp32 timesteps* give diffusers' sinusoid to the last bit of its phases, *fp64 timesteps* the
official Wan's, whose frequencies and phases are fp64. The two differ by up to 6e-5 in a feature, which no bf16 model
notices but a parity test or a derivative in time does.

Shape suffixes: B batch, L tokens, P numbers in a patch, S text or image tokens, M model width, R distinct timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.layers import FeedForward, Float32LayerNorm, Float32Linear
from titan_distill.parallelisms.tensor import local

MAX_PERIOD = 10000.0


class PatchEmbedding(nn.Conv3d):
    """The patch projection: a convolution by name and weight shape, a matrix product in fact.

    Stride equals kernel size, so on patches that are already cut out nothing is left to convolve.
    """

    def forward(self, patches_BLP: Tensor) -> Tensor:
        bias = None if self.bias is None else local(self.bias)
        return F.linear(patches_BLP.to(self.weight.dtype), local(self.weight).flatten(1), bias)


class TwoLayerMlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(
        self, in_dim: int, dim: int, activation: Callable[[Tensor], Tensor], linear: type[nn.Linear] = nn.Linear
    ) -> None:
        super().__init__()
        self.linear_1 = linear(in_dim, dim)
        self.activation = activation
        self.linear_2 = linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class ImageEmbedding(nn.Module):
    """Projects CLIP image tokens; its norms use PyTorch's epsilon, not the model's, as diffusers' do."""

    def __init__(self, config: WanConfig, image_dim: int) -> None:
        super().__init__()
        self.norm1 = Float32LayerNorm(image_dim)
        self.ff = FeedForward(image_dim, image_dim, config.inner_dim, approximate="none")
        self.norm2 = Float32LayerNorm(config.inner_dim)
        self.pos_embed: nn.Parameter | None = None
        if config.pos_embed_seq_len is not None:
            self.pos_embed = nn.Parameter(torch.zeros(1, config.pos_embed_seq_len, image_dim))

    def forward(self, image: Tensor) -> Tensor:
        if self.pos_embed is not None:
            # First and last frame come as two batch entries and become one sequence of a sample.
            image = image.reshape(-1, 2 * image.shape[1], image.shape[2]) + local(self.pos_embed)
        return self.norm2(self.ff(self.norm1(image)))


def timestep_features(timestep_R: Tensor, num_features: int) -> Tensor:
    """Return cosines, then sines [R, num_features] of the timesteps at geometric frequencies 1 ... 1/10000, fp64.

    Frequencies and phases are formed in the timestep's dtype (see the module's docstring), cosines always in fp64.
    """
    num_frequencies = num_features // 2
    index = torch.arange(num_frequencies, dtype=timestep_R.dtype, device=timestep_R.device)
    frequencies = torch.exp(-math.log(MAX_PERIOD) * index / num_frequencies)
    phases = torch.outer(timestep_R, frequencies).double()
    return torch.cat((phases.cos(), phases.sin()), dim=-1)


class ConditionEmbedding(nn.Module):
    """Embeds time, text and image for the blocks."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self.num_features = config.freq_dim
        self.time_embedder = TwoLayerMlp(config.freq_dim, dim, F.silu, Float32Linear)
        self.time_proj = Float32Linear(dim, 6 * dim)
        self.text_embedder = TwoLayerMlp(config.text_dim, dim, partial(F.gelu, approximate="tanh"))
        self.image_embedder = None if config.image_dim is None else ImageEmbedding(config, config.image_dim)

    def forward(
        self, timestep_R: Tensor, text: Tensor, image: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the head's modulation [R, M] and the blocks' [R, 6, M], both fp32, text [B, S, M], image [B, S, M]."""
        embedded_RM = self.time_embedder(timestep_features(timestep_R, self.num_features))
        rows_R6M = self.time_proj(F.silu(embedded_RM)).unflatten(1, (6, -1))
        text_BSM = self.text_embedder(text.to(self.text_embedder.linear_1.weight.dtype))
        image_BSM = None if self.image_embedder is None or image is None else self.image_embedder(image)
        return embedded_RM, rows_R6M, text_BSM, image_BSM
