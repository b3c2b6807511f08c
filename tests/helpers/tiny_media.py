"""Small stand-ins for what users bring: videos made by a real encoder, and a pipeline folder with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel


def write_video(path: Path, num_frames: int, fps: int = 8, size: tuple[int, int] = (64, 96), **options: str) -> Path:
    """A video whose frame k has brightness 8 k throughout; `size` is (height, width)."""
    import av  # machines without it run what needs no videos

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for index in range(num_frames):
            pixels = np.full((*size, 3), 8 * index % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_film(path: Path, seed: int, num_frames: int = 240, fps: int = 24, size: tuple[int, int] = (180, 320)) -> Path:
    """A video that pans over coloured clouds, other ones for each seed: no flat areas, no scene twice."""
    import av

    height, width = size
    coarse = torch.rand(1, 3, 8, 28, generator=torch.Generator().manual_seed(seed))
    clouds = F.interpolate(coarse, (height, 2 * width), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for index in range(num_frames):
            left = index * width // num_frames
            pixels = (255 * clouds[:, left : left + width]).byte().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())
    return path


def brightness(frames: torch.Tensor) -> list[int]:
    """Frame numbers as `write_video` drew them."""
    return [round(frame.float().mean().item() / 8) for frame in frames]


def write_pipeline(folder: Path) -> Path:
    """vae/, text_encoder/ (width 16) and tokenizer/ (bytes) as a diffusers pipeline has them, in `folder`."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=torch.linspace(-1, 1, 16).tolist(),
        latents_std=torch.linspace(0.5, 2, 16).tolist(),
    )
    vae.save_pretrained(folder / "vae")
    config = UMT5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    return folder
