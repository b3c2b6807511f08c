"""Image-to-video as in Wan 2.2 TI2V: the first latent frame is given, and its timestep tells the network so.

No channel and no encoder is added to the network. A mask m is 1 on every latent frame that is to be made and small on
the first one, where an image is given. The network sees

    x ← (1 − m) z + m x,        σ_frame = m σ,        t_frame = 1000 m σ,

with z the image's latent and x at noise level σ throughout. At m = 0 the frame is the image, clean, at time 0. The two
lines agree for every m: a mixture of z and of z noised to σ is z noised to m σ. So the clean estimate of a frame is
x0 = x − m σ v by its *own* level; the scalar σ would move the first frame along a velocity that nobody learned.

Samplers and methods keep x at one level σ and never look at frames: `held` puts the image back before each forward, so
that fresh noise, a solver's step or a rollout's may change the first frame in any way. No loss counts it.

**Training** mixes both kinds: a sample starts from an image with probability `image_probability`, and then m is by
default not 0 but exp(N(−3.5, 0.5)), about 0.03, drawn once a sample: a little noise on the given frame, so that the
network does not depend on an image without flaws (a model that continues its own video will give it such ones).
Sampling has m = 0, and so has the DMD2 recipe for TI2V-5B, in which every sample starts from an image.
The image is the sample's own first latent frame: the VAE is causal, so that frame is what the picture alone encodes to.
Both draws are keyed by the sample's id, which is unique over the run, and thus the same for all updates of a step.

Source: Wan 2.2 (TI2V-5B); formulas: docs/algorithms.md, "First frames of TI2V".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titan_distill.config.config import Config
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.diffusion.schedule import broadcast_sigma
from titan_distill.diffusion.transfer import to_device
from titan_distill.models.base import Condition

IMAGE, MASK = "first_frame", "first_frame_mask"
"""Names in a condition of the given latent frame [B, C, 1, H, W] and of m on that frame [B], which is 1 for a sample
without an image."""

# A mask beyond this would be no image any more; the law gets there once in ten million draws.
_MAX_TRAINING_MASK = 0.5


@dataclass(frozen=True)
class ImageMixing:
    """Random choice of the training samples that start from an image, and the noise on that image. `noise_mean` = -inf
    adds no noise."""

    noise: KeyedNoise
    probability: float
    noise_mean: float
    noise_std: float

    @classmethod
    def of_run(cls, config: Config) -> ImageMixing | None:
        """Returns the mixing of a run; None if no sample starts from an image."""
        pipeline, noise = config.pipeline_config, KeyedNoise(config.job.seed)
        if not pipeline.image_probability:
            return None
        return cls(noise, pipeline.image_probability, pipeline.image_noise_mean, pipeline.image_noise_std)

    def condition(self, ids: list[int], latents_BCFHW: Tensor) -> dict[str, Tensor]:
        """Returns the condition of training samples, except for its text."""
        level_B = self.noise.normal("first_frame/mask", 0, ids, (), device="cpu", dtype=torch.float64)
        mask_B = (self.noise_mean + self.noise_std * level_B).exp().clamp(max=_MAX_TRAINING_MASK)
        has_image_B = self.noise.uniform("first_frame/choice", 0, ids) < self.probability
        mask_B = torch.where(has_image_B, mask_B, 1.0)
        return {IMAGE: latents_BCFHW[:, :, :1], MASK: to_device(mask_B, latents_BCFHW.device)}


def given_frame(latents_BC1HW: Tensor) -> dict[str, Tensor]:
    """Returns the condition, except for its text, under which every video starts from a clean latent frame."""
    mask_B = torch.zeros(len(latents_BC1HW), dtype=torch.float64, device=latents_BC1HW.device)
    return {IMAGE: latents_BC1HW, MASK: mask_B}


def held(x_BCFHW: Tensor, sigma_B: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """Returns `x` at level `sigma_B` with the given frame in its place, and the noise level of each frame [B, 1, F, 1,
    1], float64.

    Under a condition without an image it returns `x` and the level [B] unchanged.
    """
    if MASK not in condition:
        return x_BCFHW, sigma_B
    mask_B1F11 = _mask(condition[MASK], x_BCFHW.shape[2])
    level = broadcast_sigma(sigma_B, x_BCFHW) * mask_B1F11
    mask = mask_B1F11.to(x_BCFHW.dtype)
    # Detached: what a loss makes of the other frames must not move a given one by the share m of it that is shown.
    given = (1 - mask) * condition[IMAGE].to(x_BCFHW.dtype) + mask * x_BCFHW.detach()
    return torch.where(mask == 1, x_BCFHW, given), level


def loss_mask(condition: Condition, num_frames: int) -> Tensor | None:
    """Returns [B, 1, F, 1, 1], 0 on given frames and 1 elsewhere; None under a condition without an image."""
    if MASK not in condition:
        return None
    return (_mask(condition[MASK], num_frames) == 1).double()


def without_frame(condition: Condition) -> Condition:
    """Returns the part of a condition that the network itself reads."""
    return {name: value for name, value in condition.items() if name not in (IMAGE, MASK)}


def _mask(first_B: Tensor, num_frames: int) -> Tensor:
    rest_BF = first_B.new_ones(len(first_B), num_frames - 1)
    return torch.cat([first_B[:, None], rest_BF], 1)[:, None, :, None, None]
