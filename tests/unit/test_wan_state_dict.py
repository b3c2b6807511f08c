"""Wan weights on disk: exchange with diffusers, shards, sharded parameters, and one sentence per damage."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_distill.models.wan import state_dict
from titan_distill.models.wan.config import FLAVORS, WanConfig
from titan_distill.models.wan.state_dict import INDEX_NAME, WEIGHTS_NAME, load_weights, read_config, save_folder
from titan_distill.models.wan.transformer import WanTransformer

CONFIG = replace(FLAVORS["tiny"], num_layers=2, ffn_dim=100)
SHARD_BYTES = 200_000


def random_model(config: WanConfig = CONFIG) -> WanTransformer:
    model = WanTransformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05, generator=generator)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one weights file."""
    save_folder(random_model().state_dict(), CONFIG, tmp_path)
    return tmp_path


@pytest.fixture
def sharded_folder(tmp_path: Path) -> Path:
    """A folder with several weights files and an index."""
    save_folder(random_model().state_dict(), CONFIG, tmp_path, max_shard_bytes=SHARD_BYTES)
    return tmp_path


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    actual = model.state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("flavor", FLAVORS)
def test_keys_and_shapes_are_diffusers(flavor):
    with torch.device("meta"):
        model = WanTransformer(FLAVORS[flavor])
        oracle = WanTransformer3DModel.from_config(FLAVORS[flavor].to_diffusers())
    shapes, expected = ({name: x.shape for name, x in m.state_dict().items()} for m in (model, oracle))
    assert shapes == expected


def test_round_trip_is_bitwise(folder):
    model = WanTransformer(read_config(folder))
    load_weights(model, folder)
    assert_same_weights(model, random_model())
    assert [path.name for path in sorted(folder.iterdir())] == ["config.json", WEIGHTS_NAME]


def test_sharded_round_trip_is_bitwise(sharded_folder):
    files = sorted(sharded_folder.glob("*.safetensors"))
    tensors = [load_file(file) for file in files]
    assert len(files) > 3
    assert all(len(shard) == 1 or sum(x.nbytes for x in shard.values()) <= SHARD_BYTES for shard in tensors)
    index = json.loads((sharded_folder / INDEX_NAME).read_text())
    assert index["weight_map"] == {name: file.name for file, shard in zip(files, tensors) for name in shard}
    assert index["metadata"]["total_size"] == sum(x.nbytes for shard in tensors for x in shard.values())
    model = WanTransformer(CONFIG)
    load_weights(model, sharded_folder)
    assert_same_weights(model, random_model())


@pytest.mark.parametrize("max_shard_bytes", [5e9, SHARD_BYTES])
def test_diffusers_loads_what_we_save(tmp_path, max_shard_bytes):
    model = random_model()
    save_folder(model.state_dict(), CONFIG, tmp_path, max_shard_bytes=max_shard_bytes)
    oracle = WanTransformer3DModel.from_pretrained(tmp_path)
    inputs = (torch.randn(2, 16, 3, 6, 10), torch.tensor([900.0, 41.5]), torch.randn(2, 7, 64))
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), oracle(*inputs).sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_shard_size", ["10GB", "200KB"])
def test_we_load_what_diffusers_saves(tmp_path, max_shard_size):
    oracle = WanTransformer3DModel.from_config(CONFIG.to_diffusers())
    oracle.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    model = WanTransformer(read_config(tmp_path))
    load_weights(model, tmp_path)
    assert_same_weights(model, oracle)


def test_saving_again_leaves_nothing_of_the_earlier_save(sharded_folder):
    model = WanTransformer(CONFIG)
    save_folder(((name, x) for name, x in model.state_dict().items()), CONFIG, sharded_folder)
    assert [path.name for path in sorted(sharded_folder.iterdir())] == ["config.json", WEIGHTS_NAME]
    other = random_model()
    load_weights(other, sharded_folder)
    assert_same_weights(other, model)


def test_dtype_of_the_file_and_of_the_model_are_independent(tmp_path):
    save_folder(random_model().state_dict(), CONFIG, tmp_path, dtype=torch.bfloat16)
    assert {x.dtype for x in load_file(tmp_path / WEIGHTS_NAME).values()} == {torch.bfloat16}
    model = WanTransformer(CONFIG)
    load_weights(model, tmp_path)
    assert {x.dtype for x in model.parameters()} == {torch.float32}
    assert_same_weights(model, random_model().bfloat16().float())


def test_the_unused_query_norm_of_published_image_models_is_skipped(tmp_path):
    config = replace(CONFIG, image_dim=24, added_kv_proj_dim=128)
    model = random_model(config)
    unused = {"blocks.0.attn2.norm_added_q.weight": torch.ones(128)}
    save_folder(model.state_dict() | unused, config, tmp_path)
    loaded = WanTransformer(config)
    load_weights(loaded, tmp_path)
    assert_same_weights(loaded, model)


def test_loading_holds_one_tensor_at_a_time(sharded_folder, monkeypatch):
    """Every tensor that was read must be gone before the next one is."""
    fill = state_dict.fill
    read: list[weakref.ref] = []
    alive: list[int] = []

    def fill_and_count(parameter, part):
        read.append(weakref.ref(part))
        alive.append(sum(reference() is not None for reference in read))
        fill(parameter, part)

    model = WanTransformer(CONFIG)
    monkeypatch.setattr(state_dict, "fill", fill_and_count)
    load_weights(model, sharded_folder)
    assert alive == [1] * len(model.state_dict())


