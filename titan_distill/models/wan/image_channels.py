"""Image-to-video as Wan 2.1 does it (and Wan 2.2 A14B): the picture enters through channels of its own.

Beside the 16 channels of noise a network takes 20 more: the latent of a clip that is the picture and then grey, and
before it a mask of 4 channels, one for each video frame that a latent frame stands for, 1 on the first latent frame and
0 elsewhere. Wan 2.1's network also attends to 257 CLIP tokens of the picture; A14B's does not. Unlike a TI2V model's
(`first_frame`), its whole video is made: no frame is given, and every frame counts in a loss.

The picture's latent is *not* the first latent frame of its video: later latent frames of the grey clip are part of it,
too. So training data must bring it (`titan-distill data preprocess --images`), or videos, of which it is made here. A
network takes from a condition what it has inputs for: beside an image-to-video network there may be one without.

Shapes: B samples, C latent channels, F latent frames, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from titan_distill.models.base import Condition
from titan_distill.models.wan.config import WanConfig

LATENT, EMBEDDING = "image_latent", "image_embedding"
"""In a condition and in data: the grey clip's latent [B, C, F, H, W], and CLIP's tokens [B, tokens, D]."""

MASK_CHANNELS = 4


def takes_channels(config: WanConfig) -> bool:
    """True for a network with inputs for a picture beside the noise."""
    return config.in_channels == 2 * config.out_channels + MASK_CHANNELS


def needed_tensors(configs: Collection[WanConfig]) -> tuple[str, ...]:
    """Tensors that a condition must have beside text for all of these networks. Raises ValueError for an unknown
    kind."""
    for config in configs:
        if config.pos_embed_seq_len is not None:
            raise ValueError("models that take a first and a last frame are not supported; choose other weights")
    latent = (LATENT,) if any(map(takes_channels, configs)) else ()
    return (*latent, *((EMBEDDING,) if any(config.image_dim is not None for config in configs) else ()))


def check_pictures(role: str, config: WanConfig, condition: Condition) -> None:
    """Raises ValueError when the condition lacks what a role's network takes of a picture."""
    if missing := [name for name in needed_tensors([config]) if name not in condition]:
        raise ValueError(f"{role} starts its videos from an image, but got no {missing[0]}; give an image (--image)")


def with_channels(x_BCFHW: Tensor, condition: Condition) -> Tensor:
    """The network's input: noisy latents, mask, and the picture's latent, of the first F frames."""
    latent = condition[LATENT][:, :, : x_BCFHW.shape[2]].to(x_BCFHW.dtype)
    mask = latent.new_zeros(len(latent), MASK_CHANNELS, *latent.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([x_BCFHW, mask, latent], 1)
