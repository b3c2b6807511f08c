"""Checks of tensors that `titan_distill.parallelisms.pinned` has laid out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from titan_distill.parallelisms.pinned import ALIGNMENT_BYTES


def assert_exact_slabs(tensors: Sequence[Tensor]) -> None:
    """Tensors of a dtype lie one behind the other with no more between them than aligns them, and share nothing."""
    for dtype in {tensor.dtype for tensor in tensors}:
        parts = sorted((t.data_ptr(), t.numel() * t.itemsize) for t in tensors if t.dtype == dtype and t.numel())
        assert all(start % ALIGNMENT_BYTES == 0 for start, _ in parts)
        for (start, num_bytes), (following, _) in itertools.pairwise(parts):
            assert start + num_bytes <= following < start + num_bytes + ALIGNMENT_BYTES
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize for tensor in tensors)
