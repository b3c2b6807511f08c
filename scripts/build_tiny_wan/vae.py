"""Stage `vae`: a Wan 2.1 VAE, 180 times smaller, trained for some minutes on drawn footage.

It is diffusers' `AutoencoderKLWan` with its compression (4x in time after the first frame, 8x in space, 16 channels),
so everything downstream treats it as it treats the real one. The loss is L1 plus MSE plus a faint KL. The posterior
starts out narrow (`INITIAL_LOG_VARIANCE`): one that starts at unit variance drowns the code in noise, and the network
settles on grey blobs. Most steps see single images at first, then crops of 48 pixels and 5 to 17 frames, because on a
CPU the cost is proportional to pixels, frames of one film say almost the same, and the network is convolutional; whole
clips are kept for the end, where they teach the long temporal cache.

Legend: B films, C latent channels, T frames, F latent frames, H and W pixels.
"""

import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from footage import Footage
from tiny_world.shapes import draw_clip, train_attributes
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# (frames, pixels, films per batch), and how likely each is while progress is below the given share of the budget. Never
# one film alone: PyTorch's 3D convolution of a batch of one is five times as slow on a CPU as that of two.
CROPS = ((1, 48, 8), (5, 48, 3), (9, 48, 2), (17, 48, 2), (17, 96, 2))
# Single frames teach shape and colour, then longer and longer crops teach time: colours drift in untrained frames.
PHASES = (
    (0.40, (0.85, 0.15, 0.0, 0.0, 0.0)),
    (0.65, (0.10, 0.60, 0.30, 0.0, 0.0)),
    (0.95, (0.08, 0.12, 0.35, 0.45, 0.0)),
    (1.00, (0.0, 0.2, 0.2, 0.3, 0.3)),
)
SHAPES_SHARE = 0.7
LEARNING_RATE = 2e-3
KL_WEIGHT = 1e-5
INITIAL_LOG_VARIANCE = -4.0
WARMUP_STEPS = 50
CHECKPOINT_SECONDS = 60


def build_vae() -> AutoencoderKLWan:
    """The VAE with random weights: 0.70 million parameters."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],  # diffusers' spelling
    )
    with torch.no_grad():
        _, log_variance_bias = vae.quant_conv.bias.chunk(2)
        log_variance_bias.fill_(INITIAL_LOG_VARIANCE)
    return vae


def train_vae(folder: Path, *, minutes: float, seed: int, start_at: float = 0.0) -> None:
    """Train for a wall-clock budget, then save the averaged weights with the statistics of their latents to
    `folder`.

    With `start_at` > 0 the weights in `folder` are trained on from that share of the schedule, and `minutes` are for
    the rest of it.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    footage = Footage(seed)
    vae = AutoencoderKLWan.from_pretrained(folder) if start_at > 0 else build_vae()
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.Adam(vae.parameters(), betas=(0.9, 0.99), fused=True)
    held_clips = shape_clips(3, seed=seed + 1)
    start = saved = time.monotonic()
    step = 0
    while (progress := start_at + (1 - start_at) * (time.monotonic() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = _learning_rate(progress, step)
        loss = _loss(vae, _draw(footage, rng, progress))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(vae)
        step += 1
        if step % 100 == 0:
            print(f"vae step {step} at {progress:.0%}: loss {loss.item():.4f}", flush=True)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            saved = time.monotonic()
            average.module.save_pretrained(folder)
            print(f"vae step {step}: {psnr(average.module, held_clips):.1f} dB on shapes", flush=True)
    save_vae(average.module, folder)
    print(f"vae step {step}: {psnr(average.module, held_clips):.1f} dB on shapes; saved in {folder}", flush=True)


def use_fast_norm() -> None:
    """Replace the norm of diffusers' VAE for the rest of the process, by one that is equal and faster on a CPU."""
    WanRMS_norm.forward = _fast_rms_norm


def _fast_rms_norm(norm: WanRMS_norm, x_BCTHW: Tensor) -> Tensor:
    """diffusers' norm without `F.normalize`, whose norm over a strided dim is 40 % of a training step on a CPU."""
    inverse = torch.rsqrt(x_BCTHW.square().sum(dim=1, keepdim=True) + 1e-12)
    return x_BCTHW * inverse * (norm.scale * norm.gamma) + norm.bias


def _learning_rate(progress: float, step: int) -> float:
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)


def _draw(footage: Footage, rng: np.random.Generator, progress: float) -> Tensor:
    chances = next(chances for until, chances in PHASES if progress <= until)
    num_frames, size, num_films = CROPS[rng.choice(len(CROPS), p=chances)]
    return footage.batch(num_films, num_frames, size, SHAPES_SHARE)


def _loss(vae: AutoencoderKLWan, video_BCTHW: Tensor) -> Tensor:
    posterior = vae.encode(video_BCTHW).latent_dist
    error = vae.decode(posterior.sample()).sample - video_BCTHW
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    # Colour differences are the smaller part of the error and the first that a code drops, so they count once more.
    chroma = error - error.roll(1, dims=1)
    saturation = video_BCTHW.amax(1, keepdim=True) - video_BCTHW.amin(1, keepdim=True)
    return ((error.abs() + chroma.abs() + error.square()) * (1 + 2 * saturation)).mean() + KL_WEIGHT * kl


def shape_clips(num_clips: int, seed: int) -> Tensor:
    """Drawn training clips in [-1, 1], [B, 3, T, H, W], cycling through the combinations."""
    rng = np.random.default_rng(seed)
    words = train_attributes()
    order = rng.permutation(len(words))
    clips = np.stack([draw_clip(words[order[i % len(words)]], rng) for i in range(num_clips)])
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, video_BCTHW: Tensor) -> float:
    """Peak signal-to-noise ratio of the reconstruction in dB, over the whole batch."""
    decoded = vae.decode(vae.encode(video_BCTHW).latent_dist.mean).sample
    return -10 * math.log10(F.mse_loss((decoded.clamp(-1, 1)) / 2, video_BCTHW / 2).item())


@torch.no_grad()
def save_vae(vae: AutoencoderKLWan, folder: Path) -> None:
    """Save a copy whose config carries `latents_mean` and `latents_std`, measured per channel on drawn clips."""
    means = [vae.encode(clip[None]).latent_dist.mean for clip in shape_clips(24, seed=7)]
    latents_BCFHW = torch.cat(means)
    mean, std = latents_BCFHW.mean(dim=(0, 2, 3, 4)), latents_BCFHW.std(dim=(0, 2, 3, 4))
    if not (torch.isfinite(mean).all() and (std > 1e-3).all()):
        raise ValueError(
            f"latent channels have means {mean.tolist()} and deviations {std.tolist()}; train the VAE longer"
        )
    saved = copy.deepcopy(vae)
    saved.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    saved.save_pretrained(folder)
