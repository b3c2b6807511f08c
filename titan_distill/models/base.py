"""The two halves of a model family: a build-time plugin and the run-time operations that methods use.

`ModelFamily` builds modules from the configuration; it may use meshes, checkpoints and text encoders. `Adapter` is the
only part that a training method sees: it predicts velocities, encodes prompts and decodes latents. A method that uses
only the Adapter runs on every family, and a family that implements the Adapter runs every method.

Shapes: B batch, C latent channels, F latent frames, H and W latent height and width. Families whose latents are not
videos (the toy family of the tests) have fewer dims after B. Code outside of a family must not assume five dims.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from titan_distill.config.config import Config
from titan_distill.config.degrees import Degrees
from titan_distill.config.role_sections import RoleConfig
from titan_distill.config.text import to_dict
from titan_distill.data.latents import LatentStatistics
from titan_distill.data.loader import Batch
from titan_distill.data.manifest import Size
from titan_distill.data.parquet import RowCheck
from titan_distill.diffusion import schedule
from titan_distill.models.exporting import ExportedFormats
from titan_distill.models.streaming import SegmentStream
from titan_distill.observability.flops import WorkCounter
from titan_distill.parallelisms.mesh import Layouts, RoleMesh
from titan_distill.registry import FAMILIES, lookup
from titan_distill.roles import RoleHandle, RoleManager

Condition = Mapping[str, Tensor]
"""Condition of a prediction: batch-first tensors by name. Methods pass it on without reading it."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: `standard` is `u + w (c - u)`; `offset` is `c + w (c - u)`, which other code
    bases write, and equals the standard form with `w + 1` (see `diffusion.schedule.guide`)."""

    scale: float = 1.0
    form: schedule.GuidanceForm = "standard"

    @property
    def is_identity(self) -> bool:
        return schedule.guidance_is_identity(self.scale, self.form)


class Adapter(ABC):
    """Run-time operations on the models of one family, for all methods."""

    latent_shape: tuple[int, ...]
    """Shape of one sample's latents, without the batch dim. In a run with buckets it is that of the last batch of
    `prepare_batch`; all updates of a step have one shape."""
    sequence_dim: int = 1
    """Dim of batched latents along which causal roles generate a sample segment by segment."""
    flow_shift: float
    """Shift of the noise schedule, the same for every role of a run."""
    work: WorkCounter | None = None
    """Counter of the FLOPs of every forward; None if the family does not know them."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of the latents of validation samples, without the batch dim. Default: that of training samples."""
        return self.latent_shape

    def use_shape(self, batch: Batch) -> None:
        """Makes `latent_shape` that of a batch."""
        if batch.latent_shape is not None:
            self.latent_shape = batch.latent_shape

    def start_step(self, roles: RoleManager, step: int) -> dict[str, float]:
        """Sets the models' own schedules (of sparsity, for instance) to a training step, counted from 0, before the
        step runs. Returns metrics of the schedules to log."""
        return {}

    @abstractmethod
    def prepare_batch(self, batch: Batch) -> Batch:
        """Moves a batch to the device and encodes what is not encoded yet. It does not communicate, so ranks that load
        the same samples may each encode some of them and leave the others to `share_batch`. Raises ValueError."""

    def share_batch(self, batch: Batch) -> Batch:
        """Completes a prepared batch with the samples that other ranks have encoded. Collective. Default: a prepared
        batch is complete."""
        return batch

    @abstractmethod
    def text_condition(self, batch: Batch) -> Condition:
        """Returns the condition of the batch's captions."""

    @abstractmethod
    def negative_condition(self, batch_size: int) -> Condition:
        """Returns the condition of the negative prompt, repeated `batch_size` times."""

    @abstractmethod
    def predict_velocity(self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        """Returns the role's velocity `ε - x0` at the noise level `sigma_B` in [0, 1], a tensor on the host. The result
        has shape and dtype of `x`.

        A causal role processes all segments of `x` at once, each with the segments before it as context. If the
        segments' noise levels differ, `sigma_B` has as many dims as `x` and varies only along the sequence's dim.
        """

    def features(
        self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition, depths: Sequence[int]
    ) -> list[Tensor]:
        """Returns the hidden states of the role's network after each of the blocks `depths` (counted from 0) while it
        predicts a velocity.

        Each is [B, positions, width], for the positions on this rank.
        """
        raise NotImplementedError  # a family whose `feature_width` answers has them

    def mean_over_positions(self, role: RoleHandle, x: Tensor, values_BL: Tensor) -> Tensor:
        """Returns the mean over all positions of `values_BL`, the output of a head on the `features` of `x`: [B],
        float64, equal on all ranks that share the samples."""
        raise NotImplementedError

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decodes latents to uint8 videos `[B, frames, height, width, 3]`."""

    @abstractmethod
    def encode_video(self, videos: Tensor) -> Tensor:
        """Encodes uint8 videos `[B, frames, height, width, 3]` to latents."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Returns the condition of prompts. Raises ValueError if the run has no text encoder."""

    def embed_prompts(self, prompts: list[str]) -> list[Tensor]:
        """Returns text embeddings [tokens, width] without padding, as in the rows of a dataset. Raises ValueError if
        the family or the run has no text encoder."""
        raise ValueError("this model family has no text encoder; take prompts from a parquet file with embeddings")

    def prompt_conditions(
        self, path: str, prompts: Sequence[str], ids: Collection[int]
    ) -> Callable[[Sequence[int]], Condition]:
        """Returns a function from prompt indices, all among `ids`, to the condition of their samples, for the `prompts`
        read from `path`. A text encoder encodes the prompts of `ids` now and need not stay loaded. If the models also
        start from pictures, these come from the same file. Raises ValueError for a file without the data that the
        models need."""
        return lambda ids: self.encode_prompts([prompts[index] for index in ids])

    def release_text_encoder(self) -> None:
        """Frees the memory of a text encoder that training does not need. Called before the first step, once the
        negative prompt and the prompts of validation are encoded. Default: there is nothing to free."""
        return

    def segment_lengths(self, role: RoleHandle, length: int | None = None) -> tuple[int, ...] | None:
        """Returns the lengths of the segments in which a causal role generates a sequence of `length` (default: that of
        a sample). None for a role that generates samples as a whole. Raises ValueError for a length that is not a whole
        number of segments."""
        return None

    def open_stream(self, role: RoleHandle, condition: Condition) -> SegmentStream:
        """Begins a batch of sequences that a causal role generates segment by segment. Raises ValueError for other
        roles."""
        raise ValueError(f"role {role.name!r} makes samples as a whole; set roles.{role.name}.attention to 'causal'")

    def segment_shape(self, length: int) -> tuple[int, ...]:
        """Returns the shape of one sample's latents, without the batch dim, for `length` along the sequence's dim."""
        before, behind = self.sequence_dim - 1, self.sequence_dim
        return (*self.latent_shape[:before], length, *self.latent_shape[behind:])

    def last_sample(self, sequence: Tensor) -> Tensor:
        """Returns the end of a longer sequence as a sample of its own.

        If the first latent of a sample has another meaning than later ones (in Wan it stands for one picture instead of
        four), the family encodes it again, without an autograd graph.
        """
        length = self.latent_shape[self.sequence_dim - 1]
        return sequence.narrow(self.sequence_dim, sequence.shape[self.sequence_dim] - length, length)

    def num_latents(self, role: RoleHandle, num_frames: int) -> int:
        """Returns the length of the latents of a video of `num_frames`. Raises ValueError if the role cannot generate
        such a video."""
        raise ValueError(f"only a causal role makes videos of any length, and {role.name!r} is none; leave it out")

    def with_image(self, condition: Condition, images: Tensor) -> Condition:
        """Returns the condition with pictures, uint8 [B, height, width, 3], from which the samples start. Raises
        ValueError if the models of the run cannot start from pictures."""
        raise ValueError("the models of this run make videos from text only; leave the image out")

    def held(self, x: Tensor, sigma_B: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Returns the input of a network and its noise level, [B] or broadcastable to x: `x` at level `sigma_B`, in
        which the parts given by the condition (such as a first frame) are replaced. Default: no part is given."""
        return x, sigma_B

    def loss_mask(self, condition: Condition) -> Tensor | None:
        """Returns 1 for the elements of a sample that losses count and 0 for those that the condition gives; None if it
        gives none."""
        return None

    def add_noise(self, x0: Tensor, noise: Tensor, sigma_B: Tensor) -> Tensor:
        """Returns `x_σ = (1 - σ) x0 + σ ε`."""
        return schedule.add_noise(x0, noise, sigma_B)

    def predict_x0(
        self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition, guidance: Guidance | None = None
    ) -> Tensor:
        """Returns the role's estimate of the clean latents, with classifier-free guidance if `guidance` is given."""
        velocity = self.guided_velocity(role, x, sigma_B, condition, guidance or Guidance())
        shown, sigma = self.held(x, sigma_B, condition)
        return schedule.x0_from_velocity(shown, velocity, sigma)

    @torch.no_grad()
    def predict_velocity_jvp(
        self, role: RoleHandle, x: Tensor, sigma_B: Tensor, dx: Tensor, dsigma_B: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor]:
        """Returns the role's velocity and its derivative along `(dx, dsigma_B)`, both in shape and dtype of `x` and
        without an autograd graph.

        The derivative is exact. Forward-mode differentiation takes one pass with twice the FLOPs of a forward, in
        self-attention three times (`attention.dense`), and stores no activations. Operations without a forward-mode
        derivative (sparse attention, compiled blocks, float8) raise NotImplementedError or RuntimeError; a method that
        needs derivatives must refuse such roles in its validation. Collectives also exchange the tangents.
        """
        counting = self.work.forward_mode() if self.work else nullcontext()
        with counting, forward_ad.dual_level():
            inputs = forward_ad.make_dual(x, dx), forward_ad.make_dual(sigma_B, dsigma_B)
            velocity, tangent = forward_ad.unpack_dual(self.predict_velocity(role, *inputs, condition))
        assert tangent is not None, "the velocity depends on neither x nor sigma"
        return velocity, tangent

    def guided_velocity(
        self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition, guidance: Guidance
    ) -> Tensor:
        """Returns the guided velocity. One forward of a doubled batch gives the conditional and the unconditional
        velocity; at scale 1 one plain forward suffices."""
        if guidance.is_identity:
            return self.predict_velocity(role, x, sigma_B, condition)
        negative = {**condition, **self.negative_condition(x.shape[0])}
        both = {name: torch.cat([value, negative[name]]) for name, value in condition.items()}
        velocity = self.predict_velocity(role, torch.cat([x, x]), torch.cat([sigma_B, sigma_B]), both)
        conditional, unconditional = velocity.chunk(2)
        return schedule.guide(conditional, unconditional, self.guidance_scale(role, sigma_B, guidance), guidance.form)

    def guidance_scale(self, role: RoleHandle, sigma_B: Tensor, guidance: Guidance) -> float | Tensor:
        """Returns the guidance scale, or one scale per sample that broadcasts over its dims. A family may override the
        method's scale."""
        return guidance.scale


@dataclass(frozen=True, kw_only=True)
class TextEncoderFolders:
    """Folders of a model family's text encoder."""

    text_encoder: Path
    """Text encoder: its folder, or the pipeline folder that has it as text_encoder/."""
    tokenizer: Path | None = None
    """Tokenizer folder. Default: tokenizer/ beside the text encoder."""


@dataclass(frozen=True, kw_only=True)
class EncoderFolders(TextEncoderFolders):
    """Folders of a model family's encoders."""

    vae: Path
    """Video encoder (VAE): its diffusers folder, or the pipeline folder that has it as vae/."""
    images: bool = False
    """Also encode the first frame of each clip as a picture, for image-to-video models that take a picture in separate
    channels."""
    image_encoder: Path | None = None
    """With --images: pipeline folder with image_encoder/ and image_processor/ (CLIP), for models that attend to CLIP
    embeddings."""


@dataclass(frozen=True)
class EncoderMemory:
    """Bytes of encoders on a rank, in the compute dtype.

    Attributes:
        held: weights that stay on the device during training.
        released: weights that leave the device before the first step.
        decoding: peak of decoding one sample, in addition to `held`; 0 if the run decodes nothing.
    """

    held: float = 0.0
    released: float = 0.0
    decoding: float = 0.0


class FootageEncoder(ABC):
    """Encodes footage and captions into the rows of a data set."""

    @abstractmethod
    def check_size(self, num_frames: int, height: int, width: int) -> None:
        """Raises ValueError if the encoder cannot encode clips of this size in pixels."""

    @abstractmethod
    def encode_video(self, videos: Tensor) -> Tensor:
        """Encodes uint8 videos [B, frames, height, width, 3] to latents."""

    @abstractmethod
    def embed_prompt(self, prompt: str, max_tokens: int) -> Tensor:
        """Returns the text embedding [tokens, width] of one prompt. Longer prompts are cut to `max_tokens` with a
        warning."""

    def digests(self) -> dict[str, str]:
        """Returns digests of the encoders by name (`data.manifest.ENCODERS`), for the manifest of the data. Default:
        none."""
        return {}

    @abstractmethod
    def encode_pictures(self, images: Tensor, num_frames: int) -> dict[str, Tensor]:
        """Returns further tensors by name that image-to-video models need for uint8 pictures [B, height, width, 3] and
        videos of `num_frames`. Empty unless `EncoderFolders.images` is true."""


class ModelFamily(ExportedFormats):
    """Build-time plugin of a family, registered with `@register_model`."""

    pipeline_config_class: ClassVar[type]
    """Frozen dataclass that types `[pipeline_config]`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @classmethod
    def validate(cls, config: Config) -> None:
        """Checks the configuration against the family's invariants. Raises ValueError."""
        return

    @classmethod
    def given_parts(cls, config: Config) -> str | None:
        """Returns the configuration key by which conditions give parts of the training samples, as the beginning of a
        sentence; None if no part is given. Only methods with `uses_loss_mask` can train with given parts."""
        return None

    def check_files(self) -> None:
        """Checks the weights and encoders that the configuration names, by the headers of their files, before anything
        is built. Raises ValueError."""
        return

    def check_layouts(self, degrees: Mapping[str, Degrees]) -> None:
        """Checks each role's degrees against its network, before anything is built. Raises ValueError."""
        return

    def token_grid(self) -> tuple[int, int, int] | None:
        """Returns the tokens of the largest sample along (frames, height, width), for the planner; None if samples
        are not videos."""
        return None

    def video_size(self) -> tuple[int, int, int] | None:
        """Returns (frames, height, width) of a sample in pixels; None if samples are not videos."""
        return None

    def buckets(self) -> dict[Size, tuple[int, ...]]:
        """Returns the shapes of the latents of a run with several, by the size of the video; empty for one shape."""
        return {}

    def latent_statistics(self) -> LatentStatistics | None:
        """Returns the statistics with which raw latents become those of the networks, empty ones if the run has no VAE.
        None if the family has no such step. Raises ValueError for a VAE's configuration that can't be read."""
        return None

    @property
    def needs_latents(self) -> bool:
        """Returns whether training conditions are made from the data's latents. The data must then have latents for
        every method."""
        return False

    def encoder_memory(self) -> EncoderMemory:
        """Returns the memory of encoding and decoding on a rank, for the planner."""
        return EncoderMemory()

    def encoder_digests(self) -> dict[str, str]:
        """Returns digests of the run's encoders by name (`data.manifest.ENCODERS`), without loading them. Raises
        ValueError for folders without the required files. Default: none."""
        return {}

    def row_checks(self) -> tuple[RowCheck, ...]:
        """Returns checks of each row of parquet data: the sizes of latents, text embeddings and the tensors of
        `extra_tensors`. They need no weights."""
        return ()

    def extra_tensors(self) -> tuple[str, ...]:
        """Returns the names of the tensors, apart from text, that training conditions need from every row of the
        data."""
        return ()

    @abstractmethod
    def build_module(self, name: str, role: RoleConfig, mesh: RoleMesh | None, device: torch.device) -> nn.Module:
        """Builds, shards and loads the network of one role. On `device("meta")` nothing is allocated or loaded."""

    def build_modules(
        self, name: str, role: RoleConfig, mesh: RoleMesh | None, device: torch.device
    ) -> dict[str, nn.Module]:
        """Builds all networks of one role with `build_module` and returns them by name: `transformer`, and a second
        expert if there is one."""
        return {"transformer": self.build_module(name, role, mesh, device)}

    def spelled_out(self) -> Config:
        """Returns the configuration in which keys of the family that come from files (such as `model_index.json`) have
        their values, for `config.toml` to record. Raises ValueError."""
        return self.config

    def sampling_settings(self, role: str) -> dict[str, Any]:
        """Returns all that samples of a role depend on beside its weights and the request, by name: the keys of
        [pipeline_config], from which a family may leave out those without effect on samples of this role, and digests
        of files that it reads. Raises ValueError."""
        return to_dict(self.config.pipeline_config)

    @abstractmethod
    def architecture(self, module: nn.Module) -> dict[str, Any]:
        """Returns everything needed to build the module again, as JSON values. Checkpoints and exports contain it."""

    @abstractmethod
    def restore_module(
        self, architecture: dict[str, Any], tensors: Iterable[tuple[str, Tensor]], device: torch.device
    ) -> nn.Module:
        """Builds an unsharded, frozen module from its architecture and its full tensors by name, as in a checkpoint.
        Its parameters have the dtype training.dtype."""

    @abstractmethod
    def latent_space(self, module: nn.Module) -> dict[str, Any]:
        """Returns properties of the latents that a module processes. All roles of a run must agree on them."""

    def check_latent_spaces(self, modules: Mapping[str, Mapping[str, nn.Module]]) -> None:
        """Raises ValueError if the networks of the roles in `modules` do not share one latent space."""
        spaces = {name: self.latent_space(networks["transformer"]) for name, networks in modules.items()}
        for name, space in spaces.items():
            first, expected = next(iter(spaces.items()))
            for key, value in space.items():
                if value != expected[key]:
                    raise ValueError(
                        f"roles.{name} works on latents with {key} = {value}, but roles.{first} with {key} = "
                        f"{expected[key]}; all roles of a run must share one latent space"
                    )

    def feature_width(self, module: nn.Module, depths: Sequence[int]) -> int:
        """Returns the width of the features after each of `depths` (see `Adapter.features`). Raises ValueError for
        depths that the network does not have, and if the family has no features."""
        raise ValueError(f"recipe.family = {self.config.recipe.family!r} offers no features for a head to read")

    @classmethod
    def footage_encoder(cls, folders: EncoderFolders, device: torch.device) -> FootageEncoder:
        """Returns the encoder of this family's datasets. Raises ValueError for folders without the required files."""
        raise ValueError(f"{cls.__name__} encodes no footage; choose another --family")

    @classmethod
    def prompt_encoder(cls, folders: TextEncoderFolders, device: torch.device) -> FootageEncoder:
        """Returns an encoder of prompts only. Raises ValueError for folders without the required files."""
        raise ValueError(f"{cls.__name__} encodes no prompts; choose another --family")

    @classmethod
    def latent_decoder(cls, vae: Path, device: torch.device) -> tuple[Callable[[Tensor], Tensor], LatentStatistics]:
        """Returns a function from normalised latents [B, C, F, H, W] to uint8 videos [B, frames, height, width, 3], and
        the statistics of raw latents. `vae` is the decoder's folder or its pipeline's. Raises ValueError if the family
        has none."""
        raise ValueError(f"{cls.__name__} decodes no latents; leave out --vae")

    @abstractmethod
    def build_adapter(self, device: torch.device, layouts: Layouts) -> Adapter:
        """Returns the Adapter, the run-time half of the family."""


def model_family(name: str) -> type[ModelFamily]:
    """Returns the family registered under `name`. Raises ValueError with the known families and the nearest name."""
    return lookup(FAMILIES, name)
