"""Slabs on a GPU: page-locked, no larger than what lies in them, and usable by copies that do not wait."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from titan_distill.parallelisms.pinned import SharedMemory, slabs

pytestmark = pytest.mark.gpu
MIB = 2**20
SHAPE = torch.Size([5, MIB + 1])


def test_slabs_are_page_locked_and_not_rounded_up() -> None:
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    made = slabs({"a": (SHAPE, torch.float32), "b": (SHAPE, torch.bfloat16)}, page_locked=True)
    assert all(tensor.is_pinned() for tensor in made.values())
    assert torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) == before, "not from torch's allocator"
    source = torch.randn(SHAPE, device="cuda")
    made["a"].copy_(source, non_blocking=True)
    made["b"].copy_(source, non_blocking=True)
    returned = made["a"].to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(made["a"], source.cpu()) and torch.equal(returned, source)
    assert torch.equal(made["b"], source.bfloat16().cpu())


def test_memory_can_be_locked_again_after_it_was_freed() -> None:
    for _ in range(3):
        made = slabs({"a": (torch.Size([64 * MIB]), torch.float32)}, page_locked=True)
        made["a"].fill_(1.0)
        del made
        gc.collect()


def test_another_process_sees_what_is_copied_from_the_gpu_into_shared_memory() -> None:
    """As the process that writes asynchronous saves does, through the descriptor."""
    memory = SharedMemory()
    made = slabs({"a": (SHAPE, torch.float32)}, page_locked=True, memory=memory)
    source = torch.randn(SHAPE, device="cuda")
    made["a"].copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    seen = torch.frombuffer(mmap.mmap(memory.descriptor, 0, flags=mmap.MAP_SHARED), dtype=torch.float32)
    assert made["a"].is_pinned() and torch.equal(seen[: source.numel()].view(SHAPE), source.cpu())
