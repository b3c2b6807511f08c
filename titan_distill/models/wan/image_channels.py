"""Image-to-video as in Wan 2.1 and Wan 2.2 A14B: the picture enters through separate input channels.

In addition to 16 channels of noisy latents a network takes 20 more: first a mask of 4 channels, one for each video
frame of a latent frame, which is 1 on the first latent frame and 0 elsewhere; then the latent of a clip that shows the
picture first and is grey afterwards. Wan 2.1's network also attends to 257 CLIP tokens of the picture; A14B's does not.
Unlike a TI2V model's (`first_frame`), the network generates the whole video: no frame is given, and every frame counts
in a loss.

The picture's latent is *not* the first latent frame of its video, because it includes the later latent frames of the
grey clip. So training data must contain it (`titan-distill data preprocess --images`), or videos, from which it is
computed here. A network reads from a condition only the tensors for which it has inputs, so a run may also have
networks without picture channels.

Shapes: B samples, C latent channels, F latent frames, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from titan_distill.models.base import Condition
from titan_distill.models.wan.config import WanConfig

LATENT, EMBEDDING = "image_latent", "image_embedding"
"""Names in conditions and data of the grey clip's latent [B, C, F, H, W] and of CLIP's tokens [B, tokens, D]."""

MASK_CHANNELS = 4


def takes_channels(config: WanConfig) -> bool:
    """Returns whether a network has input channels for a picture."""
    return config.in_channels == 2 * config.out_channels + MASK_CHANNELS


def needed_tensors(configs: Collection[WanConfig]) -> tuple[str, ...]:
    """Returns the names of the tensors, apart from text, that a condition must have for all of these networks. Raises
    ValueError for unsupported networks."""
    for config in configs:
        if config.pos_embed_seq_len is not None:
            raise ValueError("models that take a first and a last frame are not supported; choose other weights")
    latent = (LATENT,) if any(map(takes_channels, configs)) else ()
    return (*latent, *((EMBEDDING,) if any(config.image_dim is not None for config in configs) else ()))


def check_pictures(role: str, config: WanConfig, condition: Condition) -> None:
    """Raises ValueError if the condition lacks the picture tensors that a role's network needs."""
    if missing := [name for name in needed_tensors([config]) if name not in condition]:
        raise ValueError(f"{role} starts its videos from an image, but got no {missing[0]}; give an image (--image)")


def with_channels(x_BCFHW: Tensor, condition: Condition) -> Tensor:
    """Returns the network's input: the channels of noisy latents, mask, and the first F frames of the picture's
    latent."""
    latent = condition[LATENT][:, :, : x_BCFHW.shape[2]].to(x_BCFHW.dtype)
    mask = latent.new_zeros(len(latent), MASK_CHANNELS, *latent.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([x_BCFHW, mask, latent], 1)