def become_rank_two(world_size: int) -> None:
    """Join a process group whose collectives do nothing: only what needs no communication can come out right."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=2, world_size=world_size, store=FakeStore())


def check_uneven_shards(config: WanConfig, fill: Callable[[WanTransformer], None]) -> None:
    """Three ranks divide ffn_dim 98 into 33, 33 and 32 rows; the third compares its part with the whole."""
    whole = WanTransformer(config)
    fill(whole)
    become_rank_two(world_size=3)
    with torch.device("meta"):
        model = WanTransformer(config)
    fully_shard(model, mesh=init_device_mesh("cpu", (3,)))
    fill(model.to_empty(device="cpu"))
    for name, parameter in model.named_parameters():
        parts = whole.get_parameter(name).chunk(3)
        expected = parts[2] if len(parts) == 3 else torch.empty(0, *parameter.shape[1:])
        assert torch.equal(parameter.to_local(), expected), name


def check_tensor_parallel_shards(config: WanConfig, fill: Callable[[WanTransformer], None]) -> None:
    """FSDP over tensor parallelism shards rows twice: rank 2 of data 2 x tensor 2 has the second quarter of them."""
    whole = WanTransformer(config)
    fill(whole)
    become_rank_two(world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    with torch.device("meta"):
        model = WanTransformer(config)
    plan = {"attn1.to_q": ColwiseParallel(), "attn1.to_out.0": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    fill(model.to_empty(device="cpu"))
    local, full = model.blocks[0].attn1, whole.blocks[0].attn1
    assert torch.equal(local.to_q.weight.to_local(), full.to_q.weight.chunk(4)[1])
    assert torch.equal(local.to_out[0].weight.to_local(), full.to_out[0].weight.chunk(2)[1].chunk(2, dim=1)[0])


def check_sharded_filling(_: int, config: WanConfig, folder: Path) -> None:
    """In a process of its own, because PyTorch caches meshes, and with them the rank, for the life of a process."""
    for check in (check_uneven_shards, check_tensor_parallel_shards):
        check(config, partial(load_weights, folder=folder))
        check(config, WanTransformer.reset_parameters)
    dist.destroy_process_group()


def test_sharded_parameters_get_their_part_without_communication(tmp_path):
    config = replace(CONFIG, ffn_dim=98)
    save_folder(random_model(config).state_dict(), config, tmp_path)
    torch.multiprocessing.spawn(check_sharded_filling, args=(config, tmp_path), nprocs=1)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


BIAS = "blocks.0.ffn.net.2.bias"
DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "config not an object": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "another class": (lambda f: edit_json(f / "config.json", _class_name="UNet"), "is of class 'UNet'"),
    "another size": (lambda f: edit_json(f / "config.json", ffn_dim=99), r"another model: ffn_dim 99 \(model: 100\)"),
    "no weights": (lambda f: (f / WEIGHTS_NAME).unlink(), "safetensors does not exist"),
    "cut weights": (lambda f: os.truncate(f / WEIGHTS_NAME, 5000), "safetensors is damaged"),
    "missing key": (
        lambda f: edit_weights(f / WEIGHTS_NAME, lambda x: x.pop(BIAS)),
        rf"lacks 1 of the \d+ tensors of its network: {BIAS}",
    ),
    "extra key": (
        lambda f: edit_weights(f / WEIGHTS_NAME, lambda x: x.update(lora=torch.ones(1))),
        "has 1 that the network does not have: lora",
    ),
    "other shape": (
        lambda f: edit_weights(f / WEIGHTS_NAME, lambda x: x.update({BIAS: torch.ones(3)})),
        rf"has 1 of another shape: {BIAS} \(\[3\] instead of \[128\]\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported_in_one_sentence_before_anything_is_loaded(folder, damage):
    inflict, message = DAMAGES[damage]
    inflict(folder)
    model = WanTransformer(CONFIG)
    with pytest.raises(ValueError, match=message) as error:
        load_weights(model, folder)
    assert "\n" not in str(error.value)
    assert_same_weights(model, WanTransformer(CONFIG))


def test_missing_folder_is_reported(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        read_config(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3])
def test_an_index_may_not_lead_out_of_its_folder(sharded_folder, name):
    edit_json(sharded_folder / INDEX_NAME, weight_map={"proj_out.bias": name})
    with pytest.raises(ValueError, match="is not a bare file name"):
        load_weights(WanTransformer(CONFIG), sharded_folder)


def test_missing_shard_is_reported(sharded_folder):
    next(sharded_folder.glob("*-00002-of-*")).unlink()
    with pytest.raises(ValueError, match=r"-00002-of-.* does not exist"):
        load_weights(WanTransformer(CONFIG), sharded_folder)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_config_survives_diffusers(flavor):
    with torch.device("meta"):
        oracle = WanTransformer3DModel.from_config(FLAVORS[flavor].to_diffusers())
    assert WanConfig.from_diffusers(json.loads(oracle.to_json_string())) == FLAVORS[flavor]


def test_absent_output_channels_equal_the_input():
    assert WanConfig.from_diffusers({"in_channels": 48, "out_channels": None}).out_channels == 48


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window_size": [-1, -1]}, "no Wan transformer reads: window_size"),
        ({"num_layers": 0}, "num_layers 0 must be positive"),
        ({"patch_size": [1, 2]}, "must have three entries"),
        ({"patch_size": [1, 2, -2]}, "must be positive"),
        ({"attention_head_dim": 33}, "must be even and at least 6"),
        ({"freq_dim": 63}, "freq_dim 63 must be even"),
        ({"qk_norm": "layer_norm"}, "'layer_norm' is unknown"),
        ({"image_dim": 24}, "must be set together"),
        ({"image_dim": 24, "added_kv_proj_dim": 24}, "must equal the model's width 128"),
        ({"pos_embed_seq_len": 18}, "needs image_dim"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        WanConfig.from_diffusers(CONFIG.to_diffusers() | change)
