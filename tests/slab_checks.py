"""What must hold of tensors that `titan_distill.parallelisms.pinned` has laid out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from titan_distill.parallelisms.pinned import ALIGNMENT_BYTES


def assert_exact_slabs(tensors: Sequence[Tensor]) -> None:
    """One storage per dtype, as large as its tensors and what aligns them; no two share an element."""
    for dtype in {tensor.dtype for tensor in tensors}:
        of_dtype = [tensor for tensor in tensors if tensor.dtype == dtype]
        (storage,) = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in of_dtype}.values()
        num_bytes = [tensor.numel() * tensor.itemsize for tensor in of_dtype]
        assert sum(num_bytes) <= storage.nbytes() < sum(num_bytes) + ALIGNMENT_BYTES * len(of_dtype)
        starts = sorted((t.data_ptr(), size) for t, size in zip(of_dtype, num_bytes, strict=True) if size)
        assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(starts))
        assert all(start % ALIGNMENT_BYTES == 0 for start, _ in starts)
