"""Run-time operations on Wan models: conditions, velocity predictions, and conversion between pixels and latents.

Shapes: B batch, C latent channels, F latent frames, H and W latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

import torch
from titan_kernels.layout import tile_grid
from torch import Tensor, nn

from titan_distill.attention.causal import KVCache
from titan_distill.config.config import Config
from titan_distill.data.loader import Batch, normalise_latents
from titan_distill.data.parquet import ParquetDataset
from titan_distill.diffusion import schedule
from titan_distill.diffusion.transfer import to_device
from titan_distill.fault_tolerance.files import format_bytes
from titan_distill.models.base import Adapter, Condition, Guidance
from titan_distill.models.streaming import SegmentStream
from titan_distill.models.wan import first_frame
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.encoders import Encoders
from titan_distill.models.wan.experts import is_high_noise, route
from titan_distill.models.wan.features import block_outputs, mean_over_tokens
from titan_distill.models.wan.first_frame import ImageMixing
from titan_distill.models.wan.image_channels import EMBEDDING, check_pictures, takes_channels, with_channels
from titan_distill.models.wan.latents import num_latent_frames
from titan_distill.models.wan.pipeline_index import EXPAND_TIMESTEPS, read_index
from titan_distill.models.wan.prompt_pictures import FirstFrames, PictureRows
from titan_distill.models.wan.text_encoder import padded
from titan_distill.models.wan.tokens import Grid, token_grid
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.models.wan.vae import decode_latents, restart, stored_statistics
from titan_distill.observability.flops import WorkCounter, forward_flops, recomputed_share
from titan_distill.parallelisms.mesh import Layouts, Peers
from titan_distill.roles import RoleHandle, RoleManager

logger = logging.getLogger(__name__)


class WanStream(SegmentStream):
    """Stream of video segments, latents [B, C, f, H, W], that a causal role generates with a KV cache.

    `forward` predicts the velocity of a segment at noise levels [B], given the caches: one, or one for each turn of a
    role that exchanges batches in turn. If ranks share the tokens, a cache holds this rank's heads of all tokens. A
    finished segment takes one more forward, which writes the caches at the noise level of the context.
    """

    def __init__(self, forward: Callable[[Tensor, Tensor, Sequence[KVCache]], Tensor], caches: list[KVCache]) -> None:
        self.forward, self.caches = forward, caches

    def predict_velocity(self, x: Tensor, sigma_B: Tensor) -> Tensor:
        return self.forward(x, sigma_B, self.caches)

    def _write(self, x: Tensor, sigma_B: Tensor) -> None:
        caches = [cache.writable() for cache in self.caches]
        self.forward(x, sigma_B, caches)
        self.caches = [cache.extended() for cache in caches]


class WanAdapter(Adapter):
    """Adapter of Wan models that make videos from text, or from text and a first frame. VAE and text encoder may be
    absent if the run decodes and encodes nothing."""

    sequence_dim = 2

    def __init__(
        self,
        config: Config,
        latent_shape: tuple[int, int, int, int],
        encoders: Encoders,
        device: torch.device,
        layouts: Layouts,
        *,
        negative_LD: Tensor | None = None,
        boundary_ratio: float | None = None,
    ) -> None:
        """`negative_LD` is the embedding of the negative prompt, if there is a text encoder. `boundary_ratio` is that
        of roles with two experts, see `experts`."""
        self.config, self.pipeline, self.encoders = config, config.pipeline_config, encoders
        self.latent_shape, self._sample_shape, self.flow_shift = latent_shape, latent_shape, self.pipeline.flow_shift
        self.device, self.layouts, self.boundary_ratio = device, layouts, boundary_ratio
        self.work: WorkCounter = WorkCounter(tokens_per_sample=math.prod(_grid(latent_shape)))
        self.image_mixing = ImageMixing.of_run(config)
        # Diffusers marks a TI2V pipeline so.
        is_ti2v = bool(read_index(self.pipeline.path).get(EXPAND_TIMESTEPS, False))
        self.takes_images = self.image_mixing is not None or is_ti2v
        self._negative_LD = None if negative_LD is None else negative_LD.to(device)
        sharing = layouts.data_group if config.data.holds_videos else 1
        self._peers = Peers(sharing, config.comm.init_timeout_seconds)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self._sample_shape

    def start_step(self, roles: RoleManager, step: int) -> dict[str, float]:
        values = {}
        self.work.count_step(math.prod(_grid(self.latent_shape)))
        for module in (module for role in roles for module in role.modules.values()):
            # A head has no attention.
            if isinstance(module, WanTransformer) and (core := module.sparse_attention) is not None:
                core.start_step(step)
                read = core.tiles_read(_num_tiles(module, self.latent_shape))
                # What was asked for, and what the fine branch runs: whole tiles, and all of them below the crossover.
                values["vsa_sparsity"] = float(core.sparsity)
                values["vsa_sparsity_executed"] = 1 - read.num_selected / read.num_tiles
        return values

    def prepare_batch(self, batch: Batch) -> Batch:
        self.use_shape(batch)
        if batch.is_encoded:
            return batch.to(self.device)
        own = {i: self._encoded(sample) for i, sample in enumerate(batch.split(1)) if self._peers.owns(i)}
        return self._joined(list(own.values())) if self._peers.size == 1 else replace(batch, clips=None, encoded=own)

    def share_batch(self, batch: Batch) -> Batch:
        if batch.is_encoded:
            return batch
        on_host = {index: sample.to("cpu") for index, sample in batch.encoded.items()}
        return self._joined([self._peers.share(i, on_host.get(i)) for i in range(len(batch.sample_ids))])

    def _encoded(self, sample: Batch) -> Batch:
        """Encodes the clip and the prompt of a batch of one sample, so that a sample does not depend on its batch."""
        cache, max_tokens = self.config.job.output_folder / "cache", self.config.data.max_text_tokens
        text = self.encoders.text.cached_embedding(sample.captions[0], max_tokens, cache)
        encoded = replace(sample, text_embeddings=text[None], clips=None, is_encoded=True)
        if sample.clips is None:
            return encoded
        return replace(encoded, latents=self.encode_video(sample.clips), extra=self._pictures(sample.clips[:, 0]))

    def _joined(self, samples: Sequence[Batch]) -> Batch:
        """Returns one batch of encoded samples, on the device."""
        latents = [sample.latents for sample in samples if sample.latents is not None]
        batch = Batch(
            sample_ids=[id_ for sample in samples for id_ in sample.sample_ids],
            captions=[caption for sample in samples for caption in sample.captions],
            text_embeddings=torch.cat([sample.text_embeddings for sample in samples]),
            latents=torch.cat(latents) if latents else None,
            extra={name: torch.cat([sample.extra[name] for sample in samples]) for name in samples[0].extra},
        )
        return batch.to(self.device)

    def text_condition(self, batch: Batch) -> Condition:
        names = self.encoders.image_tensors
        if missing := [name for name in names if name not in batch.extra]:
            raise ValueError(f"the models of this run start from images, but there is no {missing[0]} in the data")
        text = {"text": batch.text_embeddings, **{name: batch.extra[name] for name in names}}
        # Without latents there is no image: data to train on has them (`needs_latents`), prompts to sample from don't.
        if self.image_mixing is None or batch.latents is None:
            return text
        return text | self.image_mixing.condition(batch.sample_ids, batch.latents)

    def negative_condition(self, batch_size: int) -> Condition:
        if self._negative_LD is None:
            raise ValueError(
                "classifier-free guidance needs the negative prompt's embedding; set pipeline_config.path to a "
                "diffusers folder with tokenizer and text_encoder"
            )
        return {"text": self._negative_LD.expand(batch_size, -1, -1)}

    def encode_prompts(self, prompts: list[str]) -> Condition:
        return {"text": self.encoders.text.encode(prompts, self.config.data.max_text_tokens).to(self.device)}

    def embed_prompts(self, prompts: list[str]) -> list[Tensor]:
        return [self.encoders.text.embed(prompt, self.config.data.max_text_tokens) for prompt in prompts]

    def prompt_conditions(
        self, path: str, prompts: Sequence[str], ids: Collection[int]
    ) -> Callable[[Sequence[int]], Condition]:
        pictures, first_frames = PictureRows(path, self.encoders.image_tensors), None
        if self.pipeline.validate_from_image:
            self.check_takes_images()
            first_frames = FirstFrames(path, self.pipeline.height, self.pipeline.width, self._normalise)
            first_frames.latents([0], self)  # raises for pictures of another size now, not after the first samples
        max_tokens = self.config.data.max_text_tokens
        encoded = {index: self.encoders.text.embed(prompts[index], max_tokens) for index in ids}

        def condition(ids: Sequence[int]) -> Condition:
            text = torch.stack([padded(encoded[index], max_tokens) for index in ids])
            found = {"text": text.to(self.device), **pictures.tensors(ids, self.device)}
            return found if first_frames is None else self.with_first_frame(found, first_frames.latents(ids, self))

        return condition

    def _normalise(self, dataset: ParquetDataset) -> None:
        normalise_latents(dataset, stored_statistics(self.pipeline.path), self.config.data.latents)

    def release_text_encoder(self) -> None:
        # Captions of videos are encoded while the run trains.
        if self.encoders.text_or_none is None or self.config.data.holds_videos:
            return
        if released := self.encoders.text_or_none.release():
            logger.info("text encoder: released %s, all prompts of the run are encoded", format_bytes(released))

    def with_image(self, condition: Condition, images: Tensor) -> Condition:
        if self.encoders.image_tensors:
            return {**condition, **self._pictures(images)}
        self.check_takes_images()
        return self.with_first_frame(condition, self.encode_video(images[:, None]))

    def with_first_frame(self, condition: Condition, latents: Tensor) -> Condition:
        """Returns the condition with clean first latent frames [B, C, 1, H, W], from which the videos start."""
        return {**condition, **first_frame.given_frame(latents.to(self.device))}

    def _pictures(self, images: Tensor) -> dict[str, Tensor]:
        tensors = self.encoders.encode_pictures(images, self.pipeline.num_frames)
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def check_takes_images(self) -> None:
        """Raises ValueError if the models of the run can't start a video from a given first frame."""
        if names := self.encoders.image_tensors:
            raise ValueError(
                f"the models of this run take pictures in channels of their own ({', '.join(names)}), not as a first "
                "frame; set pipeline_config.validate_from_image to false"
            )
        if not self.takes_images:
            raise ValueError(
                "the models of this run make videos from text only: they were trained with "
                "pipeline_config.image_probability = 0, and the pipeline they come from has no expand_timesteps in its "
                "model_index.json; leave images out"
            )

    def held(self, x: Tensor, sigma_B: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        return first_frame.held(x, sigma_B, condition)

    def loss_mask(self, condition: Condition) -> Tensor | None:
        return first_frame.loss_mask(condition, self.latent_shape[1])

    def predict_velocity(self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        return self.forward(role, x, sigma_B, condition)

    def forward(
        self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition, caches: Sequence[KVCache] = ()
    ) -> Tensor:
        """Does `predict_velocity`; for a causal role also for one segment, given the KV cache of the segments before
        it, one for each turn of the batch exchange."""
        check_pictures(role.name, self.network(role).config, condition)
        self._count(role, x, condition, caches[0] if caches else None)
        x, sigma = self.held(x, sigma_B, condition)
        if sigma.ndim > 1:
            sigma = sigma.flatten(1)  # [B, F], a time for each frame
        read, exchange = first_frame.without_frame(condition), self.layouts.exchange(role.name)
        given: Sequence[KVCache | None] = caches or [None] * self._num_turns(role)
        forwards = [partial(self._routed, role, cache) for cache in given]
        return forwards[0](x, sigma, read) if exchange is None else exchange.run(forwards, x, sigma, read)

    def _num_turns(self, role: RoleHandle) -> int:
        exchange = self.layouts.exchange(role.name)
        return 1 if exchange is None else exchange.num_turns

    def _count(self, role: RoleHandle, x: Tensor, condition: Condition, cache: KVCache | None) -> None:
        """Counts the FLOPs of a forward. For a segment these are all linear layers on its tokens, and attention over
        the cached tokens and its own. The keys and values of the text count in each forward, although most forwards
        find them cached (1 % at 1.3B)."""
        transformer = self.network(role)
        config, core, segmentation = transformer.config, transformer.sparse_attention, transformer.segmentation
        sparse = None if core is None else core.tiles_read(_num_tiles(transformer, x.shape[1:]))
        frames, tokens_per_frame = x.shape[2], math.prod(_grid(x.shape[1:])[1:])
        keys = None
        if segmentation is not None:
            num_frames = segmentation.num_keys(frames) if cache is None else cache.num_cached + frames
            keys = num_frames * tokens_per_frame
        sizes = (frames * tokens_per_frame, condition["text"].shape[1], sparse, keys)
        # The ranks that load the same samples share their arithmetic, in whatever layout.
        flops, share = forward_flops(config, *sizes), len(x) / self.layouts.data_group
        self.work.forward(
            flops.total * share,
            backward=torch.is_grad_enabled() and role.trainable,
            recompute=recomputed_share(config, self.config.activation_checkpoint, *sizes),
            frozen=role.adapters_only,
            self_attention=flops.self_attention * share,
        )

    def segment_lengths(self, role: RoleHandle, length: int | None = None) -> tuple[int, ...] | None:
        segmentation = self.network(role).segmentation
        if segmentation is None:
            return None
        return segmentation.lengths(self.latent_shape[1] if length is None else length)

    def open_stream(self, role: RoleHandle, condition: Condition) -> SegmentStream:
        segmentation = self.network(role).segmentation
        if segmentation is None:
            return super().open_stream(role, condition)
        if first_frame.IMAGE in condition:
            raise ValueError(f"role {role.name!r} is causal and makes videos from text only; leave the image out")

        def forward(x: Tensor, sigma_B: Tensor, caches: Sequence[KVCache]) -> Tensor:
            return self.forward(role, x, sigma_B, condition, caches)

        num_layers = self.network(role).config.num_layers
        return WanStream(forward, [KVCache.empty(segmentation, num_layers) for _ in range(self._num_turns(role))])

    def last_sample(self, sequence: Tensor) -> Tensor:
        return restart(self.encoders.vae, sequence, self.latent_shape[1])

    def num_latents(self, role: RoleHandle, num_frames: int) -> int:
        if self.network(role).segmentation is None:
            return super().num_latents(role, num_frames)
        self.pipeline.check_frames(num_frames, "num_frames")
        return num_latent_frames(num_frames)

    def features(
        self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition, depths: Sequence[int]
    ) -> list[Tensor]:
        assert self.layouts.exchange(role.name) is None, "the configuration keeps data groups apart"
        return block_outputs(self.network(role), depths, x, lambda: self.predict_velocity(role, x, sigma_B, condition))

    def mean_over_positions(self, role: RoleHandle, x: Tensor, values_BL: Tensor) -> Tensor:
        return mean_over_tokens(self.network(role), values_BL, x)

    def _routed(
        self, role: RoleHandle, cache: KVCache | None, x: Tensor, sigma: Tensor, condition: Condition
    ) -> Tensor:
        """Returns each sample's velocity. If there are two experts, the sample's noise level selects one. `sigma` is
        [B] or [B, F]."""
        experts = [partial(_run, module, cache) for module in role.modules.values()]
        if len(experts) == 1:
            return experts[0](x, sigma, condition)
        whole = self.network(role).sequence is not None
        return route(
            (experts[0], experts[1]), self._is_high_noise(sigma), x, sigma, condition,
            run_both=torch.is_grad_enabled() and role.trainable, dummy_frames=x.shape[2] if whole else 1,
        )  # fmt: skip

    def _is_high_noise(self, sigma: Tensor) -> Tensor:
        assert self.boundary_ratio is not None, "a run with two experts has found their boundary"
        return is_high_noise(sigma, self.boundary_ratio)

    def guidance_scale(self, role: RoleHandle, sigma_B: Tensor, guidance: Guidance) -> float | Tensor:
        second = self.pipeline.guidance_scale_2
        if second is None or len(role.modules) == 1:
            return guidance.scale
        low_noise_scale = second - (guidance.form == "offset")
        scale_B = torch.where(self._is_high_noise(sigma_B), guidance.scale, low_noise_scale)
        return to_device(scale_B, self.device).view(-1, *[1] * len(self.latent_shape))

    def decode_latents(self, latents: Tensor) -> Tensor:
        return decode_latents(self.encoders.vae, latents)

    def encode_video(self, videos: Tensor) -> Tensor:
        return self.encoders.encode_video(videos)

    @staticmethod
    def network(role: RoleHandle) -> WanTransformer:
        """Returns the role's transformer."""
        transformer = role.transformer
        assert isinstance(transformer, WanTransformer)
        return transformer


def _grid(latent_shape: Sequence[int]) -> Grid:
    return token_grid(latent_shape[1:], WanConfig.patch_size)


def _num_tiles(transformer: WanTransformer, latent_shape: Sequence[int]) -> int:
    return math.prod(tile_grid(_grid(latent_shape), transformer.tile))


def _run(transformer: nn.Module, cache: KVCache | None, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    config = transformer.config
    assert isinstance(config, WanConfig)
    image = condition[EMBEDDING] if config.image_dim is not None else None
    shown = with_channels(x, condition) if takes_channels(config) else x
    # Latents and text follow the model's compute dtype inside the transformer; the timestep must stay fp32.
    t = to_device(schedule.timestep(sigma), x.device)
    return transformer(shown, t, condition["text"], image, cache).to(x.dtype)
