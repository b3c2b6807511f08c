"""The Wan family's own configuration: [pipeline_config] of recipe.family = "wan"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from titan_distill.attention.causal import Segmentation
from titan_distill.config.config import Config
from titan_distill.config.parsing import check_range
from titan_distill.config.resume import free, logged
from titan_distill.diffusion.requests import MAX_GUIDANCE
from titan_distill.models.wan.latents import TEMPORAL, num_latent_frames
from titan_distill.parallelisms.compile import check_num_segments

CAUSAL_KEYS = ("frames_per_block", "independent_first_frame", "cache_window_frames", "sink_frames")
"""Keys that only causal roles read."""


@dataclass(frozen=True)
class WanPipelineConfig:
    """[pipeline_config] of `recipe.family = "wan"`."""

    may_be_infinite: ClassVar = ("image_noise_mean",)

    path: str = logged("")
    """Diffusers pipeline folder with vae, text_encoder, tokenizer and scheduler; "" where nothing is encoded or
    decoded."""
    flow_shift: float = logged(5.0)
    """Shift of the noise schedule, for every role: sigma = s u / (1 + (s - 1) u). Published samplers of Wan
    use 3 to 12, by size of the model and resolution."""
    negative_prompt: str = logged("")
    """Prompt of the unconditional prediction of classifier-free guidance."""
    height: int = 480
    """Video height in pixels."""
    width: int = 832
    """Video width in pixels."""
    num_frames: int = 81
    """Video length in frames, 4 n + 1."""
    buckets: tuple[tuple[int, int, int], ...] = ()
    """Sizes [num_frames, height, width] of the training samples, for data of several sizes: each global batch has one
    of them. Default: all have the size of the three keys above. Validation videos have that size in any case."""
    boundary_ratio: float | None = None
    """Timestep (as a share of 1000) at which the high-noise expert hands over to the low-noise one. Default: from
    `model_index.json`."""
    guidance_scale_2: float | None = logged(None)
    """Scale of classifier-free guidance for the low-noise expert, as in u + w (c - u). Default: the method's scale, as
    for the high-noise expert."""
    offload_text_encoder: bool = free(False)
    """Hold the text encoder in host memory and move each layer to the device only while it runs. Saves 11 GB of device
    memory and costs seconds per new prompt."""
    frames_per_block: int = 3
    """Latent frames per block of a causal role. All frames of a block are made together: they attend to each other and
    to earlier blocks."""
    independent_first_frame: bool = False
    """Make a causal role's first block of frames a single latent frame, which a picture can be."""
    cache_window_frames: int = logged(0)
    """Size of a causal role's KV cache in latent frames, sink_frames included; 0 caches all. A limit bounds memory and
    FLOPs per block, so that videos may have any length."""
    sink_frames: int = logged(0)
    """Attention sink: number of first latent frames that are never evicted from the KV cache."""
    image_probability: float = logged(0.0)
    """Share of the training samples that start from an image, their own first latent frame (image-to-video); the rest
    has text only."""
    image_noise_mean: float = logged(-3.5)
    """Mean of the logarithm of an image's noise level, as a share of its training sample's noise level; -inf adds no
    noise."""
    image_noise_std: float = logged(0.5)
    """Standard deviation of the logarithm described at image_noise_mean."""
    validate_from_image: bool = logged(False)
    """Start validation videos from the pictures beside the prompts of validation.prompts: a table with the column image
    (or video), or the first frames of parquet with latents."""

    def __post_init__(self) -> None:
        if not 0.01 <= self.flow_shift <= 100:
            raise ValueError(f"flow_shift = {self.flow_shift} must be from 0.01 to 100; 1 means no shift")
        check_range(self, "guidance_scale_2", least=-MAX_GUIDANCE, most=MAX_GUIDANCE)
        check_range(self, "image_probability", "image_noise_std", least=0, most=1)
        check_range(self, "frames_per_block", least=1)
        check_range(self, "cache_window_frames", "sink_frames", least=0)
        check_range(self, "boundary_ratio", above=0, below=1)
        self._check_images()
        num_latent_frames(self.num_frames)
        if len(set(self.buckets)) < len(self.buckets):
            raise ValueError("buckets names one size twice; remove one of the two")
        for num_frames, _, _ in self.buckets:
            if self.image_probability and num_frames < 5:
                raise ValueError(
                    f"buckets has a size of {num_frames} frames, which leaves nothing to make after the first frame "
                    f"that image_probability = {self.image_probability} gives; set it to 5 or more"
                )
        if self.sink_frames and self.sink_frames >= self.cache_window_frames:
            raise ValueError(
                f"sink_frames = {self.sink_frames} must be less than cache_window_frames = {self.cache_window_frames}, "
                "so that later frames have room; lower sink_frames or raise cache_window_frames"
            )
        for name in ("height", "width"):
            if getattr(self, name) < 16 or getattr(self, name) % 16:
                nearest = max(16, round(getattr(self, name) / 16) * 16)
                raise ValueError(f"{name} = {getattr(self, name)} must be a multiple of 16; the nearest is {nearest}")

    @property
    def segmentation(self) -> Segmentation:
        """The frame blocks of causal roles."""
        return Segmentation(*(getattr(self, name) for name in CAUSAL_KEYS))

    def check_causal(self, config: Config) -> None:
        """Checks the frame blocks of causal roles, and that nothing is said about them where there are none.

        Raises ValueError with the nearest numbers of frames that fit.
        """
        if not any(role.attention == "causal" for role in config.roles.values()):
            for name in CAUSAL_KEYS:
                if (value := getattr(self, name)) != getattr(type(self), name):
                    raise ValueError(
                        f"pipeline_config.{name} = {value} has no effect, because no role has attention = 'causal'; "
                        "set it for a role or remove the key"
                    )
            return
        if self.buckets:
            raise ValueError(
                "pipeline_config.buckets gives samples of several sizes, which causal roles don't take; remove it"
            )
        if self.image_probability:
            raise ValueError(
                f"pipeline_config.image_probability = {self.image_probability} gives first frames, which causal roles "
                "don't take; set it to 0"
            )
        self.check_frames(self.num_frames, "pipeline_config.num_frames")
        check_num_segments(config.compile, len(self.segmentation.lengths(num_latent_frames(self.num_frames))))

    def check_frames(self, num_frames: int, name: str) -> None:
        """Raises ValueError, naming the nearest numbers of frames, unless whole frame blocks make up a video."""
        num_latents = num_latent_frames(num_frames)
        nearest = self.segmentation.nearest(num_latents)
        if num_latents not in nearest:
            first = "a first block of 1 and then " if self.independent_first_frame else ""
            raise ValueError(
                f"{name} = {num_frames} makes {num_latents} latent frames, which {first}blocks of "
                f"pipeline_config.frames_per_block = {self.frames_per_block} don't fill; set it to "
                f"{' or '.join(str(TEMPORAL * (latents - 1) + 1) for latents in nearest)}"
            )

    def _check_images(self) -> None:
        if not self.image_noise_mean <= -1:
            raise ValueError(
                f"image_noise_mean = {self.image_noise_mean} must be at most -1: it is the logarithm of a small share"
            )
        without_noise = ("image_noise_mean = -inf", ("image_noise_std",), self.image_noise_mean == -math.inf)
        without_images = ("image_probability = 0", ("image_noise_mean", "image_noise_std"), not self.image_probability)
        for setting, names, is_set in (without_noise, without_images):
            for name in names:
                if is_set and getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"{name} = {getattr(self, name)} has no effect with {setting}; remove it")
        if self.image_probability and self.num_frames < 5:
            raise ValueError(
                f"num_frames = {self.num_frames} leaves nothing to make after the first frame that "
                f"image_probability = {self.image_probability} gives; set it to 5 or more"
            )
