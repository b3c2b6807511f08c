"""Peak performance of GPUs from their data sheets, and the fractions of it that a training run is assumed to reach.

The fractions are assumptions, not measurements; every plan prints them. Each part of a step has its own, because they
differ by a factor of two: a large matrix product reaches two thirds of the tensor cores' peak, the backward of sparse
attention a third, and pointwise operations are bound by memory bandwidth. `docs/performance.md` has the budget that
they make up, and beside it what the GPU suite has measured.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import torch

from titan_distill.observability.flops import peak_flops_by_name
from titan_distill.parallelisms.mesh import default_device


@dataclass(frozen=True)
class Efficiency:
    """Fractions of a GPU's peak that the parts of a step are assumed to reach. Products count the FLOPs that kernels
    execute: a dense attention's backward 5 products where its forward has 2, a sparse one's 7."""

    linear: float = 0.67
    """cuBLAS at the shapes of the blocks: 660 of an H100's 989 TFLOP/s under its power limit."""
    attention_forward: float = 0.63
    """Dense attention, 620 TFLOP/s on an H100. FlashAttention-3 publishes 590 to 650; cuDNN is about equal."""
    attention_backward: float = 0.53
    """520 TFLOP/s on an H100, where 520 to 650 are published."""
    sparse_forward: float = 0.48
    """Sparse attention, over whole tiles: 475 TFLOP/s on an H100, the middle of the range that `docs/kernels.md`
    predicts from instruction counts."""
    sparse_backward: float = 0.37
    """365 TFLOP/s on an H100, the middle of the predicted range."""
    cross_attention: float = 0.36
    """512 keys are few: the start and the end of each program, which no product fills, weigh more."""
    memory: float = 0.85
    """Bytes per second of pointwise operations, the optimizer and FSDP's copies: 2.85 TB/s on an H100."""
    network: float = 0.75
    """Bytes per second of a large collective. nccl-tests commonly show this value."""


EFFICIENCY = Efficiency()
RESERVE = 0.10
"""Fraction of a GPU's memory reserved for the CUDA context, NCCL's buffers, cuBLAS workspaces and fragmentation."""
DISK_BYTES = 1e9
"""Bytes per second that a node is assumed to write to the disk of the checkpoints, which is commonly a shared one."""
CPU = "CPU"
GPUS_PER_NODE = 8
"""GPUs connected by NVLink in one HGX or DGX machine."""


@dataclass(frozen=True)
class Gpu:
    """Peak performance of a GPU, from NVIDIA's data sheets."""

    name: str
    peak_flops: float
    """FLOP/s of dense bf16 matrix products."""
    memory_gib: float
    """Memory in GiB as CUDA reports it, which is less than the advertised GB."""
    nvlink_bytes: float
    """Bytes per second to the other GPUs of its node, in one direction."""
    network_bytes: float
    """Bytes per second of its share of the node's network cards, in one direction."""
    host_bytes: float
    """Bytes per second to the host over PCIe × 16, in one direction."""
    memory_bytes: float
    """Bytes per second of its own memory, reads and writes together."""

    @property
    def is_cpu(self) -> bool:
        return self.name == CPU

    @property
    def has_rates(self) -> bool:
        """Whether rates are assumed; otherwise all seconds of its plans are nan."""
        return not math.isnan(self.peak_flops)

    @property
    def usable_gib(self) -> float:
        return self.memory_gib * (1 - RESERVE)

    def bandwidth(self, num_ranks: int, stride: int) -> float:
        """Returns the bytes per second that each rank sends in a ring of `num_ranks` ranks, whose numbers are `stride`
        apart.

        A ring over several nodes uses the network cards of all its ranks in a node together.
        """
        in_node = max(1, GPUS_PER_NODE // stride)
        if num_ranks <= in_node:
            return self.nvlink_bytes * EFFICIENCY.network
        return min(self.nvlink_bytes, in_node * self.network_bytes) * EFFICIENCY.network


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 80GB SXM data sheet: 312 TFLOPS, 2039 GB/s, 600 GB/s NVLink, PCIe 4; DGX A100: 8 × 200 Gb/s.
        Gpu("A100", 312e12, 79.2, 300e9, 25e9, 32e9, 2.04e12),
        # H100 SXM data sheet: 989 TFLOPS without sparsity, 3.35 TB/s, 900 GB/s NVLink, PCIe 5; DGX H100: 8 × 400 Gb/s.
        Gpu("H100", 989e12, 79.1, 450e9, 50e9, 64e9, 3.35e12),
        # H200 SXM data sheet: 989 TFLOPS, 141 GB, 4.8 TB/s, 900 GB/s NVLink, PCIe 5; DGX H200: 8 × 400 Gb/s.
        Gpu("H200", 989e12, 139.8, 450e9, 50e9, 64e9, 4.8e12),
        # DGX B200 data sheet: 2250 TFLOPS a GPU, 1440 GB and 64 TB/s for 8, 1800 GB/s NVLink, PCIe 5, 8 × 400 Gb/s.
        Gpu("B200", 2250e12, 178.3, 900e9, 50e9, 64e9, 8.0e12),
    )
}


def of_machine(device: torch.device) -> Gpu:
    """Returns the hardware of this machine's device: a GPU of the list, or its name and memory without rates. A
    variant with less memory, such as the A100 of 40 GB, keeps its own."""
    if device.type == "cuda":
        name, memory_bytes = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
        for gpu in GPUS.values():
            if gpu.name in name and gpu.peak_flops == peak_flops_by_name(name):  # and no variant with another peak
                return replace(gpu, memory_gib=min(gpu.memory_gib, memory_bytes / 2**30))
        return _without_rates(name, memory_bytes)
    return _without_rates(CPU, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def planned_gpu() -> Gpu:
    """Returns the GPU to plan for where none is named: this machine's, which has the rates of an H100 if it is none of
    the list; an H100 on a machine without one."""
    found = of_machine(default_device())
    if found.is_cpu:
        return GPUS["H100"]
    return (
        found
        if found.has_rates
        else replace(GPUS["H100"], name=f"{found.name} at the rates of an H100", memory_gib=found.memory_gib)
    )


def _without_rates(name: str, memory_bytes: int) -> Gpu:
    return Gpu(name, math.nan, memory_bytes / 2**30, *[math.nan] * 4)
