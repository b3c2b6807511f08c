"""Build-time plugin of the Wan family: from configuration to transformer, adapter and validator."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from titan_distill.attention.causal import Segmentation
from titan_distill.attention.sparse import SparseAttention
from titan_distill.checkpoint.diffusers_folder import TRANSFORMER, network_folder
from titan_distill.checkpoint.initial_weights import is_reference, read_weights, resolve_reference
from titan_distill.config.degrees import Degrees
from titan_distill.config.role_sections import HEAD_FLAVOR
from titan_distill.config.sections import SparseAttentionConfig
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.models.base import Adapter, ModelFamily
from titan_distill.models.wan.adapter import WanAdapter
from titan_distill.models.wan.config import FLAVORS, WanConfig
from titan_distill.models.wan.encoder_memory import decoding_bytes, encoder_bytes, find_decoder
from titan_distill.models.wan.experts import EXPERTS, experts_of, find_boundary, stored_experts
from titan_distill.models.wan.first_frame import ImageMixing, expands_timesteps
from titan_distill.models.wan.frame_blocks import check_segments, segmentation_of
from titan_distill.models.wan.image_channels import EMBEDDING, needed_tensors
from titan_distill.models.wan.image_encoder import ENCODER, ImageEncoder
from titan_distill.models.wan.latents import LatentSpace, find_latent_space
from titan_distill.models.wan.parallelize import Layout, WeightLoader, build_transformer, check_degrees
from titan_distill.models.wan.pipeline_config import WanPipelineConfig
from titan_distill.models.wan.state_dict import UNUSED_KEY, load_weights, read_config, save_folder
from titan_distill.models.wan.text_encoder import TextEncoder
from titan_distill.models.wan.tokens import Grid
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.models.wan.vae import load_vae, vae_dtype
from titan_distill.parallelisms.mesh import Layouts, RoleMesh, main_rank_first
from titan_distill.parallelisms.shards import copy_full_tensor
from titan_distill.registry import register_model

if TYPE_CHECKING:
    from titan_distill.config.config import Config
    from titan_distill.config.role_sections import RoleConfig

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@register_model("wan")
class WanFamily(ModelFamily):
    """Wan 2.1 text-to-video and its tiny relative."""

    pipeline_config_class: ClassVar[type] = WanPipelineConfig

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
        check_segments(config)

    @classmethod
    def given_parts(cls, config: Config) -> str | None:
        probability = config.pipeline_config.image_probability
        return f"pipeline_config.image_probability = {probability} gives first frames" if probability else None

    @property
    def needs_latents(self) -> bool:
        return self.config.pipeline_config.image_probability > 0

    def extra_tensors(self) -> tuple[str, ...]:
        # Of videos they are made here.
        return () if self.config.data.holds_videos else self._image_tensors()

    def _image_tensors(self) -> tuple[str, ...]:
        known = [
            self._architecture(name, role, by_name=bool(role.flavor))
            for name, role in self._networks().items()
            # Whoever samples from a checkpoint need not have what all roles once started from.
            if role.flavor or is_reference(role.init_from) or Path(role.path or role.init_from).is_dir()
        ]
        return needed_tensors(known)

    def _image_encoder(self, tensors: Sequence[str], device: torch.device) -> ImageEncoder | None:
        """None where no embedding is needed, or where the data has all of them and nothing else can be sampled from."""
        path = self.config.pipeline_config.path
        if EMBEDDING not in tensors or not (Path(path) / ENCODER).is_dir():
            return None
        return ImageEncoder(path, device=device)

    def spelled_out(self) -> Config:
        boundary = find_boundary(self.config)
        if boundary is None:
            return self.config
        return replace(self.config, pipeline_config=replace(self.config.pipeline_config, boundary_ratio=boundary))

    def build_modules(
        self, name: str, role: RoleConfig, mesh: RoleMesh | None, device: torch.device
    ) -> dict[str, nn.Module]:
        names = experts_of(name, role, by_name=device.type == "meta")
        modules = {expert: self.build_module(name, role, mesh, device, expert) for expert in names}
        weights = role.path or role.init_from
        if len(names) > 1 and device.type != "meta" and weights and len(stored_experts(weights)) == 1:
            logger.info("Both experts of %s start from the one network in %s", name, weights)
        configs = [_wan(module).config for module in modules.values()]
        if configs[0] != configs[-1]:
            raise ValueError(f"roles.{name}: the two experts in {weights} have different shapes")
        return modules

    def build_module(
        self,
        name: str,
        role: RoleConfig,
        mesh: RoleMesh | None,
        device: torch.device,
        expert: str = TRANSFORMER,
    ) -> nn.Module:
        config = self.config
        compute_dtype = DTYPES[config.training.dtype]
        auto_dtype = torch.float32 if role.trainable and not role.lora.enabled else compute_dtype
        layout = Layout(
            mesh=mesh,
            parallelism=config.roles[name].parallelism,
            device=device,
            trainable=role.trainable,
            storage_dtype=auto_dtype if role.dtype == "auto" else DTYPES[role.dtype],
            compute_dtype=compute_dtype,
            activation_checkpoint=config.activation_checkpoint,
            compile=config.compile,
            float8=config.float8.for_role(name),
            lora=role.lora,
            sparse_attention=config.sparse_attention if role.attention == "sparse" else None,
            segmentation=self._segmentation(role.attention == "causal"),
        )
        architecture = self._architecture(name, role, by_name=device.type == "meta", expert=expert)
        # Two networks that start at random must not start alike.
        seed = config.job.seed + EXPERTS.index(expert)
        return build_transformer(architecture, _loader(role.path or role.init_from, expert), layout, seed)

    def check_layouts(self, degrees: Mapping[str, Degrees]) -> None:
        find_boundary(self.config, by_name=True)
        space = self._latent_space()
        space.check_size(*self.video_size())
        networks = self._networks()
        for name, layout in ((name, layout) for name, layout in degrees.items() if name in networks):
            architecture = self._architecture(name, networks[name], by_name=True)
            self._check_latents(name, architecture, space)
            if self.config.roles[name].lora.enabled and layout.tensor > 1:
                raise ValueError(
                    f"roles.{name}.lora does not go with tensor = {layout.tensor}: adapters are not cut over tensor "
                    f"ranks; set roles.{name}.parallelism.tensor to 1, or lora.rank to 0"
                )
            check_degrees(
                f"roles.{name}",
                architecture,
                layout,
                self.config.roles[name].parallelism.sequence_method,
                self.token_grid(),
                self._core(self.config.roles[name].attention == "sparse"),
                self._segmentation(self.config.roles[name].attention == "causal"),
            )

    def _networks(self) -> dict[str, RoleConfig]:
        """The roles that are networks of the family, and no heads."""
        return {name: role for name, role in self.config.roles.items() if role.flavor != HEAD_FLAVOR}

    def _check_latents(self, name: str, architecture: WanConfig, space: LatentSpace) -> None:
        space.check_channels(name, architecture.out_channels)
        if self.needs_latents and architecture.in_channels != architecture.out_channels:
            raise ValueError(
                f"roles.{name} takes images in {architecture.in_channels - architecture.out_channels} channels of its "
                "own, not as a first frame; set pipeline_config.image_probability to 0"
            )
        role = self.config.roles[name]
        if role.attention == "causal":
            is_single = len(experts_of(name, role, by_name=True)) == 1
            if not is_single or architecture.in_channels != architecture.out_channels:
                what = "pictures in channels of their own" if is_single else "two experts"
                raise ValueError(
                    f"roles.{name}.attention = 'causal' is for one network that makes videos from text, but this one "
                    f"has {what}; choose another flavor, or attention = 'dense'"
                )

    def token_grid(self) -> Grid:
        return self._latent_space().token_grid(*self.video_size())

    def encoder_memory(self) -> tuple[float, float]:
        name, role = next(iter(self._networks().items()))
        architecture = self._architecture(name, role, by_name=True)
        pipeline, channels = self.config.pipeline_config, architecture.out_channels
        element_bytes = DTYPES[self.config.training.dtype].itemsize
        encoders = encoder_bytes(pipeline, channels, element_bytes)
        if not (pipeline.path and self.config.validation.enabled):
            return encoders, 0.0
        frames, height, width = (n * patch for n, patch in zip(self.token_grid(), architecture.patch_size, strict=True))
        decoder = find_decoder(pipeline.path, channels)
        return encoders, decoding_bytes(decoder, (frames, height, width), element_bytes)

    def _latent_space(self) -> LatentSpace:
        """Of the pipeline's VAE, or of the first role where there is no pipeline."""
        name, role = next(iter(self._networks().items()))
        return find_latent_space(
            self.config.pipeline_config.path, lambda: self._architecture(name, role, by_name=True).out_channels
        )

    def video_size(self) -> tuple[int, int, int]:
        pipeline = self.config.pipeline_config
        return pipeline.num_frames, pipeline.height, pipeline.width

    def _core(self, is_sparse: bool) -> SparseAttention | None:
        return SparseAttention(self.config.sparse_attention) if is_sparse else None

    def _segmentation(self, is_causal: bool) -> Segmentation | None:
        return segmentation_of(self.config.pipeline_config) if is_causal else None

    def _architecture(self, name: str, role: RoleConfig, *, by_name: bool, expert: str = TRANSFORMER) -> WanConfig:
        """What the role's network looks like: dense weights may become a sparse or a causal model, but not the other
        way round.

        ``by_name`` believes a flavor without reading any file.
        """
        weights = role.path or role.init_from
        if not weights or (by_name and role.flavor):
            return _attending(FLAVORS[role.flavor], role.attention)
        found = _stored_architecture(weights, expert)
        if found.causal_attention and role.attention != "causal":
            raise ValueError(
                f"roles.{name}.attention = {role.attention!r}, but {weights} holds a model trained with causal "
                f"attention; set roles.{name}.attention to 'causal' or choose other weights"
            )
        if found.sparse_attention and role.attention != "sparse":
            raise ValueError(
                f"roles.{name}.attention = {role.attention!r}, but {weights} holds a model trained with sparse "
                f"attention, whose coarse branch a {role.attention} one lacks; set roles.{name}.attention to 'sparse' "
                "or choose other weights"
            )
        found = _attending(found, role.attention)
        expected = _attending(FLAVORS.get(role.flavor, found), role.attention)
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

    def architecture(self, module: nn.Module) -> dict[str, Any]:
        return _wan(module).config.to_diffusers()

    def restore_module(
        self, architecture: dict[str, Any], tensors: Iterable[tuple[str, Tensor]], device: torch.device
    ) -> nn.Module:
        config = WanConfig.from_diffusers(architecture)
        with torch.device("meta"):
            model = WanTransformer.from_config(
                config, self._core(config.sparse_attention), self._segmentation(config.causal_attention)
            )
        # As the run computes, so that what is sampled here is what its validation shows.
        model.to(DTYPES[self.config.training.dtype]).to_empty(device=device).requires_grad_(False)
        parameters = dict(model.named_parameters())
        for name, tensor in _used(tensors):
            copy_full_tensor(parameters.pop(name), tensor)
        assert not parameters, f"the checkpoint lacks {', '.join(parameters)}"
        return model

    @staticmethod
    def used_weights(architecture: dict[str, Any], shapes: Mapping[str, torch.Size]) -> list[str]:
        with torch.device("meta"):
            config = WanConfig.from_diffusers(architecture)
            model = WanTransformer(
                config,
                SparseAttention(SparseAttentionConfig()) if config.sparse_attention else None,
                Segmentation() if config.causal_attention else None,
            )
        wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
        found = {name: shape for name, shape in shapes.items() if UNUSED_KEY not in name}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                stored, asked = (list(x) if x is not None else "absent" for x in (found.get(name), wanted.get(name)))
                raise ValueError(f"{name} is {stored} in the weights, but {asked} by config.json")
        return sorted(wanted)

    @staticmethod
    def write_weights(
        tensors: Iterable[tuple[str, Tensor]], architecture: dict[str, Any], folder: Path, dtype: torch.dtype | None
    ) -> None:
        save_folder(_used(tensors), WanConfig.from_diffusers(architecture), folder, dtype)

    def latent_space(self, module: nn.Module) -> dict[str, Any]:
        config = _wan(module).config
        return {"channels": config.out_channels, "text width": config.text_dim}

    def feature_width(self, module: nn.Module, depths: Sequence[int]) -> int:
        num_blocks = _wan(module).config.num_layers
        if outside := [depth for depth in depths if not 0 <= depth < num_blocks]:
            raise ValueError(
                f"a head is to read features behind block {outside[0]}, but the network has {num_blocks} blocks, "
                f"counted from 0; choose from 0 to {num_blocks - 1}"
            )
        return _wan(module).config.inner_dim

    def build_adapter(self, device: torch.device, layouts: Layouts) -> Adapter:
        config, pipeline = self.config, self.config.pipeline_config
        vae = text_encoder = negative = None
        if pipeline.path:
            compute_dtype = DTYPES[config.training.dtype]
            vae = load_vae(Path(pipeline.path), device, vae_dtype(device, compute_dtype))
            text_encoder = TextEncoder(
                pipeline.path, dtype=compute_dtype, device=device, offload=pipeline.offload_text_encoder
            )
            with main_rank_first():  # a real text encoder is 22 GB, and one embedding is all that most ranks need of it
                negative = text_encoder.cached_embedding(
                    pipeline.negative_prompt, config.data.max_text_tokens, config.job.output_folder / "cache"
                )
        image_tensors = self._image_tensors()
        return WanAdapter(
            latent_shape=self._latent_space().shape(*self.video_size()),
            flow_shift=pipeline.flow_shift,
            max_text_tokens=config.data.max_text_tokens,
            negative_embedding_LD=negative,
            vae=vae,
            text_encoder=text_encoder,
            text_cache=config.job.output_folder / "cache",
            device=device,
            layouts=layouts,
            checkpointing=config.activation_checkpoint,
            # A started run has it in its configuration, whatever became of the folders since.
            boundary_ratio=pipeline.boundary_ratio or find_boundary(config),
            guidance_scale_2=pipeline.guidance_scale_2,
            image_tensors=image_tensors,
            image_encoder=self._image_encoder(image_tensors, device),
            num_frames=pipeline.num_frames,
            image_mixing=self._image_mixing(),
            validation_size=(pipeline.height, pipeline.width) if pipeline.validate_from_image else None,
            takes_images=pipeline.image_probability > 0 or expands_timesteps(pipeline.path),
        )

    def _image_mixing(self) -> ImageMixing | None:
        pipeline = self.config.pipeline_config
        if not pipeline.image_probability:
            return None
        noise = KeyedNoise(self.config.job.seed)
        return ImageMixing(noise, pipeline.image_probability, pipeline.image_noise_mean, pipeline.image_noise_std)


def _wan(module: nn.Module) -> WanTransformer:
    assert isinstance(module, WanTransformer)
    return module


def _attending(architecture: WanConfig, attention: str) -> WanConfig:
    return replace(architecture, sparse_attention=attention == "sparse", causal_attention=attention == "causal")


def _used(tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """Without what published weights hold and no network has: adapters are merged into everything that a base holds."""
    return ((name, tensor) for name, tensor in tensors if UNUSED_KEY not in name)


def _stored_architecture(weights: str, expert: str) -> WanConfig:
    if is_reference(weights):
        return WanConfig.from_diffusers(resolve_reference(weights).trained.architecture)
    return read_config(network_folder(Path(weights), expert))


def _loader(weights: str, expert: str) -> WeightLoader | None:
    """What fills a model with the weights of a folder or of a role in a checkpoint; None where none are named."""
    if not weights:
        return None
    if is_reference(weights):
        return partial(read_weights, weights, name=expert)
    return partial(load_weights, folder=network_folder(Path(weights), expert))
