"""Float8 in emulation: the numbers, the layers, the names, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from runs import REPOSITORY, TINY_WAN, tiny_argv
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from titan_distill.config.loading import load_config
from titan_distill.config.parsing import ConfigError
from titan_distill.config.sections import Float8Config
from titan_distill.models.wan.config import FLAVORS
from titan_distill.models.wan.parallelize import HIGH_PRECISION
from titan_distill.models.wan.state_dict import load_weights
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.parallelisms.float8 import apply_float8, check_hardware, describe, finish_float8
from titan_distill.parallelisms.fsdp import FsdpOptions, apply_fsdp
from titan_distill.train import main

CPU = torch.device("cpu")
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
E4M3, E5M2 = 2**-4, 2**-3
"""Largest relative error of rounding to 3 and to 2 bits of mantissa."""


def emulated(**values: Any) -> Float8Config:
    return Float8Config(**{"enabled": True, "emulate": True, "min_features": 16} | values)


def tiny(config: Float8Config, mesh: DeviceMesh | None = None) -> WanTransformer:
    """The small teacher, laid out in the order of parallelize.py."""
    with torch.device("meta"):
        model = WanTransformer(FLAVORS["tiny"])
    apply_float8(model, config, high_precision=HIGH_PRECISION, device=CPU)
    if mesh is not None:
        apply_fsdp(model, list(model.blocks), mesh, FsdpOptions(torch.float32))
    model.to_empty(device="cpu")
    load_weights(model, TINY_WAN / "transformer")
    finish_float8(model, config)
    return model


def run(model: WanTransformer) -> tuple[Tensor, Tensor]:
    """Velocity, and the gradient of all parameters as one vector."""
    generator = torch.Generator().manual_seed(0)
    latents, upstream = torch.randn(2, 1, 16, 2, 8, 8, generator=generator)
    text = torch.randn(1, 16, 64, generator=generator)
    model.zero_grad()
    velocity = model(latents, torch.tensor([700.0]), text)
    (velocity * upstream).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    return velocity.detach(), torch.cat([g.flatten() for g in whole])


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def reference() -> tuple[Tensor, Tensor]:
    return run(tiny(Float8Config()))


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
    dist.destroy_process_group()


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_layer_errs_by_the_rounding_of_its_operands(recipe: str) -> None:
    """Each product has two rounded operands with independent errors; sums of many terms err less than the worst one."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(128, 256))
    x, upstream = torch.randn(64, 128, requires_grad=True), torch.randn(64, 256)
    expected = layer(x)
    gradients = torch.autograd.grad((expected * upstream).sum(), (x, layer[0].weight))
    apply_float8(layer, emulated(recipe=recipe), high_precision=(), device=CPU)
    found = layer(x)
    assert E4M3 / 4 < relative(found, expected) < E4M3
    # Tensorwise rounds gradients to e5m2, which trades a bit of mantissa for range.
    bound = E5M2 if recipe == "tensorwise" else E4M3
    exact = {1} if recipe == "rowwise_with_gw_hp" else set()
    rounded = torch.autograd.grad((found * upstream).sum(), (x, layer[0].weight))
    for index, (value, target) in enumerate(zip(rounded, gradients, strict=True)):
        error = relative(value, target)
        assert error < 1e-6 if index in exact else bound / 4 < error < bound


@pytest.mark.parametrize("recipe", RECIPES)
def test_model_stays_close_to_fp32(recipe: str, reference: tuple[Tensor, Tensor]) -> None:
    """Residuals carry the exact part, so six blocks err in their output like one product. Gradients pass all blocks'
    products one after the other, and errors of many products add up in squares: two dozen times e4m3's typical 2.6 %
    with e5m2 on top stay below a quarter."""
    velocity, gradient = run(tiny(emulated(recipe=recipe)))
    assert 1e-3 < relative(velocity, reference[0]) < E4M3
    assert 1e-3 < relative(gradient, reference[1]) < 0.25


def test_only_large_linear_layers_of_blocks_are_swapped() -> None:
    plain, model = tiny(Float8Config()), tiny(emulated())
    swapped = {name for name, layer in model.named_modules() if type(layer).__name__ == "Float8Linear"}
    assert len(swapped) == 60 and all(name.startswith("blocks.") for name in swapped)
    for name, layer in plain.named_modules():
        assert name in swapped or type(layer) is type(model.get_submodule(name))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert describe(emulated(), model) == "float8 tensorwise by torchao in 60 of 66 linear layers, emulated"


