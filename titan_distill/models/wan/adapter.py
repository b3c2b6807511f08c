"""Run-time operations on Wan models: conditions, velocity predictions, and the way between pixels and latents.

Shapes: B batch, C latent channels, F latent frames, H and W latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from titan_distill.data.loader import Batch
from titan_distill.data.text import TextEncoder
from titan_distill.diffusion import schedule
from titan_distill.models.base import Adapter, Condition
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.observability.flops import WorkCounter, forward_flops
from titan_distill.roles import RoleHandle

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


class WanAdapter(Adapter):
    """Adapter of Wan text-to-video models. VAE and text encoder may be absent where nothing is decoded or encoded."""

    def __init__(
        self,
        *,
        latent_shape: tuple[int, int, int, int],
        flow_shift: float,
        max_text_tokens: int,
        negative_embedding_LD: Tensor | None,
        vae: AutoencoderKLWan | None,
        text_encoder: TextEncoder | None,
        device: torch.device,
        recompute: bool = False,
    ) -> None:
        """``recompute``: trained roles run with activation checkpointing, which the FLOP count must know."""
        self.latent_shape, self.flow_shift, self.device = latent_shape, flow_shift, device
        self.recompute = recompute
        _, frames, height, width = latent_shape
        self.work: WorkCounter = WorkCounter(tokens_per_sample=frames * (height // 2) * (width // 2))
        self.max_text_tokens = max_text_tokens
        self.vae, self.text_encoder = vae, text_encoder
        self._negative_LD = None if negative_embedding_LD is None else negative_embedding_LD.to(device)

    def prepare_batch(self, batch: Batch) -> Batch:
        if batch.latents is not None and tuple(batch.latents.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"the data's latents have shape {tuple(batch.latents.shape[1:])}, but pipeline_config's num_frames, "
                f"height and width make {self.latent_shape}; change pipeline_config or preprocess videos at that size"
            )
        return batch.to(self.device)

    def text_condition(self, batch: Batch) -> Condition:
        return {"text": batch.text_embeddings}

    def negative_condition(self, batch_size: int) -> Condition:
        if self._negative_LD is None:
            raise ValueError(
                "classifier-free guidance needs the negative prompt's embedding; set pipeline_config.path to a "
                "diffusers folder with tokenizer and text_encoder"
            )
        return {"text": self._negative_LD.expand(batch_size, -1, -1)}

    def encode_prompts(self, prompts: list[str]) -> Condition:
        if self.text_encoder is None:
            raise ValueError(
                "no text encoder to encode prompts with; set pipeline_config.path to a diffusers folder that has one"
            )
        return {"text": self.text_encoder.encode(prompts, self.max_text_tokens).to(self.device)}

    def predict_velocity(self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        transformer = role.transformer
        assert isinstance(transformer, WanTransformer)
        flops = forward_flops(transformer.config, self.work.tokens_per_sample, condition["text"].shape[1]).total
        self.work.forward(flops * len(x), backward=torch.is_grad_enabled() and role.trainable, recompute=self.recompute)
        # Latents and text follow the model's compute dtype inside the transformer; the timestep must stay fp32.
        return transformer(x, schedule.timestep(sigma_B), condition["text"]).to(x.dtype)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self._vae()
        mean, std = self._latent_statistics(vae)
        pixels = vae.decode((latents.float() * std + mean).to(vae.dtype)).sample.float()
        return pixels.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)

    @torch.no_grad()
    def encode_video(self, videos: Tensor) -> Tensor:
        vae = self._vae()
        mean, std = self._latent_statistics(vae)
        pixels = videos.to(self.device).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1)
        return (vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float() - mean) / std

    def _vae(self) -> AutoencoderKLWan:
        if self.vae is None:
            raise ValueError(
                "no VAE to go between pixels and latents; set pipeline_config.path to a diffusers folder with vae"
            )
        return self.vae

    def _latent_statistics(self, vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
        shape = (1, vae.config.z_dim, 1, 1, 1)
        return (
            torch.tensor(vae.config.latents_mean, device=self.device).view(shape),
            torch.tensor(vae.config.latents_std, device=self.device).view(shape),
        )
