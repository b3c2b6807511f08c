"""Slabs hold what is asked for and nothing more, keep tensors apart, and live exactly as long as they."""

from __future__ import annotations

import ctypes
import gc
import mmap
from types import SimpleNamespace

import pytest
import torch
from slab_checks import assert_exact_slabs
from torch import nn

from titan_distill.checkpoint.asynchronous import Stager
from titan_distill.parallelisms.pinned import SharedMemory, slabs

WANTED = {
    "matrix": (torch.Size([5, 7]), torch.float32),
    "vector": (torch.Size([3]), torch.bfloat16),
    "step": (torch.Size([]), torch.float32),
    "nothing": (torch.Size([0, 4]), torch.float32),
    "another": (torch.Size([33]), torch.bfloat16),
}


def test_slabs_are_exact_and_keep_tensors_apart() -> None:
    made = slabs(WANTED, page_locked=False)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in made.items()} == WANTED
    assert list(made) == list(WANTED)
    assert_exact_slabs(list(made.values()))
    for number, tensor in enumerate(made.values(), start=1):
        tensor.fill_(number)
    for number, tensor in enumerate(made.values(), start=1):
        assert (tensor == number).all() and tensor.is_contiguous()


def test_shared_slabs_are_seen_by_whoever_has_the_descriptor() -> None:
    memory = SharedMemory()
    made = slabs(WANTED, page_locked=False, memory=memory)
    assert_exact_slabs(list(made.values()))
    seen = mmap.mmap(memory.descriptor, 0, access=mmap.ACCESS_READ)
    for number, tensor in enumerate((tensor for tensor in made.values() if tensor.numel()), start=1):
        content = memoryview(tensor.fill_(number).reshape(-1).view(torch.uint8).numpy())
        start = memory.offset(content)
        assert start is not None and seen[start : start + len(content)] == content
    assert memory.offset(memoryview(b"elsewhere")) is None


def test_each_tensor_counts_its_own_changes() -> None:
    """Staging finds out from the counters who changed a tensor that is being copied; see `Stage.finish`."""
    made = slabs(WANTED, page_locked=False)
    before = made["matrix"]._version
    made["step"].add_(1)
    assert made["matrix"]._version == before


def test_pages_are_locked_while_a_tensor_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: dict[int, int] = {}

    def register(address: int, num_bytes: int, _: int) -> int:
        locked[address] = num_bytes
        return 0

    def unregister(address: int) -> int:
        assert ctypes.string_at(address, locked.pop(address)).count(0), "the pages are still there"
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda result: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    made = slabs(WANTED, page_locked=True)
    assert locked == {made["matrix"].data_ptr(): 192 + 64, made["vector"].data_ptr(): 64 + 128}
    last = made["another"]
    made.clear()
    gc.collect()
    assert list(locked) == [last.data_ptr() - 64]
    del last
    gc.collect()
    assert not locked


def test_staged_copies_lie_in_slabs() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3).to(torch.bfloat16))
    stager = Stager(torch.device("cpu"))
    stage = stager.begin({"models": model.state_dict(), "step": torch.tensor(3.0)}, steady=model.parameters())
    stage.finish()
    assert_exact_slabs(list(stage.copies.values()))
    for name, tensor in model.state_dict().items():
        assert torch.equal(stage.copies[f"models.{name}"], tensor)
    assert stage.copies["step"] == 3
