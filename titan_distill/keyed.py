"""Random draws named by what they are for."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence

import torch
from titan_kernels import philox_normal
from torch import Tensor

from titan_distill.transfer import to_device


def keyed_generator(key: str) -> torch.Generator:
    """A CPU generator that depends on `key` alone: on no rank, no layout, and no draw before."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def keyed_normal(keys: Sequence[str], shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Standard normal numbers, fp32 [len(keys), *shape], drawn on `device`.

    Each row depends on its own key alone, and its element i in raster order on the key and i: the same bits on CPUs and
    GPUs, and no host wait. 128 bits of the key's hash choose the stream (`titan_kernels.philox`).
    """
    digests = [hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys]
    streams = [struct.unpack(">qq", digest) for digest in digests]
    streams_B2 = torch.tensor(streams, dtype=torch.int64, device="cpu").view(len(keys), 2)
    return philox_normal(to_device(streams_B2, device), math.prod(shape)).view(len(keys), *shape)
