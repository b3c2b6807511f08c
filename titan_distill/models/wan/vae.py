"""Conversion between pixels and the normalised latents that Wan's transformer processes.

Pixels are uint8 frames [B, T, H, W, 3], in [-1, 1] inside the VAE. Latents are `(z - latents_mean) / latents_std`, with
the statistics of the VAE's config, [B, C, F, H, W].
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from titan_distill.checkpoint.complete import load_complete
from titan_distill.checkpoint.diffusers_folder import read_json
from titan_distill.config.paths import of_key
from titan_distill.data.latents import LatentStatistics
from titan_distill.diffusion.transfer import to_device
from titan_distill.models.wan.original import open_part

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

MAX_WHOLE_PIXELS = 1088 * 1920
"""Pixels per frame up to which a video is encoded whole. Four frames of this size have about 15 GB of activations."""
TILE_PIXELS, TILE_STRIDE_PIXELS = 512, 384
"""Size of the square tiles of larger frames, and the distance between two of them, in pixels."""


PATH_KEY = "pipeline_config.path"


def num_decoded_at_once(device: torch.device) -> int:
    """Returns the number of clips per call of the decoder. One clip fills a GPU, with gigabytes of activations; on a
    CPU more than a few clips do not fit in the caches."""
    return 1 if device.type == "cuda" else 4


def vae_folder(path: Path) -> Path:
    """Returns the folder of a VAE, given that folder or its pipeline's."""
    return path / "vae" if (path / "vae").is_dir() else path


def load_vae(path: Path, device: torch.device | str, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """Loads diffusers' AutoencoderKLWan from its folder or from its pipeline's folder. Raises `ValueError` if there is
    none, or if its tensors are missing, superfluous, misshapen or quantised."""
    from diffusers import AutoencoderKLWan

    folder = vae_folder(path)
    open_part(folder, "VAE")
    kind, local = AutoencoderKLWan, {"local_files_only": True}
    vae = load_complete(
        folder,
        lambda: kind.from_config(kind.load_config(folder, **local)),
        lambda: kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, **local),
    )
    _statistics_in(vae.config, folder)
    return vae.requires_grad_(False).eval().to(device)


def stored_statistics(pipeline: str) -> LatentStatistics:
    """Returns the statistics in the configuration of a pipeline's VAE, without loading the VAE; empty ones without a
    pipeline or a VAE in it. Raises ValueError for a configuration that can't be read."""
    folder = vae_folder(Path(pipeline))
    if not pipeline or not (folder / "config.json").is_file():
        return LatentStatistics(key=PATH_KEY)
    from diffusers import AutoencoderKLWan

    with of_key(PATH_KEY, pipeline):
        config = read_json(folder / "config.json")
        parameters = inspect.signature(AutoencoderKLWan.__init__).parameters
        # Diffusers' own defaults, for the keys that a config leaves out.
        defaults = {name: parameters[name].default for name in ("z_dim", "latents_mean", "latents_std")}
        return _statistics_in({**defaults, **config}, folder)


def _statistics_in(config: Mapping[str, Any], folder: Path) -> LatentStatistics:
    channels = config["z_dim"]
    for name, least in (("latents_mean", -math.inf), ("latents_std", 0.0)):
        values = config[name]
        found = values if isinstance(values, (list, tuple)) else []
        numbers = [value for value in found if isinstance(value, (int, float)) and least < value < math.inf]
        if not len(numbers) == len(found) == channels:
            above = "" if least < 0 else " above 0"
            raise ValueError(
                f"{folder / 'config.json'} has {name} = {values}, which must be {channels} finite "
                f"numbers{above}, one per channel; copy it again"
            )
    return LatentStatistics(tuple(config["latents_mean"]), tuple(config["latents_std"]), PATH_KEY)


def vae_dtype(device: torch.device, compute: torch.dtype) -> torch.dtype:
    """Returns the dtype in which a run encodes and decodes: bf16 if the run computes in bf16 on a GPU that supports it,
    else fp32."""
    is_fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if is_fast and compute == torch.bfloat16 else torch.float32


