"""The encoders of a Wan pipeline: VAE, text encoder and, for image-to-video models, CLIP's image encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from titan_distill.config.config import Config
from titan_distill.config.paths import of_key
from titan_distill.fault_tolerance.files import fingerprint
from titan_distill.models.base import FootageEncoder
from titan_distill.models.wan.image_channels import EMBEDDING, LATENT
from titan_distill.models.wan.image_encoder import ENCODER, ImageEncoder
from titan_distill.models.wan.latents import LatentSpace
from titan_distill.models.wan.original import open_part
from titan_distill.models.wan.text_encoder import TextEncoder
from titan_distill.models.wan.vae import encode_image, encode_video, load_vae, vae_dtype, vae_folder

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


@dataclass(frozen=True)
class Encoders(FootageEncoder):
    """Encoders of a run or of a dataset. An encoder without a folder is None.

    Attributes:
        image_tensors: names of the picture tensors that the models need, see `image_channels`.
        vae_folder: the VAE's folder or its pipeline's, for `digests`.
    """

    vae_or_none: AutoencoderKLWan | None = None
    text_or_none: TextEncoder | None = None
    image: ImageEncoder | None = None
    image_tensors: tuple[str, ...] = ()
    vae_folder: Path | None = None

    @classmethod
    def check_folders(cls, config: Config, image_tensors: tuple[str, ...]) -> None:
        """Checks the files in pipeline_config.path without loading them. Raises ValueError."""
        pipeline = config.pipeline_config
        if not pipeline.path:
            return
        with of_key("pipeline_config.path", pipeline.path):
            open_part(vae_folder(Path(pipeline.path)), "VAE")
            TextEncoder(pipeline.path)
            if cls._needs_image_encoder(pipeline.path, image_tensors):
                ImageEncoder(pipeline.path)

    @staticmethod
    def _needs_image_encoder(pipeline: str, image_tensors: tuple[str, ...]) -> bool:
        return EMBEDDING in image_tensors and (Path(pipeline) / ENCODER).is_dir()

    @classmethod
    def of_run(cls, config: Config, image_tensors: tuple[str, ...], device: torch.device) -> Encoders:
        """Opens the encoders in pipeline_config.path. The image encoder is opened only if its embeddings are needed and
        its folder exists, because the data may already contain them."""
        pipeline, dtype = config.pipeline_config, getattr(torch, config.training.dtype)
        if not pipeline.path:
            return cls(image_tensors=image_tensors)
        has_image_encoder = cls._needs_image_encoder(pipeline.path, image_tensors)
        with of_key("pipeline_config.path", pipeline.path):
            return cls(
                load_vae(Path(pipeline.path), device, vae_dtype(device, dtype)),
                TextEncoder(pipeline.path, dtype=dtype, device=device, offload=pipeline.offload_text_encoder),
                ImageEncoder(pipeline.path, device=device) if has_image_encoder else None,
                image_tensors,
            )

    @property
    def vae(self) -> AutoencoderKLWan:
        """The VAE. Raises ValueError if the run has none."""
        if self.vae_or_none is None:
            raise ValueError(
                "no VAE to go between pixels and latents; set pipeline_config.path to a diffusers folder with vae"
            )
        return self.vae_or_none

    @property
    def text(self) -> TextEncoder:
        """The text encoder. Raises ValueError if the run has none."""
        if self.text_or_none is None:
            raise ValueError(
                "no text encoder to encode prompts with; set pipeline_config.path to a diffusers folder that has one"
            )
        return self.text_or_none

    def check_size(self, num_frames: int, height: int, width: int) -> None:
        config = self.vae.config
        space = LatentSpace(config.z_dim, config.scale_factor_temporal, config.scale_factor_spatial)
        space.check_size(num_frames, height, width, names=("--num-frames", "--height", "--width"))

    def digests(self) -> dict[str, str]:
        return encoder_digests(self.vae_folder, self.text_or_none)

    def encode_video(self, videos: Tensor) -> Tensor:
        return encode_video(self.vae, videos)

    def embed_prompt(self, prompt: str, max_tokens: int) -> Tensor:
        return self.text.embed(prompt, max_tokens)

    def encode_pictures(self, images: Tensor, num_frames: int) -> dict[str, Tensor]:
        tensors = {}
        if LATENT in self.image_tensors:
            tensors[LATENT] = encode_image(self.vae, images, num_frames)
        if EMBEDDING in self.image_tensors:
            if self.image is None:
                raise ValueError(
                    f"no {ENCODER} to embed images with; set pipeline_config.path to a diffusers folder that has one"
                )
            tensors[EMBEDDING] = self.image.embed(images)
        return tensors


def encoder_digests(vae: Path | None, text: TextEncoder | None) -> dict[str, str]:
    """Returns digests of the files of a VAE, in its folder or its pipeline's, and of a text encoder, by name."""
    of_vae = {} if vae is None else {"vae": fingerprint(vae_folder(vae))}
    return of_vae | ({} if text is None else text.digests)
