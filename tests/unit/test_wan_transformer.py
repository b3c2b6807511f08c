"""The Wan transformer against diffusers', and what it can't show: tile order, precision, timestep forms, init."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from titan_kernels import tile_layout
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from titan_distill.attention.sharded import ShardedAttention
from titan_distill.models.wan.config import FLAVORS, WanConfig
from titan_distill.models.wan.embeddings import timestep_features
from titan_distill.models.wan.layers import add_gated
from titan_distill.models.wan.transformer import WanTransformer

SMALL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 96, "text_dim": 20}
SMALL_IMAGE = {"image_dim": 24, "added_kv_proj_dim": 64}
# Each flavor's structure at a small size; "FLF2V" adds learned positions for a first and a last frame.
STRUCTURES = {
    "tiny": replace(FLAVORS["tiny"], num_layers=2),
    "1.3B": replace(FLAVORS["1.3B"], **SMALL),
    "5B": replace(FLAVORS["5B"], **SMALL),
    "14B": replace(FLAVORS["14B"], **SMALL),
    "14B-I2V": replace(FLAVORS["14B-I2V"], **SMALL, **SMALL_IMAGE),
    "FLF2V": replace(FLAVORS["14B-I2V"], **SMALL, **SMALL_IMAGE, pos_embed_seq_len=18),
    "no cross norm": replace(FLAVORS["1.3B"], **SMALL, cross_attn_norm=False),
}
BATCH = 2
ODD_GRID = (3, 5, 7)


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Give every parameter values that matter: no zero biases, gates or tables that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            small = parameter.ndim < 2 or "table" in name or "pos_embed" in name
            parameter.normal_(0, 0.3 if small else parameter[0].numel() ** -0.5, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)


def random_model(structure: str) -> WanTransformer:
    model = WanTransformer(STRUCTURES[structure])
    randomise(model)
    return model


def random_inputs(config: WanConfig, grid: tuple[int, int, int] = ODD_GRID) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = [tokens * patch for tokens, patch in zip(grid, config.patch_size)]
    # Where images come before the text, diffusers takes the last 512 context tokens to be the text.
    num_text_tokens = 7 if config.image_dim is None else 512
    inputs = {
        "hidden_states": torch.randn(BATCH, config.in_channels, *size, generator=generator),
        "timestep": torch.rand(BATCH, generator=generator) * 1000,
        "encoder_hidden_states": torch.randn(BATCH, num_text_tokens, config.text_dim, generator=generator),
    }
    if config.image_dim is not None:
        num_images = BATCH if config.pos_embed_seq_len is None else 2 * BATCH
        inputs["encoder_hidden_states_image"] = torch.randn(num_images, 9, config.image_dim, generator=generator)
    return inputs


def per_token_timesteps(grid: tuple[int, int, int], num_distinct: int = 2) -> Tensor:
    """Raster-ordered timesteps [batch, tokens] without any spatial pattern."""
    generator = torch.Generator().manual_seed(2)
    num_tokens = grid[0] * grid[1] * grid[2]
    choice = torch.randint(num_distinct, (BATCH, num_tokens), generator=generator)
    return (torch.rand(BATCH, num_distinct, generator=generator) * 1000).gather(1, choice)


def run_both_ways(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of all inputs and parameters for one fixed random cotangent."""
    leaves = {key: x if key == "timestep" else x.clone().requires_grad_() for key, x in inputs.items()}
    output = model(**leaves)
    output = output if isinstance(output, Tensor) else output.sample
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(3)))
    gradients = {f"d {key}": x.grad for key, x in leaves.items() if key != "timestep"}
    return {"output": output.detach()} | gradients | {key: p.grad for key, p in model.named_parameters()}


