"""A sharded role starts from stored weights: every rank gets its part, and reads little more than that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from small_checkpoints import CONFIG, make_role, write_weights_only
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from titan_distill.checkpoint import diffusers_folder, storage
from titan_distill.checkpoint.initial_weights import read_weights
from titan_distill.checkpoint.manifest import CheckpointDamaged, read_manifest
from titan_distill.checkpoint.tools import rewrite
from titan_distill.models.wan.state_dict import load_weights, save_folder
from titan_distill.parallelisms.fsdp import FsdpOptions, apply_fsdp

NUM_RANKS = 2


def make_network(seed: int) -> nn.Module:
    """Rows that do not divide by two ranks, and a bias of which one rank has nothing."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 131), nn.Linear(131, 1))


def _rank_main(rank: int, folder: Path, checkpoint: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=NUM_RANKS)
    network = make_network(seed=100)
    fully_shard(network, mesh=init_device_mesh("cpu", (NUM_RANKS,), mesh_dim_names=("dp_shard",)))

    bytes_read, read_data = [], storage._Reader.read_data

    def count(reader: Any, plan: Any, planner: Any) -> Any:
        bytes_read.append(sum(reader.storage_data[item.storage_index].length for item in plan.items))
        return read_data(reader, plan, planner)

    storage._Reader.read_data = count  # type: ignore[method-assign]
    read_weights(f"{checkpoint}#student:raw", network)
    expected = make_network(seed=0).state_dict()
    for name, weight in network.state_dict().items():
        assert torch.equal(weight.full_tensor(), expected[name]), name
    total = sum(info.length for info in storage.read_metadata(checkpoint).storage_data.values())
    assert bytes_read[0] < 0.6 * total, (bytes_read, total)

    before = {name: weight.full_tensor() for name, weight in network.state_dict().items()}
    damaged = checkpoint / sorted(read_manifest(checkpoint).files)[1]
    if rank == 0:
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    dist.barrier()
    with pytest.raises(CheckpointDamaged, match=damaged.name):
        read_weights(f"{checkpoint}#student:raw", network)
    for name, weight in network.state_dict().items():
        assert torch.equal(weight.full_tensor(), before[name]), name
    dist.barrier()  # a rank that leaves while the other still talks to it makes gloo abort
    dist.destroy_process_group()


def test_each_rank_reads_its_part_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "PIECE_BYTES", 1024)
    network = {"transformer": make_network(seed=0).state_dict()}
    checkpoint = rewrite.reshard(write_weights_only(tmp_path / "whole", network, {}), tmp_path / "pieces", 1)
    mp.spawn(_rank_main, (tmp_path, checkpoint), nprocs=NUM_RANKS)


class CountingFile:
    """A safetensors file that counts the elements which are read of it."""

    num_elements = 0

    def __init__(self, path: Path, **options: Any) -> None:
        self._file = safe_open(path, **options)

    def __enter__(self) -> CountingFile:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def keys(self) -> list[str]:
        return self._file.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._counted(self._file.get_tensor(name))

    def get_slice(self, name: str) -> CountingSlice:
        return CountingSlice(self._file.get_slice(name))

    @classmethod
    def _counted(cls, tensor: torch.Tensor) -> torch.Tensor:
        cls.num_elements += tensor.numel()
        return tensor


class CountingSlice:
    """A tensor of a safetensors file before it is read."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored

    def get_shape(self) -> list[int]:
        return self._stored.get_shape()

    def get_dtype(self) -> str:
        return self._stored.get_dtype()

    def __getitem__(self, region: Any) -> torch.Tensor:
        return CountingFile._counted(self._stored[region])


def _read_folder(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous2", rank=rank, world_size=NUM_RANKS)
    diffusers_folder.safe_open = CountingFile  # type: ignore[misc, assignment]
    model = make_role("", 100, ema=False).transformer
    apply_fsdp(model, list(model.blocks), init_device_mesh("cpu", (NUM_RANKS,)), FsdpOptions(torch.float32))
    load_weights(model, folder / "weights")
    whole = make_role("", 0, ema=False).transformer.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.full_tensor(), whole[name]), name
    own = sum(parameter.to_local().numel() for parameter in model.parameters())
    total = sum(tensor.numel() for tensor in whole.values())
    assert CountingFile.num_elements == own < 0.6 * total, (CountingFile.num_elements, own, total)
    read = torch.tensor(CountingFile.num_elements)
    dist.all_reduce(read)
    assert int(read) == total
    dist.destroy_process_group()


def test_each_rank_reads_only_its_slices_of_a_diffusers_folder(tmp_path: Path) -> None:
    """Both ranks together read every element once: nothing has to be imported for large models."""
    save_folder(make_role("", 0, ema=False).transformer.state_dict(), CONFIG, tmp_path / "weights", None, 4096)
    assert len(list((tmp_path / "weights").glob("*.safetensors"))) > 1
    mp.spawn(_read_folder, (tmp_path,), nprocs=NUM_RANKS)
