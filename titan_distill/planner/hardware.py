"""GPUs to plan for, and the fraction of their data sheets that a training run reaches.

Data sheets give peaks. The fractions are assumptions, stated here once and printed with every plan. Compare layouts by
the seconds of a plan; measure seconds with a benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass

COMPUTE_EFFICIENCY = 0.35
"""Executed FLOP/s as a fraction of the bf16 peak while a rank computes. Published distillation runs of Wan imply 24 %
(SF on H100) to 32 % (FastWan on H200) with all waiting included, so a little more without it."""
NETWORK_EFFICIENCY = 0.75
"""Bytes per second of a large collective as a fraction of the links' peak, as nccl-tests commonly show."""
RESERVE = 0.10
"""Fraction of a GPU's memory left to the CUDA context, NCCL's buffers, cuBLAS workspaces and fragmentation."""
GPUS_PER_NODE = 8
"""Ranks that share NVLink, in HGX and DGX machines."""


@dataclass(frozen=True)
class Gpu:
    """The peaks of a GPU, from NVIDIA's data sheets."""

    name: str
    peak_flops: float
    """Dense bf16, FLOP/s."""
    memory_gib: float
    """GiB that CUDA reports, which are less than the advertised GB."""
    nvlink_bytes: float
    """Bytes per second to the other GPUs of its node, one direction."""
    network_bytes: float
    """Bytes per second of its share of the node's network cards, one direction."""
    host_bytes: float
    """Bytes per second to the host, one direction of PCIe × 16."""

    @property
    def usable_gib(self) -> float:
        return self.memory_gib * (1 - RESERVE)

    def bandwidth(self, num_ranks: int, stride: int) -> float:
        """Bytes per second of each of `num_ranks` ranks, `stride` apart, in a ring over all of them.

        A ring enters a node as often as the node has cards that serve it, so ranks of one node lend one another theirs.
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
