"""The kernel of `philox`: the same words and the same normals, one call of the generator per lane.

Products must not be fused into sums, or results would differ from the twin's in the last bit: the launch says so to
Triton, which says so to ptxas. Quotients and square roots are the correctly rounded ones.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_kernels import philox

_ROUNDS = tl.constexpr(philox.ROUNDS)
_MULTIPLIER_0, _MULTIPLIER_1 = (tl.constexpr(value) for value in philox.MULTIPLIERS)
_WEYL_0, _WEYL_1 = (tl.constexpr(value) for value in philox.WEYL)
_SQRT_HALF_BITS = tl.constexpr(philox.SQRT_HALF_BITS)
_MINUS_2_LN_2 = tl.constexpr(philox.MINUS_2_LN_2)
_LOG_0, _LOG_1, _LOG_2, _LOG_3 = (tl.constexpr(value) for value in philox.LOG)
_SIN_0, _SIN_1, _SIN_2, _SIN_3, _SIN_4 = (tl.constexpr(value) for value in philox.SIN)
_COS_0, _COS_1, _COS_2, _COS_3, _COS_4 = (tl.constexpr(value) for value in philox.COS)
_BLOCK = 512
OPTIONS = {"enable_fp_fusion": False}
"""Launch options: products are not fused, see above."""


@triton.jit
def philox_words(key, high, low):
    """The four words of the calls `low`; all three are uint64 and broadcast."""
    key_0, key_1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    word_0, word_1 = low.to(tl.uint32), (low >> 32).to(tl.uint32)
    word_2, word_3 = high.to(tl.uint32), (high >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        upper_0, upper_2 = tl.umulhi(word_0, _MULTIPLIER_0), tl.umulhi(word_2, _MULTIPLIER_1)
        lower_0, lower_2 = word_0 * _MULTIPLIER_0, word_2 * _MULTIPLIER_1
        word_0, word_1 = upper_2 ^ word_1 ^ key_0, lower_2
        word_2, word_3 = upper_0 ^ word_3 ^ key_1, lower_0
        key_0, key_1 = key_0 + _WEYL_0, key_1 + _WEYL_1
    return word_0, word_1, word_2, word_3


@triton.jit
def _box_muller(x, y):
    u = x.to(tl.float32) * (2.0**-32) + (2.0**-33)
    bits = u.to(tl.int32, bitcast=True) - _SQRT_HALF_BITS
    m = ((bits & 0x7FFFFF) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1.0, m + 1.0)
    square = s * s
    log = ((_LOG_3 * square + _LOG_2) * square + _LOG_1) * square + _LOG_0
    radius = tl.sqrt_rn((bits >> 23).to(tl.float32) * _MINUS_2_LN_2 + s * log)
    t = (y << 1).to(tl.int32, bitcast=True).to(tl.float32) * (2.0**-31)
    square = t * t
    sine = ((((_SIN_4 * square + _SIN_3) * square + _SIN_2) * square + _SIN_1) * square + _SIN_0) * t
    cosine = (((_COS_4 * square + _COS_3) * square + _COS_2) * square + _COS_1) * square + _COS_0
    cosine *= 1.0 - square
    cosine = (cosine.to(tl.uint32, bitcast=True) ^ (y & 0x80000000)).to(tl.float32, bitcast=True)
    return radius * cosine, radius * sine


@triton.jit(do_not_specialize=["num_elements"])
def _philox_normal_kernel(keys, out, num_elements, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    call = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + 2 * row).to(tl.uint64, bitcast=True)
    high = tl.load(keys + 2 * row + 1).to(tl.uint64, bitcast=True)
    word_0, word_1, word_2, word_3 = philox_words(key, high, call.to(tl.uint64))
    normal_0, normal_1 = _box_muller(word_0, word_1)
    normal_2, normal_3 = _box_muller(word_2, word_3)
    element = 4 * call
    out += row * num_elements + element
    tl.store(out, normal_0, mask=element < num_elements)
    tl.store(out + 1, normal_1, mask=element + 1 < num_elements)
    tl.store(out + 2, normal_2, mask=element + 2 < num_elements)
    tl.store(out + 3, normal_3, mask=element + 3 < num_elements)


def philox_normal(keys_B2: Tensor, num_elements: int) -> Tensor:
    """As `philox.philox_normal`, in one launch."""
    out = torch.empty(len(keys_B2), num_elements, device=keys_B2.device)
    if out.numel():
        grid = (triton.cdiv(num_elements, 4 * _BLOCK), len(keys_B2))
        _philox_normal_kernel[grid](keys_B2.contiguous(), out, num_elements, BLOCK=_BLOCK, **OPTIONS)
    return out
