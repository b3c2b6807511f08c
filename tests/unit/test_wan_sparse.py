"""Sparse attention inside the Wan transformer: what a dense checkpoint becomes, what gates do, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from runs import TINY_WAN
from safetensors.torch import load_file, save_file
from titan_kernels import reference, tile_layout
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from titan_distill.attention.causal import Segmentation
from titan_distill.attention.dense import AttentionCall
from titan_distill.attention.sparse import SparseAttention
from titan_distill.config.sections import SparseAttentionConfig
from titan_distill.models.wan.config import FLAVORS, WanConfig
from titan_distill.models.wan.features import block_outputs
from titan_distill.models.wan.state_dict import WEIGHTS_NAME, load_weights, read_config, save_folder
from titan_distill.models.wan.transformer import WanTransformer

DENSE = replace(FLAVORS["tiny"], num_layers=2)
SPARSE = replace(DENSE, sparse_attention=True)
FOLDER = TINY_WAN / "transformer"


def core(sparsity: float, crossover: float = 0.0, tiles_per_list: int = 1) -> SparseAttention:
    return SparseAttention(SparseAttentionConfig(sparsity=sparsity, crossover=crossover, tiles_per_list=tiles_per_list))


def model_of(config: WanConfig, sparse: SparseAttention | None, gate: float = 0.0) -> WanTransformer:
    """A small model with open modulation and head, and gates of the given size."""
    model = WanTransformer(config, sparse)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "to_gate_compress" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name, parameter in sorted(model.named_parameters()):
            if "to_gate_compress" in name:
                parameter.normal_(0, gate, generator=generator) if gate else parameter.zero_()
    return model


def inputs(grid: tuple[int, int, int] = (5, 6, 7)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, grid[0], 2 * grid[1], 2 * grid[2], generator=generator)
    return latents, torch.tensor([900.0, 400.0]), torch.randn(2, 7, 64, generator=generator)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def dense_velocity() -> Tensor:
    model = WanTransformer(read_config(FOLDER))
    load_weights(model, FOLDER)
    with torch.no_grad():
        return model(*inputs())


@pytest.mark.parametrize(("sparsity", "crossover", "bitwise"), [(0.0, 0.0, False), (0.0, 0.5, True), (0.4, 0.5, True)])
def test_a_dense_checkpoint_gives_its_own_velocity(
    dense_velocity: Tensor, sparsity: float, crossover: float, bitwise: bool
) -> None:
    model = WanTransformer(replace(read_config(FOLDER), sparse_attention=True), core(sparsity, crossover))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)  # what `to_empty` may leave
    load_weights(model, FOLDER)
    with torch.no_grad():
        velocity = model(*inputs())
    assert relative(velocity, dense_velocity) <= (0 if bitwise else 1e-6)


def test_sparsity_and_gates_change_the_velocity() -> None:
    dense = model_of(DENSE, None)(*inputs())
    for sparsity, gate in ((0.5, 0.0), (0.0, 0.1)):
        assert relative(model_of(SPARSE, core(sparsity), gate)(*inputs()), dense) > 1e-3


@pytest.mark.parametrize(("tiles_per_list", "tile"), [(1, (4, 4, 4)), (2, (4, 4, 4)), (1, (3, 5, 4)), (1, (2, 8, 8))])
def test_the_first_block_attends_as_the_twin_says(tiles_per_list: int, tile: tuple[int, int, int]) -> None:
    model = model_of(replace(SPARSE, vsa_tile=tile), core(0.5, tiles_per_list=tiles_per_list), gate=0.1)
    attention, seen = model.blocks[0].attn1, {}
    attend = attention.attention

    def spy(call: AttentionCall) -> Tensor:
        seen.update(q=call.q_BLHD, k=call.k_BSHD, v=call.v_BSHD, gate=call.gate_BLHD, num_selected=call.num_selected)
        seen["out"] = attend(call)
        return seen["out"]

    attention.attention = spy
    attention.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    model(*inputs())
    layout = tile_layout((5, 6, 7), tile)
    assert seen["num_selected"] == math.ceil(layout.num_tiles / 2) > 1
    gate = model.blocks[0].to_gate_compress(seen["x"]).unflatten(-1, (4, 32))
    torch.testing.assert_close(seen["gate"], gate)
    expected = reference.video_sparse_attention(seen["q"], seen["k"], seen["v"], layout, seen["num_selected"], gate)
    difference = relative(seen["out"], expected)
    assert difference < 1e-6 if tiles_per_list == 1 else 1e-3 < difference < 1


def test_the_schedule_reaches_all_blocks() -> None:
    config = SparseAttentionConfig(sparsity=0.75, schedule_rate=0.25, crossover=0.5)
    model = model_of(SPARSE, SparseAttention(config))
    told = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: told.append(args[-1].num_selected))
    assert model.sparse_attention is model.attention_core
    for step in (0, 1, 2, 3, 9):
        model.sparse_attention.start_step(step)
        model(*inputs())
    assert told == [None] * 4 + [4] * 2 + [2] * 4


def test_a_new_model_has_closed_gates_and_trains_them() -> None:
    model = WanTransformer(SPARSE, core(0.5))
    gates = {name: parameter for name, parameter in model.named_parameters() if "gate" in name}
    assert sorted(gates) == [f"blocks.{i}.to_gate_compress.{leaf}" for i in range(2) for leaf in ("bias", "weight")]
    assert not any(gate.any() for gate in gates.values())
    model = model_of(SPARSE, core(0.5))
    model(*inputs()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_runs_under_fake_tensors_and_on_meta() -> None:
    with torch.device("meta"):
        model = WanTransformer(SPARSE, core(0.5))
    assert model(*(x.to("meta") for x in inputs())).shape == inputs()[0].shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert WanTransformer(SPARSE, core(0.5))(*inputs()).shape == inputs()[0].shape


def test_config_and_core_must_agree() -> None:
    for config, sparse in ((SPARSE, None), (DENSE, core(0.5))):
        with pytest.raises(
            ValueError,
            match="contradict each other; give a SparseAttention to sparse models",
        ):
            WanTransformer(config, sparse)


def test_only_sparse_models_say_so_in_their_config() -> None:
    assert "sparse_attention" not in DENSE.to_diffusers()
    assert "vsa_tile" not in DENSE.to_diffusers()
    short = replace(SPARSE, vsa_tile=(3, 5, 4))
    for config in (SPARSE, short):
        assert WanConfig.from_diffusers(config.to_diffusers()) == config
    assert short.to_diffusers()["vsa_tile"] == [3, 5, 4]
    for tile in (5, [3, 5], [3, 5, 0], [3, 5, "4"]):
        with pytest.raises(ValueError, match="vsa_tile"):
            WanConfig.from_diffusers(short.to_diffusers() | {"vsa_tile": tile})


def test_features_follow_the_tile() -> None:
    """A mean over all tokens does not depend on their order, each rank's share of them does."""
    model = model_of(replace(SPARSE, vsa_tile=(3, 5, 4)), core(0.0, crossover=0.5))
    x, timestep, text = inputs()
    (found,) = block_outputs(model, [0], x, lambda: model(x, timestep, text))
    (expected,) = block_outputs(
        other := model_of(SPARSE, core(0.0, crossover=0.5)), [0], x, lambda: other(x, timestep, text)
    )
    layouts = [tile_layout((5, 6, 7), tile) for tile in ((3, 5, 4), (4, 4, 4))]
    raster = [y[:, layout.inverse] for y, layout in zip((found, expected), layouts, strict=True)]
    torch.testing.assert_close(*raster, rtol=1e-5, atol=1e-5)


