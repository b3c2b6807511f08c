"""A sharded role starts from an imported folder: every rank gets its part, and reads little more than that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from titan_distill.checkpoint import storage
from titan_distill.checkpoint.initial_weights import read_weights
from titan_distill.checkpoint.manifest import CheckpointDamaged, read_manifest
from titan_distill.checkpoint.tools import rewrite
from titan_distill.checkpoint.tools.imports import import_folder

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


def test_each_rank_reads_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "PIECE_BYTES", 1024)
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    save_file(make_network(seed=0).state_dict(), weights / "diffusion_pytorch_model.safetensors")
    checkpoint = import_folder(weights, tmp_path / "imported", "student", "toy", lambda _, shapes: sorted(shapes))
    mp.spawn(_rank_main, (tmp_path, checkpoint), nprocs=NUM_RANKS)
