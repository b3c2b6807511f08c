"""Peak performance of GPUs from their data sheets, and the fractions of it that a training run is assumed to reach.

The fractions are assumptions, not measurements; every plan prints them. Use the seconds of a plan to compare layouts.
To know the seconds of a run, measure them with a benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass

COMPUTE_EFFICIENCY = 0.35
"""FLOP/s while a rank computes, as a fraction of the bf16 peak. Published distillation runs of Wan imply 24 %
(Self-Forcing on H100) to 32 % (FastWan on H200). These include waiting for other ranks; without it the fraction is a
little higher."""
NETWORK_EFFICIENCY = 0.75
"""Bytes per second of a large collective, as a fraction of the links' peak. nccl-tests commonly show this value."""
RESERVE = 0.10
"""Fraction of a GPU's memory reserved for the CUDA context, NCCL's buffers, cuBLAS workspaces and fragmentation."""
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
            return self.nvlink_bytes * NETWORK_EFFICIENCY
        return min(self.nvlink_bytes, in_node * self.network_bytes) * NETWORK_EFFICIENCY


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 80GB SXM data sheet: 312 TFLOPS, 600 GB/s NVLink, PCIe 4; DGX A100: 8 × 200 Gb/s.
        Gpu("A100", 312e12, 79.2, 300e9, 25e9, 32e9),
        # H100 SXM data sheet: 989 TFLOPS without sparsity, 900 GB/s NVLink, PCIe 5; DGX H100: 8 × 400 Gb/s.
        Gpu("H100", 989e12, 79.1, 450e9, 50e9, 64e9),
        # H200 SXM data sheet: 989 TFLOPS, 141 GB, 900 GB/s NVLink, PCIe 5; DGX H200: 8 × 400 Gb/s.
        Gpu("H200", 989e12, 139.8, 450e9, 50e9, 64e9),
        # DGX B200 data sheet: 2250 TFLOPS a GPU, 1440 GB for 8, 1800 GB/s NVLink, PCIe 5, 8 × 400 Gb/s.
        Gpu("B200", 2250e12, 178.3, 900e9, 50e9, 64e9),
    )
}
