"""Two questions that only the machine with the GPU can answer, for the GPU suite and for `tests/gpu`.

Needs torch only.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.autograd import forward_ad

LOOPBACK = Path("/sys/class/net/lo/flags")
IFF_UP = 1


def loopback_is_up(flags: Path = LOOPBACK) -> bool:
    """True where the interface `lo` is there and up: gloo listens on it where the host's own name is not known."""
    return flags.is_file() and bool(int(flags.read_text(encoding="utf-8"), 16) & IFF_UP)


def rms_norm_jvp_error(device: torch.device | str, dtype: torch.dtype = torch.float32, width: int = 1536) -> float:
    """Distance of the forward-mode derivative of the model's q/k norm from a central difference in fp64, relative to
    the derivative's largest value. CUDA's fused norm has a formula of its own; the CPU differentiates the parts."""
    generator = torch.Generator().manual_seed(0)
    x, dx, weight = (torch.randn(2, 64, width, generator=generator).to(device, dtype) for _ in range(3))
    norm = nn.RMSNorm(width, eps=1e-6, device=device, dtype=dtype)
    norm.weight.data.copy_(weight[0, 0])
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, dx))).tangent
    with torch.no_grad():
        norm, step = norm.double(), 1e-4
        ahead, behind = (norm(x.double() + sign * step * dx.double()) for sign in (1, -1))
    slope = (ahead - behind) / (2 * step)
    return float((tangent.double() - slope).abs().max() / slope.abs().max())
