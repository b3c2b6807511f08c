"""FSDP keeps some parameters gathered after a rollout; whoever reads or swaps weights must still get the shards."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from titan_distill.models.wan.config import FLAVORS
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.parallelisms.fsdp import FsdpOptions, apply_fsdp
from titan_distill.roles import Ema, RoleHandle


def check_after_a_rollout(_: int) -> None:
    """In a process of its own, for its process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    whole = WanTransformer(FLAVORS["tiny"])
    model = copy.deepcopy(whole)
    apply_fsdp(model, list(model.blocks), init_device_mesh("cpu", (1,)), FsdpOptions(torch.float32))
    ema = Ema(model, 0.5, start_step=0)
    for average in ema.shadow.values():
        average.add_(1.0)
    role = RoleHandle("student", {"transformer": model}, trainable=True, ema=ema)
    inputs = torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 4, 64)
    with torch.no_grad():
        before = model(*inputs)
        with role.evaluation():
            assert_values(role, whole, offset=1.0)
            assert not torch.allclose(model(*inputs), before)
        assert_values(role, whole, offset=0.0)
        assert torch.equal(model(*inputs), before)
        model(*inputs)
        ema.update(model, train_step=0)
    for name, parameter in whole.named_parameters():
        average = ema.shadow[name]
        assert isinstance(average, DTensor)
        torch.testing.assert_close(average.full_tensor(), parameter.detach() + 0.5)
    dist.destroy_process_group()


def assert_values(role: RoleHandle, whole: WanTransformer, offset: float) -> None:
    for parameter, expected in zip(role.parameters(), whole.parameters(), strict=True):
        assert isinstance(parameter, DTensor)
        torch.testing.assert_close(parameter.detach().full_tensor(), expected.detach() + offset)


def test_averages_after_a_rollout() -> None:
    torch.multiprocessing.spawn(check_after_a_rollout, nprocs=1)
