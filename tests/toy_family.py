"""A model family of a few lines: Gaussian "videos" whose teacher is known in closed form.

It registers itself as ``recipe.family = "toy"`` when ``job.imports`` names this module, and runs every method: the
proof that methods know no family. A sample is a vector of independent numbers from N(mean, variance); the caption's law
has mean ``CONDITIONAL_MEAN``, the negative prompt's ``UNCONDITIONAL_MEAN``. Equal variances make classifier-free
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
from titan_distill.dispatch import register_model
from titan_distill.methods.base import ValidationRequest
from titan_distill.models.base import Adapter, Condition, ModelFamily
from titan_distill.parallelisms.fsdp import FsdpOptions, apply_fsdp
from titan_distill.parallelisms.mesh import Layouts
from titan_distill.roles import RoleHandle, RoleManager
from titan_distill.validation.base import Validator

CONDITIONAL_MEAN, UNCONDITIONAL_MEAN, VARIANCE = 1.0, -0.5, 0.49


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

    def hidden(self, x: Tensor, sigma_B1: Tensor, label_B1: Tensor) -> list[Tensor]:
        """[B, values, width] behind each block but the last."""
        hidden = torch.stack([x, sigma_B1.expand_as(x), label_B1.expand_as(x)], -1)
        return [hidden := torch.nn.functional.silu(block(hidden)) for block in self.blocks[:-1]]

    def forward(self, x: Tensor, sigma_B1: Tensor, label_B1: Tensor) -> Tensor:
        return self.blocks[-1](self.hidden(x, sigma_B1, label_B1)[-1]).squeeze(-1)


FLAVORS: dict[str, type[nn.Module]] = {"analytic": AnalyticTeacher, "affine": AffineStudent, "mlp": MlpVelocity}


@dataclass(frozen=True)
class ToyPipelineConfig:
    flow_shift: float = 1.0
    """Shift of the noise schedule."""
    num_values: int = 64
    """Independent numbers in a sample."""


class ToyAdapter(Adapter):
    def __init__(self, config: ToyPipelineConfig) -> None:
        self.flow_shift, self.latent_shape = config.flow_shift, (config.num_values,)

    def prepare_batch(self, batch: Batch) -> Batch:
        return batch if batch.latents is None else replace(batch, latents=batch.latents.flatten(1))

    def text_condition(self, batch: Batch) -> Condition:
        return {"label": batch.text_embeddings[:, 0, :1]}

    def negative_condition(self, batch_size: int) -> Condition:
        return {"label": torch.zeros(batch_size, 1)}

    def encode_prompts(self, prompts: list[str]) -> Condition:
        return {"label": torch.ones(len(prompts), 1)}

    def predict_velocity(self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        return role.transformer(x, sigma_B[:, None].to(x.dtype), condition["label"])

    def features(self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition, depths: Any) -> list[Tensor]:
        hidden = role.transformer.hidden(x, sigma_B[:, None].to(x.dtype), condition["label"])
        return [hidden[depth] for depth in depths]

    def mean_over_positions(self, role: RoleHandle, x: Tensor, values_BL: Tensor) -> Tensor:
        return values_BL.double().mean(1)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return latents

    def encode_video(self, videos: Tensor) -> Tensor:
        return videos


class ToyValidator(Validator):
    def validate(self, step: int, request: ValidationRequest, roles: RoleManager) -> dict[str, float]:
        return {sample.label: float(step) for sample in request.samples}


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
        return {"flavor": next(name for name, cls in FLAVORS.items() if isinstance(module, cls))}

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

    def build_validator(self, adapter: Adapter, folder: Path, layouts: Layouts) -> Validator:
        return ToyValidator()


def write_data(path: Path, num_rows: int = 64, num_values: int = 64, with_latents: bool = True) -> Path:
    """Rows of the conditional law."""
    generator = torch.Generator().manual_seed(0)

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
