"""The two halves of a model family: a build-time plugin and the run-time operations that methods use.

`ModelFamily` turns configuration into modules (it may know about meshes, checkpoints, text encoders). `Adapter` is the
only part that a training method sees: predict a velocity, encode a prompt, decode latents. A method written against the
Adapter runs on every family; a family that implements it runs every method. Neither contains a word of the other's
vocabulary.

Shapes: B batch, C latent channels, F latent frames, H and W latent height and width. Families whose latents are not
videos (the toy family of the tests) use fewer dims after B; nothing outside a family assumes five.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from titan_distill.config.config import Config
from titan_distill.config.degrees import Degrees
from titan_distill.config.role_sections import RoleConfig
from titan_distill.data.loader import Batch
from titan_distill.diffusion import schedule
from titan_distill.models.streaming import SegmentStream
from titan_distill.observability.flops import WorkCounter
from titan_distill.parallelisms.mesh import Layouts, RoleMesh
from titan_distill.registry import FAMILIES, lookup
from titan_distill.roles import RoleHandle, RoleManager

Condition = Mapping[str, Tensor]
"""The condition of a prediction: batch-first tensors by name. Opaque to methods."""


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
    """Run-time operations on the models of one family. No method's vocabulary appears here."""

    latent_shape: tuple[int, ...]
    """Shape of one sample's latents, without the batch dim."""
    sequence_dim: int = 1
    """Dim of batched latents along which causal roles make a sample segment by segment."""
    flow_shift: float
    """Shift of the noise schedule, the same for every role of a run."""
    work: WorkCounter | None = None
    """Counts FLOPs of every forward, where the family knows them."""

    def start_step(self, roles: RoleManager, step: int) -> dict[str, float]:
        """Lets models follow schedules of their own to a training step, counted from 0, before anything of it runs.
        Returns what to log of them."""
        return {}

    @abstractmethod
    def prepare_batch(self, batch: Batch) -> Batch:
        """Moves a batch to the device and checks its shapes against this family. Raises ValueError."""

    @abstractmethod
    def text_condition(self, batch: Batch) -> Condition:
        """The condition of the batch's captions."""

    @abstractmethod
    def negative_condition(self, batch_size: int) -> Condition:
        """The condition of the negative prompt, repeated `batch_size` times."""

    @abstractmethod
    def predict_velocity(self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        """The role's velocity `ε - x0` at noise level `sigma_B` in [0, 1], on the host; shape and dtype of `x`.

        A causal role reads all segments of `x` at once, each with those before it as its context; their noise levels
        may differ: then `sigma_B` has the dims of `x` and varies along the sequence's alone.
        """

    def features(
        self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition, depths: Sequence[int]
    ) -> list[Tensor]:
        """Hidden states of the role's network behind those of its parts that `depths` names, counted from 0, while it
        predicts a velocity: [B, positions, width] each, of the positions that this rank has."""
        raise NotImplementedError  # a family whose `feature_width` answers has them

    def mean_over_positions(self, role: RoleHandle, x: Tensor, values_BL: Tensor) -> Tensor:
        """Mean over all positions of what a head made of `features` of `x`: [B], float64, equal on all ranks that
        share the samples."""
        raise NotImplementedError

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents to uint8 videos `[B, frames, height, width, 3]`."""

    @abstractmethod
    def encode_video(self, videos: Tensor) -> Tensor:
        """uint8 videos `[B, frames, height, width, 3]` to latents."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Runs the text encoder. Raises ValueError when the run was configured without one."""

    def embed_prompts(self, prompts: list[str]) -> list[Tensor]:
        """Text embeddings [tokens, width] as a dataset's rows hold them, without padding. Raises ValueError where
        the family has no text encoder, or the run was configured without one."""
        raise ValueError("this model family has no text encoder; take prompts from a parquet file with embeddings")

    def prompt_conditions(self, path: str, prompts: Sequence[str]) -> Callable[[Sequence[int]], Condition]:
        """Returns a function from prompt indices to the condition of their samples, for the `prompts` read from `path`.
        A family whose models also start from pictures takes these from the same file. Raises ValueError for a file
        that lacks what the models need."""
        return lambda ids: self.encode_prompts([prompts[index] for index in ids])

    def segment_lengths(self, role: RoleHandle, length: int | None = None) -> tuple[int, ...] | None:
        """Lengths of the segments in which a causal role makes a sequence of `length`, a sample's by default; None
        for a role that makes it as a whole. Raises ValueError for a length that segments don't fill."""
        return None

    def open_stream(self, role: RoleHandle, condition: Condition) -> SegmentStream:
        """Begins a batch of sequences, which a causal role makes segment by segment. Raises ValueError for a role that
        can't."""
        raise ValueError(f"role {role.name!r} makes samples as a whole; set roles.{role.name}.attention to 'causal'")

    def segment_shape(self, length: int) -> tuple[int, ...]:
        """Shape of one sample's latents, without the batch dim, when it is `length` long along the sequence's dim."""
        before, behind = self.sequence_dim - 1, self.sequence_dim
        return (*self.latent_shape[:before], length, *self.latent_shape[behind:])

    def last_sample(self, sequence: Tensor) -> Tensor:
        """The end of a sequence longer than a sample, as a sample that begins there. A family whose first latent means
        something else than those behind it encodes it anew, without a graph."""
        length = self.latent_shape[self.sequence_dim - 1]
        return sequence.narrow(self.sequence_dim, sequence.shape[self.sequence_dim] - length, length)

    def num_latents(self, role: RoleHandle, num_frames: int) -> int:
        """Length of the latents of a video of `num_frames`, where the role can make such a one; else ValueError."""
        raise ValueError(f"only a causal role makes videos of any length, and {role.name!r} is none; leave it out")

    def with_image(self, condition: Condition, images: Tensor) -> Condition:
        """The condition that samples also start from these pictures, uint8 [B, height, width, 3]. Raises ValueError
        where the models of the run can't."""
        raise ValueError("the models of this run make videos from text only; leave the image out")

    def held(self, x: Tensor, sigma_B: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The input of a network: `x` at level `sigma_B` with those parts in place that the condition gives, and its
        noise level, [B] or broadcastable to x. Nothing is given by default."""
        return x, sigma_B

    def loss_mask(self, condition: Condition) -> Tensor | None:
        """1 where losses count an element of a sample, 0 where the condition gives it; None where it gives nothing."""
        return None

    def add_noise(self, x0: Tensor, noise: Tensor, sigma_B: Tensor) -> Tensor:
        """`x_σ = (1 - σ) x0 + σ ε`."""
        return schedule.add_noise(x0, noise, sigma_B)

    def predict_x0(
        self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition, guidance: Guidance | None = None
    ) -> Tensor:
        """The role's estimate of the clean latents, with classifier-free guidance when asked for."""
        velocity = self.guided_velocity(role, x, sigma_B, condition, guidance or Guidance())
        shown, sigma = self.held(x, sigma_B, condition)
        return schedule.x0_from_velocity(shown, velocity, sigma)

    @torch.no_grad()
    def predict_velocity_jvp(
        self, role: RoleHandle, x: Tensor, sigma_B: Tensor, dx: Tensor, dsigma_B: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor]:
        """The role's velocity, and its derivative along `(dx, dsigma_B)`: shape and dtype of `x`, without a graph.

        Forward-mode differentiation, one pass of about twice a forward's FLOPs and no stored activations; nothing is
        approximated. No fused attention kernel has a forward mode, so PyTorch's own attention runs as its plain
        mathematics here, which holds the [queries, keys] matrix of scores in memory. Anything but a PyTorch operation
        with a forward mode (sparse attention, compiled blocks, float8) raises NotImplementedError or RuntimeError: a
        method that needs derivatives refuses it beforehand. Between ranks, tangents travel as what they are tangents of
        does.
        """
        counting = self.work.forward_mode() if self.work else nullcontext()
        with counting, sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            inputs = forward_ad.make_dual(x, dx), forward_ad.make_dual(sigma_B, dsigma_B)
            velocity, tangent = forward_ad.unpack_dual(self.predict_velocity(role, *inputs, condition))
        assert tangent is not None, "the velocity depends on neither x nor sigma"
        return velocity, tangent

    def guided_velocity(
        self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition, guidance: Guidance
    ) -> Tensor:
        """Conditional and unconditional velocity from one doubled forward, combined; one plain forward at scale 1."""
        if guidance.is_identity:
            return self.predict_velocity(role, x, sigma_B, condition)
        negative = {**condition, **self.negative_condition(x.shape[0])}
        both = {name: torch.cat([value, negative[name]]) for name, value in condition.items()}
        velocity = self.predict_velocity(role, torch.cat([x, x]), torch.cat([sigma_B, sigma_B]), both)
        conditional, unconditional = velocity.chunk(2)
        return schedule.guide(conditional, unconditional, self.guidance_scale(role, sigma_B, guidance), guidance.form)

    def guidance_scale(self, role: RoleHandle, sigma_B: Tensor, guidance: Guidance) -> float | Tensor:
        """The scale to guide with, or one for each sample, broadcast over its dims; a family may know better."""
        return guidance.scale


@dataclass(frozen=True, kw_only=True)
class EncoderFolders:
    """Folders of a family's encoders."""

    vae: Path
    """Video encoder (VAE): its diffusers folder, or the pipeline folder that has it as vae/."""
    text_encoder: Path
    """Text encoder: its folder, or the pipeline folder that has it as text_encoder/."""
    tokenizer: Path | None = None
    """Tokenizer folder. Default: tokenizer/ beside the text encoder."""
    images: bool = False
    """Also encode the first frame of each clip as the picture that image-to-video models with channels for it take."""
    image_encoder: Path | None = None
    """With --images: pipeline folder with image_encoder/ and image_processor/ (CLIP), for models that attend to it."""


class FootageEncoder(ABC):
    """Encodes footage and captions into the rows of a data set."""

    @abstractmethod
    def check_size(self, num_frames: int, height: int, width: int) -> None:
        """Raises ValueError unless the encoder takes clips of this size in pixels."""

    @abstractmethod
    def encode_video(self, videos: Tensor) -> Tensor:
        """uint8 videos [B, frames, height, width, 3] to latents."""

    @abstractmethod
    def embed_prompt(self, prompt: str, max_tokens: int) -> Tensor:
        """Text embedding [tokens, width] of one prompt, cut to `max_tokens` with a warning."""

    @abstractmethod
    def encode_pictures(self, images: Tensor, num_frames: int) -> dict[str, Tensor]:
        """Further tensors by name that models take of uint8 pictures [B, height, width, 3] beside videos of
        `num_frames`; empty where pictures are not asked for."""


class ModelFamily(ABC):
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
        """The key that gives parts of the training samples, as the beginning of a sentence; None where nothing is
        given. Only methods with `uses_loss_mask` train such a run."""
        return None

    def check_layouts(self, degrees: Mapping[str, Degrees]) -> None:
        """Checks each role's degrees against its network, before anything is built. Raises ValueError."""
        return

    def token_grid(self) -> tuple[int, int, int] | None:
        """Tokens of a sample along (frames, height, width), for the planner; None where samples are no videos."""
        return None

    def video_size(self) -> tuple[int, int, int] | None:
        """(frames, height, width) of a sample in pixels; None where samples are no videos."""
        return None

    @property
    def needs_latents(self) -> bool:
        """True where training conditions are made of the data's latents, whatever the method needs."""
        return False

    def encoder_memory(self) -> tuple[float, float]:
        """For the planner: bytes of the encoders that stay on a rank, and most bytes that decoding one sample of a
        validation holds beside them, both in the compute type."""
        return 0.0, 0.0

    def extra_tensors(self) -> tuple[str, ...]:
        """Names of the tensors beside text that training conditions take from every row of the data."""
        return ()

    @abstractmethod
    def build_module(self, name: str, role: RoleConfig, mesh: RoleMesh | None, device: torch.device) -> nn.Module:
        """Builds, lays out and loads the network of one role. On `device("meta")` nothing is allocated or loaded."""

    def build_modules(
        self, name: str, role: RoleConfig, mesh: RoleMesh | None, device: torch.device
    ) -> dict[str, nn.Module]:
        """All networks of one role by name, made of `build_module`: `transformer`, and what stands beside it."""
        return {"transformer": self.build_module(name, role, mesh, device)}

    def spelled_out(self) -> Config:
        """The configuration with what the files that it names say of the family's own keys, for `config.toml` to
        keep. Raises ValueError."""
        return self.config

    @abstractmethod
    def architecture(self, module: nn.Module) -> dict[str, Any]:
        """Everything needed to build the module again, as JSON-able values; written beside checkpoints and exports."""

    @abstractmethod
    def restore_module(
        self, architecture: dict[str, Any], tensors: Iterable[tuple[str, Tensor]], device: torch.device
    ) -> nn.Module:
        """A whole, frozen module from what a checkpoint holds: its architecture and full tensors by name. Its
        parameters are of the dtype in which the run computes, training.dtype."""

    @staticmethod
    @abstractmethod
    def write_weights(
        tensors: Iterable[tuple[str, Tensor]], architecture: dict[str, Any], folder: Path, dtype: torch.dtype | None
    ) -> None:
        """Writes a module's weights as the family's other tools read them (for Wan, a diffusers folder)."""

    @staticmethod
    def pipeline_index(index: dict[str, Any], modules: Sequence[str], config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the `model_index.json` of an exported role with these modules, from its pipeline's `index` and the
        run's [pipeline_config]. Default: `index`. Raises ValueError where the two don't say enough."""
        return index

    @abstractmethod
    def latent_space(self, module: nn.Module) -> dict[str, Any]:
        """Properties of the latents a module works on. All roles of a run must agree on them."""

    def feature_width(self, module: nn.Module, depths: Sequence[int]) -> int:
        """Width of the features behind `depths` (see `Adapter.features`). Raises ValueError for depths that the
        network does not have, and where the family offers no features."""
        raise ValueError(f"recipe.family = {self.config.recipe.family!r} offers no features for a head to read")

    @classmethod
    def footage_encoder(cls, folders: EncoderFolders, device: torch.device) -> FootageEncoder:
        """The encoder of this family's data sets. Raises ValueError for folders that lack what it needs."""
        raise ValueError(f"{cls.__name__} encodes no footage; choose another --family")

    @abstractmethod
    def build_adapter(self, device: torch.device, layouts: Layouts) -> Adapter:
        """The run-time half."""


def model_family(name: str) -> type[ModelFamily]:
    """The family registered under `name`. Raises ValueError naming the known families and the nearest one."""
    return lookup(FAMILIES, name)
