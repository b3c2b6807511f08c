"""A Wan2.2 TI2V model in small: random weights, 48 latent channels, a VAE that compresses by 4 × 16 × 16."""

from __future__ import annotations

import json
from pathlib import Path

import tiny_media
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

from titan_distill.data.parquet import LatentRow, write_rows

CHANNELS = 48
NUM_FRAMES, HEIGHT, WIDTH = 9, 64, 96
LATENT_SHAPE = (CHANNELS, 3, 4, 6)
TEXT_WIDTH, MAX_TEXT_TOKENS = 16, 32
FLOW_SHIFT = 5.0


def write_pipeline(folder: Path) -> Path:
    """A whole TI2V pipeline folder."""
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
        latents_mean=torch.linspace(-0.1, 0.1, CHANNELS).tolist(),
        latents_std=torch.linspace(0.2, 0.5, CHANNELS).tolist(),
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    vae.save_pretrained(folder / "vae")
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    with torch.no_grad():
        for parameter in transformer.parameters():  # as diffusers initialises it, nothing depends on time or text
            parameter.add_(0.1 * torch.randn_like(parameter))
    transformer.save_pretrained(folder / "transformer")
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "expand_timesteps": True,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "ByT5Tokenizer"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_data(path: Path, num_rows: int = 12, shape: tuple[int, ...] = LATENT_SHAPE) -> Path:
    """Random latents and text embeddings."""
    generator = torch.Generator().manual_seed(0)
    rows = (
        LatentRow(
            id=str(index),
            caption=f"clip {index}",
            text_embedding=torch.randn(3 + index, TEXT_WIDTH, generator=generator),
            vae_latent=torch.randn(shape, generator=generator),
        )
        for index in range(num_rows)
    )
    write_rows(path, rows)
    return path


def arguments(method: str, pipeline: Path, data: Path, output: Path, *overrides: str) -> list[str]:
    """Command line of a short run in which every second sample starts from an image."""
    roles = {"student": True} | {
        "dmd2": {"teacher": False, "critic": True},
        "consistency": {"teacher": False},
        "scm": {"teacher": False},
        "rcm": {"teacher": False, "critic": True},
        "knowledge_distillation": {"teacher": False},
    }.get(method, {})
    table = [
        word
        for name, trainable in roles.items()
        for word in (f"--roles.{name}.path", str(pipeline), f"--roles.{name}.trainable", str(trainable).lower())
    ]
    return [
        *("--job.name", "tiny", "--job.output_dir", str(output), "--recipe.method", method, *table),
        *("--pipeline_config.path", str(pipeline), "--pipeline_config.flow_shift", str(FLOW_SHIFT)),
        *("--pipeline_config.num_frames", str(NUM_FRAMES), "--pipeline_config.height", str(HEIGHT)),
        *("--pipeline_config.width", str(WIDTH), "--pipeline_config.image_probability", "0.5"),
        *("--data.path", str(data), "--data.max_text_tokens", str(MAX_TEXT_TOKENS)),
        *("--training.steps", "6", "--training.global_batch_size", "4", "--training.local_batch_size", "4"),
        *("--validation.enabled", "false", "--checkpoint.enabled", "false", *overrides),
    ]
