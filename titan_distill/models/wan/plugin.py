"""The Wan family: from a configuration to transformers and the adapter."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from titan_kernels.layout import best_tile
from torch import Tensor, nn

from titan_distill.attention.sparse import SparseAttention
from titan_distill.checkpoint.complete import check_tensors
from titan_distill.checkpoint.diffusers_folder import TRANSFORMER
from titan_distill.config.config import Config
from titan_distill.config.degrees import Degrees
from titan_distill.config.dtypes import DTYPES
from titan_distill.config.paths import is_reference, of_key
from titan_distill.config.role_sections import HEAD_FLAVOR, RoleConfig
from titan_distill.config.sections import FIRST_TILE, Tile
from titan_distill.data.latents import LatentStatistics
from titan_distill.data.manifest import Size
from titan_distill.data.parquet import RowCheck
from titan_distill.diffusion.requests import SampleRequest
from titan_distill.fault_tolerance.ranks import Ranks
from titan_distill.models.base import (
    Adapter,
    EncoderFolders,
    EncoderMemory,
    FootageEncoder,
    ModelFamily,
    TextEncoderFolders,
)
from titan_distill.models.wan.adapter import WanAdapter
from titan_distill.models.wan.config import FLAVORS, WanConfig
from titan_distill.models.wan.encoder_memory import decoding_bytes, encoder_bytes, find_decoder
from titan_distill.models.wan.encoders import Encoders, encoder_digests
from titan_distill.models.wan.experts import experts_of, find_boundary
from titan_distill.models.wan.exported_card import sampling_section
from titan_distill.models.wan.exported_scheduler import exported_scheduler
from titan_distill.models.wan.image_channels import EMBEDDING, LATENT, needed_tensors
from titan_distill.models.wan.image_encoder import ImageEncoder
from titan_distill.models.wan.latents import SIZE_NAMES, LatentSpace, find_latent_space
from titan_distill.models.wan.original_names import save_original
from titan_distill.models.wan.parallelize import build_transformer, check_degrees, empty_transformer
from titan_distill.models.wan.pipeline_config import CAUSAL_KEYS, WanPipelineConfig
from titan_distill.models.wan.pipeline_index import exported_index
from titan_distill.models.wan.rows import check_row, text_width
from titan_distill.models.wan.state_dict import UNUSED_KEY, save_folder
from titan_distill.models.wan.stored import EXPERTS, StoredWeights
from titan_distill.models.wan.text_encoder import TextEncoder
from titan_distill.models.wan.tokens import Grid
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.models.wan.vae import decode_latents, load_vae, stored_statistics, vae_dtype
from titan_distill.parallelisms.mesh import Layouts, RoleMesh
from titan_distill.parallelisms.shards import copy_full_tensor
from titan_distill.registry import register_model

logger = logging.getLogger(__name__)


@register_model("wan")
class WanFamily(ModelFamily):
    """Wan 2.1 and 2.2: text-to-video and image-to-video transformers, with one network or two experts."""

    pipeline_config_class: ClassVar[type] = WanPipelineConfig

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._open = functools.cache(StoredWeights)

    @classmethod
    def validate(cls, config: Config) -> None:
        for name, role in config.roles.items():
            if role.flavor not in ("", HEAD_FLAVOR, *FLAVORS):
                raise ValueError(
                    f"roles.{name}.flavor = {role.flavor!r} is not known; it must be one of {', '.join(FLAVORS)}"
                )
        if config.data.holds_videos and not config.pipeline_config.path:
            raise ValueError(
                f"data.path = {config.data.path!r} holds videos and prompts to encode, but pipeline_config.path is "
                "empty; set it to a diffusers folder with vae, text_encoder and tokenizer"
            )
        config.pipeline_config.check_causal(config)

    @classmethod
    def given_parts(cls, config: Config) -> str | None:
        probability = config.pipeline_config.image_probability
        return f"pipeline_config.image_probability = {probability} gives first frames" if probability else None

    def latent_statistics(self) -> LatentStatistics:
        return stored_statistics(self.config.pipeline_config.path)

    @property
    def needs_latents(self) -> bool:
        return self.config.pipeline_config.image_probability > 0

    def extra_tensors(self) -> tuple[str, ...]:
        # Of videos they are made here.
        return () if self.config.data.holds_videos else self._image_tensors()

    def encoder_digests(self) -> dict[str, str]:
        if not (path := self.config.pipeline_config.path):
            return {}
        with of_key("pipeline_config.path", path):
            return encoder_digests(Path(path), TextEncoder(path))

    def row_checks(self) -> tuple[RowCheck, ...]:
        networks = self._known_networks()
        if not networks:
            return ()
        shapes, text_width = [self._space.shape(*size) for size in self._sizes], networks[0].text_dim
        return (partial(check_row, shapes, text_width, next((n.image_dim for n in networks if n.image_dim), None)),)

    def _image_tensors(self) -> tuple[str, ...]:
        return needed_tensors(self._known_networks())

    def _known_networks(self) -> list[WanConfig]:
        return [
            self._architecture(name, role, by_name=True)
            for name, role in self._networks().items()
            # Whoever samples from a checkpoint need not have what all roles once started from.
            if role.flavor or is_reference(role.init_from) or Path(role.path or role.init_from).is_dir()
        ]

    def _stored(self, role: RoleConfig) -> StoredWeights | None:
        """Returns the weights that the role starts from; None if they are random."""
        weights = role.path or role.init_from
        return self._open(weights, may_refer=not role.path) if weights else None

    def _experts(self, name: str, role: RoleConfig, *, by_name: bool) -> tuple[str, ...]:
        return experts_of(name, role, self._stored(role), by_name=by_name)

    def _boundary(self, *, by_name: bool = False) -> float | None:
        weights = {
            name: role.path or role.init_from
            for name, role in self._networks().items()
            if len(self._experts(name, role, by_name=by_name)) > 1
        }
        return find_boundary(self.config.pipeline_config, weights, by_name=by_name)

    def spelled_out(self) -> Config:
        boundary = self._boundary()
        config = self.config.with_tiles(
            {
                name: self._architecture(name, role, by_name=False).vsa_tile
                for name, role in self._networks().items()
                if role.attention == "sparse"
            }
        )
        if boundary is None:
            return config
        return replace(config, pipeline_config=replace(config.pipeline_config, boundary_ratio=boundary))

    def sampling_settings(self, role: str) -> dict[str, Any]:
        pipeline, is_causal = self.config.pipeline_config, self.config.roles[role].attention == "causal"
        of_training = ("buckets", "image_probability", "image_noise_mean", "image_noise_std", "validate_from_image")
        without = ("path", "offload_text_encoder", *of_training, *(() if is_causal else CAUSAL_KEYS))
        settings = {name: x for name, x in super().sampling_settings(role).items() if name not in without}
        settings["boundary_ratio"] = pipeline.boundary_ratio or self._boundary()
        return settings | {"text_encoder": TextEncoder(pipeline.path).files_digest if pipeline.path else ""}

    def build_modules(
        self, name: str, role: RoleConfig, mesh: RoleMesh | None, device: torch.device
    ) -> dict[str, nn.Module]:
        names, stored = self._experts(name, role, by_name=device.type == "meta"), self._stored(role)
        modules = {expert: self.build_module(name, role, mesh, device, expert) for expert in names}
        if stored is not None and len(names) > 1 and device.type != "meta" and len(stored.experts) == 1:
            logger.info("Both experts of %s start from the one network in %s", name, stored.weights)
        configs = [_wan(module).config for module in modules.values()]
        if configs[0] != configs[-1]:
            raise ValueError(f"roles.{name}: the two experts in {role.path or role.init_from} have different shapes")
        return modules

    def build_module(
        self, name: str, role: RoleConfig, mesh: RoleMesh | None, device: torch.device, expert: str = TRANSFORMER
    ) -> nn.Module:
        architecture = self._architecture(name, role, by_name=device.type == "meta", expert=expert)
        stored = self._stored(role)
        load = None if stored is None else stored.loader(expert)
        # Two networks that start at random must not start alike.
        seed = self.config.job.seed + EXPERTS.index(expert)
        return build_transformer(self.config, name, architecture, load, mesh, device, seed)

    def check_files(self) -> None:
        for name, role in self._networks().items():
            if (stored := self._stored(role)) is None:
                continue
            key = f"roles.{name}.{'path' if role.path else 'init_from'}"
            with of_key(key, stored.weights):
                experts = {expert: stored.architecture(expert) for expert in self._experts(name, role, by_name=False)}
            for expert in experts:
                architecture = self._architecture(name, role, by_name=False, expert=expert)
                with of_key(key, stored.weights):
                    stored.check(partial(self._empty, architecture), expert)
        Encoders.check_folders(self.config, self._image_tensors())

    def _empty(self, architecture: WanConfig) -> WanTransformer:
        return empty_transformer(architecture, self.config.sparse_attention, self.config.pipeline_config.segmentation)

    def check_layouts(self, degrees: Mapping[str, Degrees]) -> None:
        self._boundary(by_name=True)
        self._space.check_size(*self.video_size())
        for at, (num_frames, height, width) in enumerate(self.config.pipeline_config.buckets):
            names = [f"{name} of pipeline_config.buckets[{at}]" for name in SIZE_NAMES]
            self._space.check_size(num_frames, height, width, names)
        for name, role in self._networks().items():
            if name not in degrees:
                continue
            architecture = self._architecture(name, role, by_name=True)
            self._check_latents(name, role, architecture)
            self._check_text_width(name, architecture)
            width = min(architecture.inner_dim, architecture.ffn_dim)
            if role.lora.rank > width:
                raise ValueError(
                    f"roles.{name}.lora.rank = {role.lora.rank} is above the width of the layers, {width}, with "
                    "which LoRA adapters give every change of the weights; set it to less, or to 0 to train the weights"
                )
            if role.lora.enabled and degrees[name].tensor > 1:
                raise ValueError(
                    f"roles.{name}.lora does not go with tensor = {degrees[name].tensor}: LoRA adapters are not cut "
                    f"over tensor ranks; set roles.{name}.parallelism.tensor to 1, or lora.rank to 0"
                )
            for size in self._sizes:
                check_degrees(
                    f"roles.{name}",
                    architecture,
                    degrees[name],
                    self.config.roles[name].parallelism.sequence_method,
                    self._space.token_grid(*size),
                    SparseAttention(self.config.sparse_attention) if role.attention == "sparse" else None,
                    self.config.pipeline_config.segmentation if role.attention == "causal" else None,
                )

    def _networks(self) -> dict[str, RoleConfig]:
        """Returns the roles that are networks of the family, not heads."""
        return {name: role for name, role in self.config.roles.items() if role.flavor != HEAD_FLAVOR}

    def _check_latents(self, name: str, role: RoleConfig, architecture: WanConfig) -> None:
        self._space.check_channels(name, architecture.out_channels)
        num_own = architecture.in_channels - architecture.out_channels
        if self.needs_latents and num_own:
            raise ValueError(
                f"roles.{name} takes images in {num_own} channels of its own, not as a first frame; set "
                "pipeline_config.image_probability to 0"
            )
        is_single = len(self._experts(name, role, by_name=True)) == 1
        if role.attention == "causal" and (num_own or not is_single):
            what = "pictures in channels of their own" if is_single else "two experts"
            raise ValueError(
                f"roles.{name}.attention = 'causal' is for one network that makes videos from text, but this one "
                f"has {what}; choose another flavor, or attention = 'dense'"
            )

    def _check_text_width(self, name: str, architecture: WanConfig) -> None:
        width = text_width(self.config.pipeline_config.path)
        if width not in (None, architecture.text_dim):
            raise ValueError(
                f"roles.{name} takes text embeddings of width {architecture.text_dim}, but the text encoder of the run "
                f"makes {width}; choose another model for it, or another pipeline_config.path"
            )

    def token_grid(self) -> Grid:
        return max((self._space.token_grid(*size) for size in self._sizes), key=math.prod)

    def buckets(self) -> dict[Size, tuple[int, ...]]:
        return {size: self._space.shape(*size) for size in self.config.pipeline_config.buckets}

    @property
    def _sizes(self) -> Sequence[Size]:
        """Returns the sizes of the training samples."""
        return self.config.pipeline_config.buckets or (self.video_size(),)

    def encoder_memory(self) -> EncoderMemory:
        name, role = next(iter(self._networks().items()))
        architecture = self._architecture(name, role, by_name=True)
        pipeline, channels = self.config.pipeline_config, architecture.out_channels
        element_bytes = DTYPES[self.config.training.dtype].itemsize
        vae, text = encoder_bytes(pipeline, channels, element_bytes)
        # Captions of videos are encoded while the run trains.
        held, released = (vae + text, 0.0) if self.config.data.holds_videos else (vae, text)
        if not (pipeline.path and self.config.validation.enabled):
            return EncoderMemory(held, released)
        grid = self._space.token_grid(*self.video_size())
        frames, height, width = (n * patch for n, patch in zip(grid, architecture.patch_size, strict=True))
        decoder = find_decoder(pipeline.path, channels)
        return EncoderMemory(held, released, decoding_bytes(decoder, (frames, height, width), element_bytes))

    @functools.cached_property
    def _space(self) -> LatentSpace:
        """Returns the latent space of the pipeline's VAE. Without a pipeline it is the published one with the channels
        of the first role's network."""
        role = next(iter(self._networks().values()))
        return find_latent_space(self.config.pipeline_config.path, lambda: self._out_channels(role))

    def _out_channels(self, role: RoleConfig) -> int:
        stored = None if role.flavor else self._stored(role)  # not from `_architecture`, whose tile needs this space
        return (FLAVORS[role.flavor] if stored is None else stored.architecture(TRANSFORMER)).out_channels

    def video_size(self) -> tuple[int, int, int]:
        pipeline = self.config.pipeline_config
        return pipeline.num_frames, pipeline.height, pipeline.width

    def _architecture(self, name: str, role: RoleConfig, *, by_name: bool, expert: str = TRANSFORMER) -> WanConfig:
        """Returns the configuration of the role's network. Dense weights may become a sparse or a causal model, but not
        the reverse.

        `by_name` uses the flavor without reading files.
        """
        stored = self._stored(role)
        if stored is None or (by_name and role.flavor):
            tile = self._tile(name) if role.attention == "sparse" else FIRST_TILE
            return _attending(FLAVORS[role.flavor], role.attention, tile)
        found, weights = stored.architecture(expert), stored.weights
        trained, lacks = (
            ("causal", "")
            if found.causal_attention
            else ("sparse", f", whose coarse branch a {role.attention} one lacks")
        )
        if (found.causal_attention or found.sparse_attention) and role.attention != trained:
            raise ValueError(
                f"roles.{name}.attention = {role.attention!r}, but {weights} holds a model trained with {trained} "
                f"attention{lacks}; set roles.{name}.attention to {trained!r} or choose other weights"
            )
        tile = FIRST_TILE
        if role.attention == "sparse":
            tile = self._tile(name, stored.tile(expert, by_name=by_name), weights)
        found = _attending(found, role.attention, tile)
        expected = _attending(FLAVORS.get(role.flavor, found), role.attention, tile)
        different = ", ".join(
            f"{f.name} is {getattr(found, f.name)} instead of {getattr(expected, f.name)}"
            for f in dataclasses.fields(found)
            if getattr(found, f.name) != getattr(expected, f.name)
        )
        if different:
            raise ValueError(
                f"roles.{name}.flavor = {role.flavor!r}, but in {weights} {different}; correct the flavor or init_from"
            )
        return found

    def _tile(self, name: str, stored: Tile | None = None, weights: str = "") -> Tile:
        """Returns the tile of a role with sparse attention: that of its `weights`, if they were trained with one."""
        if stored is not None:
            self.config.check_tile(name, stored, weights)
            return stored
        tile = self.config.tile(name)
        if tile != "auto":
            return tile
        self._space.check_size(*self.video_size())
        return best_tile(self.token_grid())

    def architecture(self, module: nn.Module) -> dict[str, Any]:
        return _wan(module).config.to_diffusers()

    def restore_module(
        self, architecture: dict[str, Any], tensors: Iterable[tuple[str, Tensor]], device: torch.device
    ) -> nn.Module:
        model = self._empty(WanConfig.from_diffusers(architecture))
        # As the run computes, so that what is sampled here is what its validation shows.
        model.to(getattr(torch, self.config.training.dtype)).to_empty(device=device).requires_grad_(False)
        parameters, found = dict(model.named_parameters()), {}
        for name, tensor in _used(tensors):
            found[name] = tuple(tensor.shape)
            if name in parameters and parameters[name].shape == tensor.shape:
                copy_full_tensor(parameters[name], tensor)
        check_tensors("the checkpoint", {name: tuple(p.shape) for name, p in parameters.items()}, found)
        return model

    @staticmethod
    def pipeline_index(index: dict[str, Any], modules: Sequence[str], config: Mapping[str, Any]) -> dict[str, Any]:
        return exported_index(index, modules, config)

    @staticmethod
    def write_weights(
        tensors: Iterable[tuple[str, Tensor]], architecture: dict[str, Any], folder: Path, dtype: torch.dtype | None
    ) -> None:
        save_folder(_used(tensors), WanConfig.from_diffusers(architecture), folder, dtype)

    @staticmethod
    def write_original(tensors: Iterable[tuple[str, Tensor]], file: Path, dtype: torch.dtype | None) -> None:
        save_original(_used(tensors), file, dtype)

    def exported_scheduler(self, request: SampleRequest) -> dict[str, Any]:
        return exported_scheduler(request, self.config.pipeline_config.flow_shift)

    def sampling_section(
        self,
        request: SampleRequest,
        architecture: dict[str, Any],
        modules: Sequence[str],
        index: Mapping[str, Any] | None,
    ) -> str:
        network = WanConfig.from_diffusers(architecture)
        # Not `_space`: whoever exports need not have what the other roles started from.
        space = find_latent_space(self.config.pipeline_config.path, lambda: network.out_channels)
        return sampling_section(request, self.config, network, modules, index, space.shape(*self.video_size()))

    def latent_space(self, module: nn.Module) -> dict[str, Any]:
        config = _wan(module).config
        return {"channels": config.out_channels, "text width": config.text_dim}

    def feature_width(self, module: nn.Module, depths: Sequence[int]) -> int:
        num_blocks = _wan(module).config.num_layers
        if outside := [depth for depth in depths if not 0 <= depth < num_blocks]:
            raise ValueError(
                f"a head reads features after block {outside[0]}, but the network has {num_blocks} blocks, "
                f"counted from 0; choose from 0 to {num_blocks - 1}"
            )
        return _wan(module).config.inner_dim

    def build_adapter(self, device: torch.device, layouts: Layouts) -> Adapter:
        config, pipeline, negative = self.config, self.config.pipeline_config, None
        encoders = Encoders.of_run(config, self._image_tensors(), device)
        if pipeline.path:
            # A real text encoder is 22 GB, and one embedding is all that most ranks need of it.
            with of_key("pipeline_config.path", pipeline.path):
                negative = Ranks().on_rank_zero(
                    lambda: encoders.text.cached_embedding(
                        pipeline.negative_prompt, config.data.max_text_tokens, config.job.output_folder / "cache"
                    )
                )
        # A started run has the boundary in its configuration, whatever became of the folders since.
        boundary = pipeline.boundary_ratio or self._boundary()
        shape = self._space.shape(*self.video_size())
        return WanAdapter(config, shape, encoders, device, layouts, negative_LD=negative, boundary_ratio=boundary)

    @classmethod
    def footage_encoder(cls, folders: EncoderFolders, device: torch.device) -> FootageEncoder:
        images = None
        if folders.image_encoder:
            with of_key("--image-encoder", folders.image_encoder):
                images = ImageEncoder(folders.image_encoder, device=device)
        names = (*[LATENT] * folders.images, *[EMBEDDING] * (images is not None))
        text = cls.prompt_encoder(folders, device).text
        with of_key("--vae", folders.vae):
            vae = load_vae(folders.vae, device, vae_dtype(device, torch.bfloat16))
        return Encoders(vae, text, images, names, folders.vae)

    @classmethod
    def prompt_encoder(cls, folders: TextEncoderFolders, device: torch.device) -> Encoders:
        with of_key("--text-encoder", folders.text_encoder):
            return Encoders(text_or_none=TextEncoder(folders.text_encoder, folders.tokenizer, device=device))

    @classmethod
    def latent_decoder(cls, vae: Path, device: torch.device) -> tuple[Callable[[Tensor], Tensor], LatentStatistics]:
        decode = partial(decode_latents, load_vae(vae, device, vae_dtype(device, torch.bfloat16)))
        return decode, replace(stored_statistics(str(vae)), key="--vae")


def _wan(module: nn.Module) -> WanTransformer:
    assert isinstance(module, WanTransformer)
    return module


def _attending(architecture: WanConfig, attention: str, tile: Tile) -> WanConfig:
    is_sparse, is_causal = attention == "sparse", attention == "causal"
    return replace(architecture, sparse_attention=is_sparse, causal_attention=is_causal, vsa_tile=tile)


def _used(tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """Yields only the tensors that the network has. Published weights contain others, which remain after a LoRA adapter
    is merged into them."""
    return ((name, tensor) for name, tensor in tensors if UNUSED_KEY not in name)