def test_a_causal_model_keeps_tiles_of_one_frame() -> None:
    causal = replace(DENSE, causal_attention=True, vsa_tile=(3, 5, 4))
    assert WanTransformer(causal, None, Segmentation(1)).tile == (1, 4, 4)


@pytest.fixture
def sparse_folder(tmp_path: Path) -> Path:
    save_folder(model_of(SPARSE, core(0.5), gate=0.1).state_dict(), SPARSE, tmp_path)
    return tmp_path


@pytest.mark.parametrize("says_so", [True, False])
def test_a_sparse_checkpoint_keeps_its_gates(sparse_folder: Path, says_so: bool) -> None:
    """Other people's files have the gates and a config of diffusers' keys only."""
    expected = model_of(SPARSE, core(0.5), gate=0.1)
    if not says_so:
        save_folder(expected.state_dict(), DENSE, sparse_folder)
    assert read_config(sparse_folder).sparse_attention == says_so
    model = WanTransformer(SPARSE, core(0.5))
    load_weights(model, sparse_folder)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())
    with pytest.raises(ValueError, match="set the role's attention to 'sparse' or choose other weights"):
        load_weights(WanTransformer(DENSE), sparse_folder)


def test_some_gates_missing_is_an_error(sparse_folder: Path) -> None:
    file = sparse_folder / WEIGHTS_NAME
    tensors = load_file(file)
    gates = [name for name in tensors if "gate" in name]
    for missing in (gates[:1], gates):
        save_file({name: tensor for name, tensor in tensors.items() if name not in missing}, file)
        with pytest.raises(ValueError, match=rf"lacks {len(missing)} of the \d+ tensors of its network: {gates[0]}"):
            load_weights(WanTransformer(SPARSE, core(0.5)), sparse_folder)


def test_other_keys_missing_is_an_error_for_a_sparse_model_too(tmp_path: Path) -> None:
    tensors = model_of(DENSE, None).state_dict()
    del tensors["proj_out.bias"]
    save_folder(tensors, DENSE, tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 of the \d+ tensors of its network: proj_out\.bias"):
        load_weights(WanTransformer(SPARSE, core(0.5)), tmp_path)


def test_diffusers_loads_all_but_the_gates(sparse_folder: Path) -> None:
    oracle = WanTransformer3DModel.from_pretrained(sparse_folder)
    dense = WanTransformer(DENSE)
    dense.load_state_dict(oracle.state_dict())
    torch.testing.assert_close(oracle(*inputs()).sample, model_of(DENSE, None)(*inputs()), atol=1e-5, rtol=1e-4)
