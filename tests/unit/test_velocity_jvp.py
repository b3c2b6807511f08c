"""The velocity's derivative in (x, σ): against finite differences in fp64, on the toy family and on the small real Wan.

The timestep is fp32 in training; here it is left in fp64, so that differences of it mean something.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import toy_family
from runs import REPOSITORY
from torch import Tensor
from wan_config import wan_config

from titan_distill.config.sections import ActivationCheckpointConfig
from titan_distill.diffusion import schedule
from titan_distill.models.base import Adapter, Condition
from titan_distill.models.wan.adapter import WanAdapter
from titan_distill.models.wan.encoders import Encoders
from titan_distill.models.wan.state_dict import load_weights, read_config
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.parallelisms.activation_checkpoint import apply_activation_checkpointing
from titan_distill.parallelisms.mesh import Layouts
from titan_distill.roles import RoleHandle

FP64, CPU = torch.float64, torch.device("cpu")
WEIGHTS = REPOSITORY / "tests" / "assets" / "tiny_wan" / "transformer"
SIGMA_B = torch.tensor([0.9, 0.35], dtype=FP64)

Case = tuple[Adapter, RoleHandle, Condition]


def toy() -> Case:
    torch.manual_seed(0)
    adapter = toy_family.ToyAdapter(toy_family.ToyPipelineConfig(num_values=6))
    role = RoleHandle("student", {"transformer": toy_family.MlpVelocity().double()}, trainable=True)
    return adapter, role, {"label": torch.ones(2, 1, dtype=FP64)}


def wan(dtype: torch.dtype = FP64, checkpointing: ActivationCheckpointConfig | None = None) -> Case:
    config = read_config(WEIGHTS)
    model = WanTransformer(config)
    load_weights(model, WEIGHTS)
    checkpointing = checkpointing or ActivationCheckpointConfig()
    apply_activation_checkpointing(model.blocks, checkpointing)
    run = wan_config(activation_checkpoint=checkpointing)
    adapter = WanAdapter(run, (config.in_channels, 2, 6, 6), Encoders(), CPU, Layouts.alone(CPU))
    text = torch.randn(2, 5, config.text_dim, dtype=FP64, generator=torch.Generator().manual_seed(3)).to(dtype)
    return adapter, RoleHandle("student", {"transformer": model.to(dtype)}, trainable=True), {"text": text}


def direction(adapter: Adapter, dtype: torch.dtype = FP64) -> tuple[Tensor, Tensor, Tensor]:
    """A point, and a direction in x and in σ that differs between samples."""
    generator = torch.Generator().manual_seed(1)
    x, dx = (torch.randn(2, *adapter.latent_shape, dtype=dtype, generator=generator) for _ in range(2))
    return x, dx, torch.tensor([1.0, -0.4], dtype=FP64)


def difference(case: Case, x: Tensor, dx: Tensor, dsigma_B: Tensor, h: float) -> Tensor:
    adapter, role, condition = case
    with torch.no_grad():
        ahead, behind = (
            adapter.predict_velocity(role, x + step * dx, SIGMA_B + step * dsigma_B, condition) for step in (h, -h)
        )
    return (ahead - behind) / (2 * h)


def relative(error: Tensor, to: Tensor) -> float:
    return (error.norm() / to.norm()).item()


@pytest.fixture
def exact_timestep() -> object:
    with patch.object(schedule, "timestep", lambda sigma: sigma.double() * 1000):
        yield


@pytest.mark.parametrize(("make", "h"), [(toy, 1e-5), (wan, 1e-6)])
def test_jvp_equals_finite_differences(make: Callable[[], Case], h: float, exact_timestep: object) -> None:
    adapter, role, condition = case = make()
    x, dx, dsigma_B = direction(adapter)
    velocity, tangent = adapter.predict_velocity_jvp(role, x, SIGMA_B, dx, dsigma_B, condition)
    expected = difference(case, x, dx, dsigma_B, h)
    assert relative(tangent - expected, expected) < 1e-6
    with torch.no_grad():
        assert relative(velocity - adapter.predict_velocity(role, x, SIGMA_B, condition), velocity) < 1e-12
    # Both parts of the direction count, and a difference that lacks one is told apart.
    for part in (difference(case, x, dx, 0 * dsigma_B, h), difference(case, x, 0 * dx, dsigma_B, h)):
        assert relative(tangent - part, expected) > 1e-2


def test_jvp_of_one_sample_ignores_the_others(exact_timestep: object) -> None:
    adapter, role, condition = wan()
    x, dx, dsigma_B = direction(adapter)
    _, both = adapter.predict_velocity_jvp(role, x, SIGMA_B, dx, dsigma_B, condition)
    second = {name: value[1:] for name, value in condition.items()}
    _, alone = adapter.predict_velocity_jvp(role, x[1:], SIGMA_B[1:], dx[1:], dsigma_B[1:], second)
    assert relative(both[1:] - alone, alone) < 1e-12


def test_training_precision_is_close_to_fp64() -> None:
    """fp32 weights and latents and the fp32 timestep of training: what sCM really sees."""
    adapter, role, condition = wan()
    x, dx, dsigma_B = direction(adapter)
    with patch.object(schedule, "timestep", lambda sigma: sigma.double() * 1000):
        _, exact = adapter.predict_velocity_jvp(role, x, SIGMA_B, dx, dsigma_B, condition)
    adapter, role, condition = wan(torch.float32)
    velocity, tangent = adapter.predict_velocity_jvp(role, x.float(), SIGMA_B, dx.float(), dsigma_B, condition)
    assert velocity.dtype == tangent.dtype == torch.float32
    assert not velocity.requires_grad and not tangent.requires_grad
    assert relative(tangent.double() - exact, exact) < 1e-3


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointed_blocks_have_a_jvp(mode: str) -> None:
    """They keep nothing without a graph, so there is nothing to recompute in forward mode."""
    plain, checkpointed = wan(torch.float32), wan(torch.float32, ActivationCheckpointConfig(mode=mode))
    x, dx, dsigma_B = direction(plain[0], torch.float32)
    one, other = (
        adapter.predict_velocity_jvp(role, x, SIGMA_B, dx, dsigma_B, condition)[1]
        for adapter, role, condition in (plain, checkpointed)
    )
    assert torch.equal(one, other)
