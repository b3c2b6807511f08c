"""Random generators named by what they are for."""

from __future__ import annotations

import hashlib

import torch


def keyed_generator(key: str) -> torch.Generator:
    """A CPU generator that depends on ``key`` alone: on no rank, no layout, and no draw before."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
