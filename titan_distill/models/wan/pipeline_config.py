"""The Wan family's own configuration: [pipeline_config] of recipe.family = "wan"."""

from __future__ import annotations

import math
from dataclasses import dataclass

from titan_distill.config.parsing import check_range
from titan_distill.models.wan.latents import num_latent_frames


@dataclass(frozen=True)
class WanPipelineConfig:
    """[pipeline_config] of ``recipe.family = "wan"``."""

    path: str = ""
    """Diffusers pipeline folder with vae, text_encoder, tokenizer and scheduler; "" where nothing is encoded or
    decoded."""
    flow_shift: float = 5.0
    """Shift of the noise schedule, for every role: sigma = s u / (1 + (s - 1) u). Wan uses 3 at 480p and 5 at 720p."""
    negative_prompt: str = ""
    """The unconditional side of classifier-free guidance."""
    height: int = 480
    """Video height in pixels."""
    width: int = 832
    """Video width in pixels."""
    num_frames: int = 81
    """Video length in frames, 4 n + 1."""
    boundary_ratio: float | None = None
    """Of roles with two experts: at timesteps of at least this share of 1000 the first is used, below it the second;
    none takes what the model_index.json of their pipeline folder says."""
    guidance_scale_2: float | None = None
    """Classifier-free guidance of the second expert, wherever a role with two is guided, as u + w (c - u); none guides
    both as the method says."""
    offload_text_encoder: bool = False
    """Keep the text encoder in host memory, each layer on the device only while it runs: 11 GB less, seconds more a new
    prompt."""
    frames_per_block: int = 3
    """Latent frames that a causal role makes at once, attending both ways within them and back to those before."""
    independent_first_frame: bool = False
    """The first block of a causal role is one latent frame: a picture."""
    cache_window_frames: int = 0
    """Latent frames whose keys and values a causal role keeps at most, sink_frames among them; 0 keeps all. A window
    bounds memory and work of a block, so that a video may become as long as it likes."""
    sink_frames: int = 0
    """Of cache_window_frames, how many are the video's first, for ever; the others are the latest."""
    image_probability: float = 0.0
    """Share of the training samples that start from an image, their own first latent frame (image-to-video); the rest
    has text only. Wan 2.2 TI2V was trained with 0.2."""
    image_noise_mean: float = -3.5
    """The image of a training sample gets noise of exp(N(image_noise_mean, image_noise_std)) times the sample's level;
    -inf leaves it clean."""
    image_noise_std: float = 0.5
    """See image_noise_mean."""
    validate_from_image: bool = False
    """Validation videos start from the pictures that validation.prompts has beside its prompts: a .csv with the column
    image (or video), or the first frames of parquet with latents."""

    def __post_init__(self) -> None:
        if self.flow_shift <= 0:
            raise ValueError(f"flow_shift = {self.flow_shift} must be positive; 1 means no shift")
        self._check_images()
        num_latent_frames(self.num_frames)
        if self.frames_per_block < 1:
            raise ValueError(f"frames_per_block = {self.frames_per_block} must be at least 1")
        for name in ("cache_window_frames", "sink_frames"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be 0 or more")
        if self.sink_frames and self.sink_frames >= self.cache_window_frames:
            raise ValueError(
                f"sink_frames = {self.sink_frames} are frames of cache_window_frames = {self.cache_window_frames}, "
                "which must leave room for later ones; lower the first or raise the second"
            )
        check_range(self, "boundary_ratio", above=0, below=1)
        for name in ("height", "width"):
            if getattr(self, name) < 16 or getattr(self, name) % 16:
                nearest = max(16, round(getattr(self, name) / 16) * 16)
                raise ValueError(f"{name} = {getattr(self, name)} must be a multiple of 16; the nearest is {nearest}")

    def _check_images(self) -> None:
        if not 0 <= self.image_probability <= 1:
            raise ValueError(f"image_probability = {self.image_probability} must be between 0 and 1")
        if not self.image_noise_mean <= -1:
            raise ValueError(
                f"image_noise_mean = {self.image_noise_mean} must be at most -1: it is the logarithm of a small share"
            )
        if not 0 <= self.image_noise_std <= 1:
            raise ValueError(f"image_noise_std = {self.image_noise_std} must be between 0 and 1")
        if self.image_noise_mean == -math.inf and self.image_noise_std != type(self).image_noise_std:
            raise ValueError(
                f"image_noise_std = {self.image_noise_std} has no effect with image_noise_mean = -inf; remove it"
            )
        for name in ("image_noise_mean", "image_noise_std"):
            if not self.image_probability and getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"{name} = {getattr(self, name)} has no effect with image_probability = 0; remove it, or set "
                    "image_probability"
                )
        if self.image_probability and self.num_frames < 5:
            raise ValueError(
                f"num_frames = {self.num_frames} leaves nothing to make after the first frame that "
                f"image_probability = {self.image_probability} gives; set it to 5 or more"
            )
