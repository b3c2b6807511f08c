"""A model family of a few lines: Gaussian "videos" whose teacher is known in closed form.

It registers itself as `recipe.family = "toy"` when `job.imports` names this module, and runs every method: the
proof that methods know no family. A sample is a vector of independent numbers from N(mean, variance); the caption's law
has mean `CONDITIONAL_MEAN`, the negative prompt's `UNCONDITIONAL_MEAN`. Equal variances make classifier-free
guidance exact: at scale w the guided law is N(u + w (c - u), variance).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from titan_distill.data.loader import Batch
from titan_distill.data.parquet import LatentRow, write_rows
from titan_distill.models.base import Adapter, Condition, ModelFamily
from titan_distill.models.streaming import SegmentStream
from titan_distill.parallelisms.fsdp import FsdpOptions, apply_fsdp
from titan_distill.parallelisms.mesh import Layouts
from titan_distill.registry import register_model
from titan_distill.roles import RoleHandle

CONDITIONAL_MEAN, UNCONDITIONAL_MEAN, VARIANCE = 1.0, -0.5, 0.49
CORRELATION = 0.8
"""Correlation of a value with the same value of the segment before, in the flavors made of segments."""


class AnalyticTeacher(nn.Module):
    """The exact velocity field of the two Gaussian laws."""

    def __init__(self) -> None:
        super().__init__()
        self.variance = nn.Parameter(torch.tensor([VARIANCE]))

    def forward(self, x: Tensor, sigma_B1: Tensor, label_B1: Tensor) -> Tensor:
        mean = torch.lerp(torch.tensor(UNCONDITIONAL_MEAN), torch.tensor(CONDITIONAL_MEAN), label_B1)
        alpha = 1 - sigma_B1
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma_B1**2)
        return (x - (mean + gain * (x - alpha * mean))) / sigma_B1


class AffineStudent(nn.Module):
    """x0 = scale x + shift, with two numbers for each of the few-step levels it is called at; starts as x0 = x."""

    def __init__(self, levels: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)) -> None:
        super().__init__()
        self.levels = levels
        self.affine = nn.Parameter(torch.tensor([[1.0, 0.0]] * len(levels)))

    def forward(self, x: Tensor, sigma_B1: Tensor, label_B1: Tensor) -> Tensor:
        index_B = (sigma_B1 - sigma_B1.new_tensor(self.levels)).abs().argmin(1)
        scale, shift = self.affine[index_B].unsqueeze(-1).unbind(1)
        return (x - (scale * x + shift)) / sigma_B1


class MlpVelocity(nn.Module):
    """A small network, the same for every number of a sample."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 1)])

    def forward(self, x: Tensor, sigma_B1: Tensor, label_B1: Tensor) -> Tensor:
        hidden = torch.stack([x, sigma_B1.expand_as(x), label_B1.expand_as(x)], -1)
        for block in self.blocks[:-1]:
            hidden = torch.nn.functional.silu(block(hidden))
        return self.blocks[-1](hidden).squeeze(-1)


class ChainTeacher(nn.Module):
    """The exact velocity field of chains of segments: x_j = m + ρ (x_{j-1} - m) + noise, all of variance VARIANCE."""

    def __init__(self, num_segments: int = 4) -> None:
        super().__init__()
        index = torch.arange(num_segments)
        covariance = VARIANCE * CORRELATION ** (index[:, None] - index).abs()
        self.mean = nn.Parameter(torch.full((num_segments,), CONDITIONAL_MEAN))
        self.factor = nn.Parameter(torch.linalg.cholesky(covariance))

    def forward(self, x: Tensor, sigma_B1: Tensor, label_B1: Tensor) -> Tensor:
        num_segments = len(self.mean)
        factor_SS, x_BSn = self.factor.tril(), x.unflatten(1, (num_segments, -1))
        alpha_B11, sigma_B11 = 1 - sigma_B1[..., None], sigma_B1[..., None]
        covariance = factor_SS @ factor_SS.T
        noisy_BSS = alpha_B11**2 * covariance + sigma_B11**2 * torch.eye(num_segments)
        mean_S1 = self.mean[:, None]
        away = torch.linalg.solve(noisy_BSS, x_BSn - alpha_B11 * mean_S1)
        x0_BSn = mean_S1 + alpha_B11 * covariance @ away
        return ((x_BSn - x0_BSn) / sigma_B11).flatten(1)


class ChainCritic(ChainTeacher):
    """The same with a law to be learned; starts as independent segments."""

    def __init__(self, num_segments: int = 4) -> None:
        super().__init__(num_segments)
        self.factor.data.copy_(torch.eye(num_segments))
        self.mean.data.zero_()


class ChainStudent(nn.Module):
    """A segment from the one before it: x0 = scale x + gain context + shift, other numbers for a first segment."""

    def __init__(self, levels: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)) -> None:
        super().__init__()
        self.levels = levels
        self.affine = nn.Parameter(torch.tensor([[[1.0, 0.0, 0.0]] * 2] * len(levels)))

    def forward(self, x: Tensor, sigma_B1: Tensor, context: Tensor | None) -> Tensor:
        index_B = (sigma_B1 - sigma_B1.new_tensor(self.levels)).abs().argmin(1)
        scale, gain, shift = self.affine[index_B, int(context is not None)].unsqueeze(-1).unbind(1)
        x0 = scale * x + shift if context is None else scale * x + gain * context + shift
        return (x - x0) / sigma_B1


