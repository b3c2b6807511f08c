"""A Wan2.2 TI2V model in small: random weights, 48 latent channels, a VAE that compresses by 4 × 16 × 16."""

from __future__ import annotations

from pathlib import Path

import tiny_media
import torch
from diffusers import AutoencoderKLWan

CHANNELS = 48


def write_pipeline(folder: Path) -> Path:
    """vae/, text_encoder/ and tokenizer/ in `folder`."""
    tiny_media.write_pipeline(folder)
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=torch.linspace(-1, 1, CHANNELS).tolist(),
        latents_std=torch.linspace(0.5, 2, CHANNELS).tolist(),
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    vae.save_pretrained(folder / "vae")
    return folder
