"""Copies from the host to the GPU for which the host does not wait.

The host queues kernels far ahead of the GPU. A plain `tensor.to("cuda")` ends that lead, because it returns only after
the GPU has finished everything queued before. A copy from page-locked memory is queued like a kernel. PyTorch keeps a
pool of such memory and reuses a block only after the copies from it are done, so nobody has to keep the source alive.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return `tensor` on `device`. From host to GPU it goes through page-locked memory, so the host does not wait.

    A tensor that is already there is returned as it is. The tangent of a dual tensor moves with it.
    """
    if tensor.device.type != "cpu" or torch.device(device).type != "cuda":
        return tensor.to(device)
    primal, tangent = forward_ad.unpack_dual(tensor)
    if tangent is not None:  # pinning has no forward mode
        return forward_ad.make_dual(to_device(primal, device), to_device(tangent, device))
    return tensor.pin_memory().to(device, non_blocking=True)