@torch.no_grad()
def encode_video(vae: AutoencoderKLWan, frames_BTHW3: Tensor) -> Tensor:
    """Encodes uint8 frames on any device to normalised latents, fp32 on the VAE's device.

    The latents are the mean of the posterior, which is reproducible; training adds its own noise.
    """
    return _encode(vae, _signed(vae, frames_BTHW3))


@torch.no_grad()
def encode_image(vae: AutoencoderKLWan, images_BHW3: Tensor, num_frames: int) -> Tensor:
    """Encodes clips that show a uint8 picture first and are grey afterwards, like `encode_video`."""
    first_BC1HW = _signed(vae, images_BHW3[:, None])
    grey = first_BC1HW.new_zeros(1).expand(*first_BC1HW.shape[:2], num_frames - 1, *first_BC1HW.shape[3:])
    return _encode(vae, torch.cat([first_BC1HW, grey], 2))


def _signed(vae: AutoencoderKLWan, frames_BTHW3: Tensor) -> Tensor:
    """Converts frames to [B, C, T, H, W] in [-1, 1] on the VAE's device."""
    return to_device(frames_BTHW3, vae.device).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1)


def _encode(vae: AutoencoderKLWan, video_BCTHW: Tensor) -> Tensor:
    latents_BCFHW = _posterior(vae, video_BCTHW.to(vae.dtype)).mode().float()
    mean, std = _statistics(vae)
    return (latents_BCFHW - mean) / std


def _posterior(vae: AutoencoderKLWan, video_BCTHW: Tensor) -> DiagonalGaussianDistribution:
    """Returns the distribution of a video's latents, from overlapping tiles if its frames are large."""
    if math.prod(video_BCTHW.shape[-2:]) <= MAX_WHOLE_PIXELS:
        return vae.encode(video_BCTHW).latent_dist
    vae.enable_tiling(TILE_PIXELS, TILE_PIXELS, TILE_STRIDE_PIXELS, TILE_STRIDE_PIXELS)
    try:
        return vae.encode(video_BCTHW).latent_dist
    finally:
        vae.disable_tiling()  # which would also hold for decoding


@torch.no_grad()
def decode_latents(vae: AutoencoderKLWan, latents_BCFHW: Tensor) -> Tensor:
    """Decodes normalised latents to uint8 frames [B, T, H, W, 3] on the VAE's device."""
    mean, std = _statistics(vae)
    chunks = (latents_BCFHW.float() * std + mean).to(vae.dtype).split(num_decoded_at_once(vae.device))
    return torch.cat([_pixels(vae.decode(chunk).sample) for chunk in chunks])


def _pixels(video_BCTHW: Tensor) -> Tensor:
    """Converts [-1, 1] to uint8 [B, T, H, W, 3]. It may overwrite its argument, to save memory."""
    video_BCTHW = video_BCTHW.float().clamp_(-1, 1).add_(1).mul_(127.5).round_()
    return video_BCTHW.to(torch.uint8).permute(0, 2, 3, 4, 1)


def restart(vae: AutoencoderKLWan, latents_BCFHW: Tensor, num_frames: int) -> Tensor:
    """Returns the last `num_frames` latent frames of a longer video as a separate video.

    The first latent frame of a video stands for one picture, each later one for four. The new first latent frame is
    therefore decoded, together with all frames before it, and its last picture is encoded as the beginning of a video.
    """
    start = latents_BCFHW.shape[2] - num_frames
    if not start or not len(latents_BCFHW):
        return latents_BCFHW[:, :, start:]
    picture_B1HW3 = decode_latents(vae, latents_BCFHW[:, :, : start + 1])[:, -1:]
    first_BC1HW = encode_video(vae, picture_B1HW3).to(latents_BCFHW.dtype)
    return torch.cat((first_BC1HW, latents_BCFHW[:, :, start + 1 :]), dim=2)


def _statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean, std = (torch.tensor(values).view(shape) for values in (vae.config.latents_mean, vae.config.latents_std))
    return to_device(mean, vae.device), to_device(std, vae.device)
