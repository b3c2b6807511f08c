"""Run-time operations on Wan models: conditions, velocity predictions, and the way between pixels and latents.

Shapes: B batch, C latent channels, F latent frames, H and W latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from titan_kernels.layout import tile_grid
from torch import Tensor

from titan_distill.attention.causal import KeysAndValues, Memory
from titan_distill.data.loader import Batch
from titan_distill.data.text import TextEncoder
from titan_distill.diffusion import schedule
from titan_distill.models.base import Adapter, Condition
from titan_distill.models.streaming import SegmentStream
from titan_distill.models.wan.stream import WanStream
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.models.wan.vae import decode_latents, encode_video, num_latent_frames, restart
from titan_distill.observability.flops import WorkCounter, forward_flops, recomputed_share
from titan_distill.parallelisms.mesh import Layouts
from titan_distill.roles import RoleHandle, RoleManager

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

    from titan_distill.config_sections import ActivationCheckpointConfig


class WanAdapter(Adapter):
    """Adapter of Wan text-to-video models. VAE and text encoder may be absent where nothing is decoded or encoded."""

    sequence_dim = 2

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
        layouts: Layouts,
        checkpointing: ActivationCheckpointConfig,
    ) -> None:
        """``checkpointing``: what the backwards of trained roles recompute, which the FLOP count must know."""
        self.latent_shape, self.flow_shift, self.device = latent_shape, flow_shift, device
        self.checkpointing = checkpointing
        _, frames, height, width = latent_shape
        grid = (frames, height // 2, width // 2)
        self._num_tiles = math.prod(tile_grid(grid))
        self.work: WorkCounter = WorkCounter(tokens_per_sample=math.prod(grid))
        self.max_text_tokens = max_text_tokens
        self.layouts = layouts
        self.vae, self.text_encoder = vae, text_encoder
        self._negative_LD = None if negative_embedding_LD is None else negative_embedding_LD.to(device)

    def start_step(self, roles: RoleManager, step: int) -> dict[str, float]:
        values = {}
        for role in roles:
            core = self.network(role).sparse_attention
            if core is not None:
                core.start_step(step)
                read = core.tiles_read(self._num_tiles)
                # What was asked for, and what the fine branch runs: whole tiles, and all of them below the crossover.
                values["vsa_sparsity"] = float(core.sparsity)
                values["vsa_sparsity_executed"] = 1 - read.num_selected / read.num_tiles
        return values

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
        return {"text": self._text_encoder().encode(prompts, self.max_text_tokens).to(self.device)}

    def embed_prompts(self, prompts: list[str]) -> list[Tensor]:
        return [self._text_encoder().embed(prompt, self.max_text_tokens) for prompt in prompts]

    def predict_velocity(self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        return self.forward(role, x, sigma_B, condition)

    def forward(
        self,
        role: RoleHandle,
        x: Tensor,
        sigma_B: Tensor,
        condition: Condition,
        memory: Memory | None = None,
        kept: list[KeysAndValues] | None = None,
    ) -> Tensor:
        """``predict_velocity``; for a causal role also of one segment, given the ``memory`` of those before it."""
        transformer = self.network(role)
        self._count(role, x, condition, memory)

        def forward(x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
            # Latents and text follow the model's compute dtype inside the transformer; the timestep must stay fp32.
            timestep = schedule.timestep(sigma_B)
            if sigma_B.ndim > 1:  # a level a frame
                timestep = timestep.expand(*sigma_B.shape[:2], x.shape[2], 1, 1).flatten(1)
            return transformer(x, timestep, condition["text"], memory=memory, kept=kept).to(x.dtype)

        exchange = self.layouts.exchange(role.name)
        return forward(x, sigma_B, condition) if exchange is None else exchange.run(forward, x, sigma_B, condition)

    def _count(self, role: RoleHandle, x: Tensor, condition: Condition, memory: Memory | None) -> None:
        transformer = self.network(role)
        config, core, segmentation = transformer.config, transformer.sparse_attention, transformer.segmentation
        sparse = None if core is None else core.tiles_read(self._num_tiles)
        frames, tokens_per_frame = x.shape[2], self.work.tokens_per_sample // self.latent_shape[1]
        keys = None
        if segmentation is not None:
            num_frames = segmentation.num_keys(frames) if memory is None else memory.num_remembered + frames
            keys = num_frames * tokens_per_frame
        sizes = (frames * tokens_per_frame, condition["text"].shape[1], sparse, keys)
        # The ranks that load the same samples share their work, in whatever layout.
        own_flops = forward_flops(config, *sizes).total * len(x) / self.layouts.data_group
        self.work.forward(
            own_flops,
            backward=torch.is_grad_enabled() and role.trainable,
            recompute=recomputed_share(config, self.checkpointing, *sizes),
            frozen=role.adapters_only,
        )

    def segment_lengths(self, role: RoleHandle, length: int | None = None) -> tuple[int, ...] | None:
        segmentation = self.network(role).segmentation
        if segmentation is None:
            return None
        num_latents = self.latent_shape[1] if length is None else length
        if num_latents not in (nearest := segmentation.nearest(num_latents)):
            raise ValueError(
                f"{4 * num_latents - 3} frames make {num_latents} latent frames, no whole number of the role's blocks; "
                f"choose {' or '.join(str(4 * latents - 3) for latents in nearest)} frames"
            )
        return segmentation.lengths(num_latents)

    def open_stream(self, role: RoleHandle, condition: Condition) -> SegmentStream:
        segmentation = self.network(role).segmentation
        if segmentation is None:
            return super().open_stream(role, condition)
        return WanStream(self, role, condition, segmentation)

    def last_sample(self, sequence: Tensor) -> Tensor:
        return restart(self._vae(), sequence, self.latent_shape[1])

    def num_latents(self, num_frames: int) -> int:
        return num_latent_frames(num_frames)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return decode_latents(self._vae(), latents)

    def encode_video(self, videos: Tensor) -> Tensor:
        return encode_video(self._vae(), videos)

    def _text_encoder(self) -> TextEncoder:
        if self.text_encoder is None:
            raise ValueError(
                "no text encoder to encode prompts with; set pipeline_config.path to a diffusers folder that has one"
            )
        return self.text_encoder

    def _vae(self) -> AutoencoderKLWan:
        if self.vae is None:
            raise ValueError(
                "no VAE to go between pixels and latents; set pipeline_config.path to a diffusers folder with vae"
            )
        return self.vae

    @staticmethod
    def network(role: RoleHandle) -> WanTransformer:
        """The role's transformer."""
        transformer = role.transformer
        assert isinstance(transformer, WanTransformer)
        return transformer
