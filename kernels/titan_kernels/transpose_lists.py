"""Lists of key tiles, transposed: for each key tile the query tiles that chose it, in ascending order, by counting.

A stable sort of the entries gives the same, but moves every entry several times together with an index of eight bytes.
The keys are few and small, so each entry's place can be computed: entries of smaller tiles, entries of its tile in
earlier chunks, and entries of its tile before it in its own chunk. Inside of a chunk all pairs are compared, 256 for
each entry, in registers. One kernel counts each chunk, sums over chunks and tiles give the offsets, and a second kernel
writes each entry to its place.

Every place is written once and all numbers are integers: no atomics, the same bits in every run. Nothing waits for the
host, and all sizes follow from those of the lists.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 256
"""Entries of a program: more compare longer, fewer need more memory for counts."""

STEP = 32
"""Entries that all others of a chunk are compared with at a time."""


@triton.jit
def _counts(entries, first, num_entries, CHUNK: tl.constexpr, STEP: tl.constexpr):
    """For each entry of the chunk from `first` on: its tile, and how many entries of the chunk name this tile, in all
    and before it."""
    index = first + tl.arange(0, CHUNK)
    tile = tl.load(entries + index, mask=index < num_entries, other=-1)
    in_all = tl.zeros([CHUNK], tl.int32)
    before = tl.zeros([CHUNK], tl.int32)
    for step in range(0, CHUNK, STEP):
        other = first + step + tl.arange(0, STEP)
        same = tile[:, None] == tl.load(entries + other, mask=other < num_entries, other=-2)[None, :]
        in_all += tl.sum(same.to(tl.int32), 1)
        before += tl.sum((same & (other[None, :] < index[:, None])).to(tl.int32), 1)
    return tile, in_all, before


@triton.jit(do_not_specialize=["num_entries", "num_tiles", "num_chunks"])
def count_kernel(lists, counts, num_entries, num_tiles, num_chunks, CHUNK: tl.constexpr, STEP: tl.constexpr):
    """Entries of each tile in a chunk, into [B H, chunks, T] of zeros. Entries of one tile write the same number."""
    item = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    first = chunk * CHUNK
    tile, in_all, _ = _counts(lists + item * num_entries, first, num_entries, CHUNK, STEP)
    valid = first + tl.arange(0, CHUNK) < num_entries
    tl.store(counts + (item * num_chunks + chunk) * num_tiles + tile, in_all, mask=valid)


@triton.jit(do_not_specialize=["num_entries", "num_listed", "num_tiles", "num_chunks"])
def place_kernel(
    lists,
    sums,
    offset,
    chosen_by,
    num_entries,
    num_listed,
    num_tiles,
    num_chunks,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Writes the query tile of each entry to its place. `sums` are counts summed up to and with each chunk."""
    item = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    first = chunk * CHUNK
    tile, _, before = _counts(lists + item * num_entries, first, num_entries, CHUNK, STEP)
    index = first + tl.arange(0, CHUNK)
    valid = index < num_entries
    earlier = tl.load(sums + (item * num_chunks + chunk - 1) * num_tiles + tile, mask=valid & (chunk > 0), other=0)
    place = tl.load(offset + item * (num_tiles + 1) + tile, mask=valid, other=0) + earlier + before
    tl.store(chosen_by + item * num_entries + place, index // num_listed, mask=valid)


def transpose_lists(lists_BHNK: Tensor, num_tiles: int) -> tuple[Tensor, Tensor]:
    """As `reference.transpose_lists`; a list may name a tile more than once."""
    batch, heads, num_queries, num_listed = lists_BHNK.shape
    lists, num_entries = lists_BHNK.contiguous(), num_queries * num_listed
    num_chunks = triton.cdiv(num_entries, CHUNK)
    sums = torch.zeros((batch, heads, num_chunks, num_tiles), dtype=torch.int32, device=lists.device)
    # Triton's interpreter pays for each operation, not for its size.
    numbers, blocks = (num_tiles, num_chunks), {"CHUNK": CHUNK, "STEP": STEP if lists.is_cuda else CHUNK}
    grid = (batch * heads * num_chunks,)
    count_kernel[grid](lists, sums, num_entries, *numbers, **blocks)
    sums.cumsum_(2)
    offset = torch.nn.functional.pad(sums[:, :, -1].cumsum(-1, dtype=torch.int32), (1, 0))
    chosen_by = torch.empty((batch, heads, num_entries), dtype=torch.int32, device=lists.device)
    place_kernel[grid](lists, sums, offset, chosen_by, num_entries, num_listed, *numbers, **blocks)
    return offset, chosen_by