class ToyStream(SegmentStream):
    """The context is the segment before, as it was written."""

    def __init__(self, role: RoleHandle) -> None:
        self.role, self.context = role, None

    def predict_velocity(self, x: Tensor, sigma_B: Tensor) -> Tensor:
        return self.role.transformer(x, sigma_B[:, None].to(x.dtype), self.context)

    def _write(self, x: Tensor, sigma_B: Tensor) -> None:
        self.context = x


FLAVORS: dict[str, type[nn.Module]] = {
    "analytic": AnalyticTeacher,
    "affine": AffineStudent,
    "mlp": MlpVelocity,
    "chain": ChainTeacher,
    "chain_critic": ChainCritic,
    "chain_student": ChainStudent,
}


@dataclass(frozen=True)
class ToyPipelineConfig:
    flow_shift: float = 1.0
    """Shift of the noise schedule."""
    num_values: int = 64
    """Independent numbers in a sample."""
    num_segments: int = 4
    """Segments of a causal student's samples."""


class ToyAdapter(Adapter):
    def __init__(self, config: ToyPipelineConfig) -> None:
        self.flow_shift, self.latent_shape = config.flow_shift, (config.num_values,)
        self.segment_length = config.num_values // config.num_segments

    def prepare_batch(self, batch: Batch) -> Batch:
        return batch if batch.latents is None else replace(batch, latents=batch.latents.flatten(1))

    def text_condition(self, batch: Batch) -> Condition:
        return {"label": batch.text_embeddings[:, 0, :1]}

    def negative_condition(self, batch_size: int) -> Condition:
        return {"label": torch.zeros(batch_size, 1)}

    def encode_prompts(self, prompts: list[str]) -> Condition:
        return {"label": torch.ones(len(prompts), 1)}

    def predict_velocity(self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        if not isinstance(role.transformer, ChainStudent):
            return role.transformer(x, sigma_B[:, None].to(x.dtype), condition["label"])
        segments, sigmas = (t.split(self.segment_length, 1) for t in (x, sigma_B.to(x.dtype).expand_as(x)))
        contexts = (None, *segments[:-1])
        parts = zip(segments, sigmas, contexts, strict=True)
        return torch.cat([role.transformer(x, sigma[:, :1], context) for x, sigma, context in parts], 1)

    def segment_lengths(self, role: RoleHandle, length: int | None = None) -> tuple[int, ...] | None:
        if not isinstance(role.transformer, ChainStudent):
            return None
        return (self.segment_length,) * ((length or self.latent_shape[0]) // self.segment_length)

    def open_stream(self, role: RoleHandle, condition: Condition) -> SegmentStream:
        return ToyStream(role)

    def features(self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition, depths: Any) -> list[Tensor]:
        """By a whole forward, without which FSDP2 does not gather the network's weights."""
        found: dict[int, Tensor] = {}
        hooks = [
            role.transformer.blocks[depth].register_forward_hook(
                lambda block, inputs, output, depth=depth: found.update({depth: torch.nn.functional.silu(output)})
            )
            for depth in depths
        ]
        self.predict_velocity(role, x, sigma_B, condition)
        for hook in hooks:
            hook.remove()
        return [found[depth] for depth in depths]

    def mean_over_positions(self, role: RoleHandle, x: Tensor, values_BL: Tensor) -> Tensor:
        return values_BL.double().mean(1)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return latents

    def encode_video(self, videos: Tensor) -> Tensor:
        return videos


@register_model("toy")
class ToyFamily(ModelFamily):
    pipeline_config_class = ToyPipelineConfig

    def build_module(self, name: str, role: Any, mesh: Any, device: torch.device) -> nn.Module:
        torch.manual_seed(self.config.job.seed)
        with device:
            module = FLAVORS[role.flavor]().requires_grad_(role.trainable)
        if mesh is not None:
            apply_fsdp(module, getattr(module, "blocks", ()), mesh.fsdp, FsdpOptions(torch.float32))
        return module

    def architecture(self, module: nn.Module) -> dict[str, Any]:
        return {"flavor": next(name for name, cls in FLAVORS.items() if type(module).__name__.endswith(cls.__name__))}

    def restore_module(self, architecture: dict[str, Any], tensors: Any, device: torch.device) -> nn.Module:
        module = FLAVORS[architecture["flavor"]]().to(device)
        module.load_state_dict(dict(tensors))
        return module.requires_grad_(False)

    @staticmethod
    def write_weights(tensors: Any, architecture: dict[str, Any], folder: Path, dtype: torch.dtype | None) -> None:
        folder.mkdir()
        save_file(dict(tensors), folder / "model.safetensors")

    def latent_space(self, module: nn.Module) -> dict[str, Any]:
        return {"values": self.config.pipeline_config.num_values}

    def feature_width(self, module: nn.Module, depths: Any) -> int:
        return 64

    def build_adapter(self, device: torch.device, layouts: Layouts) -> Adapter:
        return ToyAdapter(self.config.pipeline_config)


def write_data(path: Path, num_rows: int = 64, num_values: int = 64, with_latents: bool = True, seed: int = 0) -> Path:
    """Rows of the conditional law."""
    generator = torch.Generator().manual_seed(seed)

    def latents() -> Tensor:
        return CONDITIONAL_MEAN + VARIANCE**0.5 * torch.randn(num_values, 1, 1, 1, generator=generator)

    rows = (
        LatentRow(
            id=str(i),
            caption="a sample",
            text_embedding=torch.ones(1, 1),
            vae_latent=latents() if with_latents else None,
        )
        for i in range(num_rows)
    )
    write_rows(path, rows)
    return path