def assert_equal_within(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Largest error of each tensor, relative to the largest value of its layer (weight and bias together).

    Not of the tensor alone: softmax ignores what all keys share, so a key bias's gradient is a sum that nearly cancels,
    and its rounding errors have the size of the terms.
    """
    assert actual.keys() == expected.keys()
    scale: dict[str, float] = {}
    for key, value in expected.items():
        assert value.abs().max() > 1e-3, f"{key} is too small to test anything"
        layer = key.rpartition(".")[0] or key
        scale[layer] = max(scale.get(layer, 0.0), value.abs().max().item())
    for key, value in expected.items():
        error = (actual[key] - value).abs().max().item() / scale[key.rpartition(".")[0] or key]
        assert error <= tolerance, f"{key}: {error:.1e}"


@pytest.mark.parametrize("grid", [ODD_GRID, (5, 6, 6), (4, 4, 8)])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_forward_and_gradients_equal_diffusers(structure, grid):
    config = STRUCTURES[structure]
    oracle = WanTransformer3DModel.from_config(config.to_diffusers())
    randomise(oracle)
    model = WanTransformer.from_config(config.to_diffusers())
    model.load_state_dict(oracle.state_dict())
    inputs = random_inputs(config, grid)
    if structure == "5B":
        inputs["timestep"] = per_token_timesteps(grid)
    assert_equal_within(run_both_ways(model, inputs), run_both_ways(oracle, inputs), tolerance=1e-5)


def test_blocks_see_tokens_in_tile_order():
    config = STRUCTURES["1.3B"]
    oracle = WanTransformer3DModel.from_config(config.to_diffusers())
    randomise(oracle)
    model = random_model("1.3B")
    model.load_state_dict(oracle.state_dict())
    seen = []
    for module in (oracle, model):
        module.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        module(**random_inputs(config))
    raster, tiles = seen
    torch.testing.assert_close(tiles, raster[:, tile_layout(ODD_GRID).permutation], atol=1e-5, rtol=1e-5)
    assert (tiles - raster).abs().max() > 0.1


def test_attention_of_all_blocks_is_exchangeable():
    model = random_model("tiny")
    inputs = random_inputs(model.config)
    layouts = []

    def attend_to_own_value(call):
        layouts.append(call.layout)
        return call.v_BSHD

    dense = model(**inputs)
    model.set_attention(attend_to_own_value)
    replaced = model(**inputs)
    assert layouts == [tile_layout(ODD_GRID)] * model.config.num_layers
    assert (replaced - dense).abs().max() > 0.1
    model.set_attention(ShardedAttention(model.attention_core))
    assert torch.equal(model(**inputs), dense)


def test_constant_timesteps_of_frames_or_tokens_equal_the_scalar_bitwise():
    model = random_model("5B")
    inputs = random_inputs(model.config)
    # Sorted, because per-token timesteps are: the rows of the time MLP then come in the same order.
    timestep_B = inputs["timestep"].sort().values
    scalar = model(**inputs | {"timestep": timestep_B})
    for count in (ODD_GRID[0], tile_layout(ODD_GRID).num_tokens):
        expanded = model(**inputs | {"timestep": timestep_B[:, None].expand(-1, count)})
        if count == ODD_GRID[0]:  # three times the rows: the matrix product may sum in another order
            torch.testing.assert_close(expanded, scalar, atol=5e-6, rtol=0)
        else:
            assert torch.equal(expanded, scalar)


def test_timesteps_of_frames_equal_those_of_their_tokens():
    model = random_model("5B")
    inputs = random_inputs(model.config)
    frames_BF = torch.tensor([[0.0, 833.3333, 833.3333], [0.0, 12.5, 999.0]])
    tokens_BL = frames_BF.repeat_interleave(ODD_GRID[1] * ODD_GRID[2], dim=1)
    by_frame = run_both_ways(copy.deepcopy(model), inputs | {"timestep": frames_BF})
    by_token = run_both_ways(model, inputs | {"timestep": tokens_BL})
    assert_equal_within(by_frame, by_token, tolerance=1e-5)


def test_time_mlp_runs_once_per_distinct_timestep():
    model = random_model("5B")
    rows = []
    model.condition_embedder.time_proj.register_forward_hook(lambda _, args, out: rows.append(out.shape[0]))
    model(**random_inputs(model.config) | {"timestep": per_token_timesteps(ODD_GRID)})
    assert rows == [2 * BATCH]


def test_integer_timesteps_equal_float_and_rounded_ones_are_refused():
    model = random_model("tiny")
    inputs = random_inputs(model.config)
    integers = torch.tensor([999, 17])
    assert torch.equal(model(**inputs | {"timestep": integers}), model(**inputs | {"timestep": integers.float()}))
    with pytest.raises(ValueError, match="bfloat16 is rounded already"):
        model(**inputs | {"timestep": integers.bfloat16()})


def test_double_timesteps_give_the_official_sinusoid():
    timestep = torch.tensor([937.5, 2500 / 3], dtype=torch.float64)
    angle = timestep[:, None] * 10000.0 ** -(torch.arange(128, dtype=torch.float64) / 128)
    official = torch.cat((angle.cos(), angle.sin()), dim=1)
    torch.testing.assert_close(timestep_features(timestep, 256), official, atol=1e-12, rtol=0)
    error = (timestep_features(timestep.float(), 256) - official).abs().max()
    assert 1e-7 < error < 2e-4


def test_bfloat16_keeps_modulation_in_float32():
    """Both models have the same, bf16-representable weights, so only the precision of computing differs."""
    low = random_model("tiny").bfloat16()
    full = copy.deepcopy(low).float()
    inputs = random_inputs(low.config) | {"timestep": torch.tensor([937.5, 833.3333])}
    rows = []
    for model in (low, full):
        model.blocks[0].register_forward_pre_hook(lambda _, args: rows.append(args[3]))
    velocity = low(**inputs)
    assert velocity.dtype == torch.float32
    expected = full(**inputs)
    assert rows[0].dtype == torch.float32
    torch.testing.assert_close(rows[0], rows[1], atol=1e-6, rtol=0)
    # bf16 rounds by up to 2^-9 at about 20 places in a row here; if they add up as in a random walk, 1 %.
    relative = ((velocity - expected).norm() / expected.norm()).item()
    assert 1e-4 < relative < 2e-2


def test_a_gated_update_is_rounded_once():
    generator = torch.Generator().manual_seed(0)
    residual, update = (torch.randn(4, 5, 64, generator=generator).bfloat16() for _ in range(2))
    gate = torch.randn(4, 1, 64, generator=generator)
    exact = residual.double() + update.double() * gate.double()
    error = (add_gated(residual, update, gate).double() - exact).abs() / exact.abs()
    assert error.max() <= 2**-8  # half a unit in the last place, with a hair for fp32


def test_mixed_weight_dtypes_need_no_autocast():
    """Blocks in bf16 with the rest in fp32: what sharding the root in fp32 and the blocks in bf16 computes with."""
    model = random_model("14B-I2V")
    expected = model(**random_inputs(model.config))
    model.blocks.bfloat16()
    velocity = model(**random_inputs(model.config))
    velocity.sum().backward()
    assert 1e-5 < ((velocity - expected).norm() / expected.norm()).item() < 2e-2


def test_checkpointed_blocks_give_the_same_gradients():
    model = random_model("tiny")
    inputs = random_inputs(model.config)
    expected = run_both_ways(copy.deepcopy(model), inputs)
    for block in model.blocks:
        plain = block.forward
        block.forward = lambda *args, plain=plain: checkpoint(plain, *args, use_reentrant=False)
    actual = run_both_ways(model, inputs)
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_first_use_in_inference_mode_does_not_spoil_training():
    model = random_model("tiny")
    inputs = random_inputs(model.config, (2, 3, 13))
    with torch.inference_mode():
        model(**inputs)
    assert_equal_within(run_both_ways(model, inputs), run_both_ways(copy.deepcopy(model), inputs), tolerance=0)


def test_runs_under_fake_tensors_and_on_meta():
    config = STRUCTURES["tiny"]
    inputs = random_inputs(config, (2, 3, 15))
    with torch.device("meta"):
        model = WanTransformer(config)
    assert model(**{key: x.to("meta") for key, x in inputs.items()}).shape == inputs["hidden_states"].shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert WanTransformer(config)(**inputs).shape == inputs["hidden_states"].shape
    assert type(WanTransformer(config)(**inputs)) is Tensor


@pytest.mark.parametrize("flavor, count", [("1.3B", 1_418_996_800), ("14B", 14_288_491_584), ("5B", 4_999_787_712)])
def test_parameter_counts_are_the_published_ones(flavor, count):
    with torch.device("meta"):
        model = WanTransformer(FLAVORS[flavor])
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert not list(model.buffers())  # to_empty would leave them undefined


def test_initial_values_depend_on_seed_and_name_only():
    with torch.device("meta"):
        shallow = WanTransformer(replace(FLAVORS["tiny"], num_layers=1))
    shallow.to_empty(device="cpu").reset_parameters(seed=0)
    deep = WanTransformer(FLAVORS["tiny"]).state_dict()
    assert all(torch.equal(value, deep[name]) for name, value in shallow.state_dict().items())
    shallow.reset_parameters(seed=1)
    weight = "blocks.0.attn1.to_q.weight"
    assert not torch.equal(shallow.state_dict()[weight], deep[weight])
    assert not torch.equal(deep[weight], deep["blocks.1.attn1.to_q.weight"])


def test_initial_model_predicts_zero_and_trains():
    model = WanTransformer(FLAVORS["tiny"])
    inputs = random_inputs(model.config)
    assert not model(**inputs).any()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    target = -inputs["hidden_states"]
    losses = []
    for _ in range(12):
        loss = (model(**inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_states": torch.zeros(2, 15, 3, 10, 14)}, "must be .batch, 16, frames"),
        ({"hidden_states": torch.zeros(2, 16, 3, 9, 14)}, "multiple of the patch size"),
        ({"encoder_hidden_states": torch.zeros(1, 7, 64)}, "must be .2, tokens, 64"),
        ({"encoder_hidden_states_image": torch.zeros(2, 9, 24)}, "image_dim None"),
        ({"timestep": torch.zeros(3)}, "must be .2., .2, 3 frames. or .2, 105 tokens"),
        ({"hidden_states": torch.zeros(2, 16, 1025, 2, 2)}, "exceeds rope_max_seq_len 1024"),
    ],
)
def test_wrong_inputs_are_refused_in_one_sentence(change, message):
    model = WanTransformer(FLAVORS["tiny"])
    with pytest.raises(ValueError, match=message):
        model(**random_inputs(model.config) | change)


def test_image_models_refuse_to_run_without_one():
    model = random_model("14B-I2V")
    inputs = random_inputs(model.config)
    del inputs["encoder_hidden_states_image"]
    with pytest.raises(ValueError, match="no image embeddings"):
        model(**inputs)


@pytest.mark.parametrize("per_token", [False, True])
def test_a_block_compiles_as_one_graph(per_token):
    model = random_model("tiny")
    inputs = random_inputs(model.config)
    if per_token:
        inputs["timestep"] = per_token_timesteps(ODD_GRID)
    expected = run_both_ways(copy.deepcopy(model), inputs)
    torch.compiler.reset()
    model.blocks[0].compile(fullgraph=True, backend="aot_eager")  # a graph break or an untraceable part would raise
    assert_equal_within(run_both_ways(model, inputs), expected, tolerance=1e-5)