def test_odd_sizes_stay_and_no_layer_at_all_is_an_error() -> None:
    layers = nn.ModuleDict({"odd": nn.Linear(1032, 1024), "even": nn.Linear(1024, 1024), "kept": nn.Linear(1024, 1024)})
    config = Float8Config(enabled=True, emulate=True)
    apply_float8(layers, config, high_precision=("kept",), device=CPU)
    assert [name for name, layer in layers.items() if type(layer) is not nn.Linear] == ["even"]
    with pytest.raises(ValueError, match=r"min_features = 1024 that 16 divides; lower it"):
        apply_float8(nn.Sequential(nn.Linear(1024, 512)), config, high_precision=(), device=CPU)


@pytest.mark.parametrize("all_gather", [False, True])
def test_fsdp_computes_the_same_and_resumes_from_plain_tensors(
    mesh: DeviceMesh, tmp_path: Path, all_gather: bool
) -> None:
    config = emulated(all_gather=all_gather)
    model = tiny(config, mesh)
    velocity, gradient = run(model)
    alone = run(tiny(emulated()))
    assert relative(velocity, alone[0]) < 1e-6 and relative(gradient, alone[1]) < 1e-6

    torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True).step()
    state = get_model_state_dict(model)
    assert list(state) == list(tiny(Float8Config()).state_dict())
    assert all(type(value.to_local()) is Tensor for value in state.values())
    dcp.save({"model": state}, checkpoint_id=tmp_path)
    expected, _ = run(model)
    assert relative(expected, velocity) > 0.1

    restored = tiny(config, mesh)
    state = {"model": get_model_state_dict(restored)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(restored, state["model"])
    assert torch.equal(run(restored)[0], expected)


def test_all_gather_without_fsdp_is_refused() -> None:
    with pytest.raises(ValueError, match="all_gather = true has no effect in a run without FSDP"):
        tiny(emulated(all_gather=True))


def test_a_dry_run_asks_for_no_hardware() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1024, 1024))
    apply_float8(model, Float8Config(enabled=True), high_precision=(), device=torch.device("meta"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_start_up_refuses_what_cannot_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(tiny_argv("finetune", tmp_path, "--float8.enabled", "true", "--float8.min_features", "16")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: float8.enabled = true needs a GPU of compute capability 8.9 or later")
    assert "this machine has no GPU; set float8.emulate to true" in error and error.count("\n") == 1


def test_transformer_engine_is_refused_where_it_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the empty meta-package, whose import raises RuntimeError, and with nothing at all."""
    config = Float8Config(enabled=True, backend="transformer_engine")
    for source in (None, 'raise RuntimeError("no core package")'):
        if source is not None:
            (tmp_path / "transformer_engine").mkdir()
            (tmp_path / "transformer_engine" / "__init__.py").write_text(source)
            monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ValueError, match=r"transformer_engine', but that library cannot be imported .*pip install"):
            check_hardware(config, CPU)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"recipe": "rowwise"}, 'recipe = "rowwise" has no effect with enabled = false'),
        ({"enabled": True, "recipe": "rowwise", "all_gather": True}, "all_gather = true needs one scale per tensor"),
        (
            {"enabled": True, "backend": "transformer_engine", "emulate": True},
            'emulate = true has no effect with backend = "transformer_engine"',
        ),
        ({"enabled": True, "min_features": 8}, "min_features = 8 is out of range"),
    ],
)
def test_contradictions_within_the_section(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Float8Config(**values)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("--float8.roles", '["teacher"]'), "float8.roles names 'teacher'; the roles of this run are student"),
        (
            ("--float8.backend", "transformer_engine", "--compile.enabled", "true"),
            "transformer_engine' does not go with compile.enabled = true",
        ),
    ],
)
def test_contradictions_between_sections(tmp_path: Path, overrides: tuple[str, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_config(tiny_argv("finetune", tmp_path, "--float8.enabled", "true", *overrides))


def test_roles_choose() -> None:
    assert emulated().for_role("teacher").enabled
    only_student = emulated(roles=("student",))
    assert only_student.for_role("student").enabled and not only_student.for_role("teacher").enabled
