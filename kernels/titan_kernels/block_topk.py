"""The `topk` largest scores of every row, as ascending indices: exact, deterministic, and one read of the scores.

Sorting rows to keep a tenth of them wastes most of the work, and libraries return the winners in order of score. Here
a row's scores become integers of the same order, and the `topk`-th largest is found bit by bit from the top: 32 counts
of how many are at least a candidate. Scores above it are taken, scores equal to it from the left until `topk` is full,
and prefix sums say where each index goes. The row stays in registers throughout, and `topk` is a number like any other.

Shape suffixes as in `reference`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ONE_WARP = 2048
"""Scores, 64 in each thread, that one warp still holds: it counts by shuffles alone, without barriers."""

_SCORES_PER_WARP = 512
"""Scores per warp in longer rows; more would spill."""


@triton.jit(do_not_specialize=["topk"])
def _topk_kernel(scores, lists, num_tiles, topk, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    score = tl.load(scores + row * num_tiles + tile, mask=tile < num_tiles, other=0.0)
    # No score's key is 0, so what fills the block up is never taken.
    key = tl.where(tile < num_tiles, _ordered(score), 0)

    threshold = tl.zeros([], tl.uint32)
    for bit in range(32):
        candidate = threshold | (tl.full([], 1 << 31, tl.uint32) >> bit)
        enough = tl.sum((key >= candidate).to(tl.int32), 0) >= topk
        threshold = tl.where(enough, candidate, threshold)

    above = (key > threshold).to(tl.int32)
    equal = (key == threshold).to(tl.int32)
    wanted = topk - tl.sum(above, 0)
    taken = above | (equal & (tl.cumsum(equal, 0) <= wanted).to(tl.int32))
    position = tl.cumsum(taken, 0) - 1
    tl.store(lists + row * topk + position, tile, mask=taken != 0)


@triton.jit
def _ordered(score):
    """uint32 keys, at least 1, in the order of the scores: both zeros alike, NaN above everything as in torch.sort."""
    bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)
    sign, ones = tl.full([], 1 << 31, tl.uint32), tl.full([], 0xFFFFFFFF, tl.uint32)
    key = tl.where(bits >= sign, bits ^ ones, bits | sign)
    return tl.where(score != score, ones, key)


def block_topk(scores_BHNT: Tensor, topk: int) -> Tensor:
    """As `reference.block_topk`, for fp32 scores."""
    assert scores_BHNT.dtype == torch.float32, f"scores of {scores_BHNT.dtype}: keys are made of 32 bits"
    num_tiles = scores_BHNT.shape[-1]
    lists = torch.empty((*scores_BHNT.shape[:-1], topk), dtype=torch.int32, device=scores_BHNT.device)
    block = triton.next_power_of_2(num_tiles)
    num_warps = 1 if block <= _ONE_WARP else block // _SCORES_PER_WARP
    num_rows = scores_BHNT.numel() // num_tiles
    _topk_kernel[(num_rows,)](scores_BHNT.contiguous(), lists, num_tiles, topk, BLOCK=block, num_warps=num_warps)
    return lists
