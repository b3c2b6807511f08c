"""Counter-based normal numbers, the same to the last bit on CPUs and GPUs: Philox 4x32-10 and Box-Muller in fp32.

A counter-based generator has no state: it encrypts a counter with a key, and the cipher is the random number (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Any element of any stream can be computed anywhere, so a
sample's noise depends on no device, no split into blocks, and no draw before it. Call `i` of a stream encrypts the
128-bit counter (high half of the stream, i) with the 64-bit key of the stream and gives elements 4 i to 4 i + 3.

Integers agree by definition. Floating-point numbers agree because nothing here calls a library's logarithm or sine:
each step is a conversion, a sum, a product, a quotient or a square root of fp32 numbers, which IEEE 754 rounds in one
way, and the Triton kernel (`normal.py`) does them in the same order without fusing a product into a sum.

Two words (x, y) of a call make two normals, the first two words elements 4 i and 4 i + 1:

    u = 2^-32 x + 2^-33, in (0, 1]              radius = sqrt(-2 ln u), at most sqrt(66 ln 2) = 6.7637
    t = 2^-31 (2 y mod 2^32, as signed), in [-1, 1]     (radius cos(pi t / 2), negated if y's top bit is set;
                                                         radius sin(pi t / 2))

This is Box-Muller: t and the sign are a uniform direction. The polynomials are minimax fits of ours. They keep the
results within 2e-6 of exact arithmetic on the same u and t.

This file is the plain twin, for CPUs: numpy in blocks that stay in a core's cache (int64 products take torch twice as
long). It makes about 1e8 numbers per second and core.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
"""Added to the two words of the key between rounds."""

# Polynomials in the order of their powers; all numbers are exact in fp32.
MINUS_2_LN_2 = -1.3862943649291992
LOG = (-4.0, -1.333336353302002, -0.7994958758354187, -0.5985130071640015)
"""-2 ln(m) = s LOG(s^2) with s = (m - 1) / (m + 1), for m from sqrt(1/2) to sqrt(2)."""
SIN = (1.5707963705062866, -0.645963728427887, 0.07968968152999878, -0.004673766437917948, 0.00015148513193707913)
"""sin(pi t / 2) = t SIN(t^2), for t from -1 to 1."""
COS = (1.0, -0.23370049893856049, 0.019968589767813683, -0.0008935099467635155, 2.3587985197082162e-05)
"""cos(pi t / 2) = (1 - t^2) COS(t^2), for t from -1 to 1."""
SQRT_HALF_BITS = 0x3F3504F3
"""sqrt(1/2) as the bits of an fp32 number."""

_LANES = 16384
"""Calls in a block: its arrays take about 1.5 MB."""

UInt64 = npt.NDArray[np.uint64]
UInt32 = npt.NDArray[np.uint32]
Float32 = npt.NDArray[np.float32]


def philox_normal(keys_B2: Tensor, num_elements: int) -> Tensor:
    """Standard normal numbers, fp32 [B, num_elements]: a row is the start of the stream that its keys name.

    Args:
        keys_B2: int64 [B, 2], read as unsigned: a stream's key, and the high half of its counter.
        num_elements: of each row, numbered from 0.
    """
    keys = keys_B2.cpu().numpy().view(np.uint64)
    num_calls = -(-num_elements // 4)
    out = torch.empty(len(keys), num_calls, 4)
    out_BC4 = out.numpy()
    num_rows = max(1, _LANES // max(1, num_calls))
    for row in range(0, len(keys), num_rows):
        rows = slice(row, row + num_rows)
        for first in range(0, num_calls, _LANES):
            calls = np.arange(first, min(first + _LANES, num_calls), dtype=np.uint64)
            words = philox(keys[rows, :1], keys[rows, 1:], calls[None])
            _box_muller(*words, out_BC4[rows, first : first + len(calls)])
    return out.flatten(1)[:, :num_elements].contiguous().to(keys_B2.device)


def philox(key: UInt64, high: UInt64, low: UInt64) -> tuple[UInt32, UInt32]:
    """Encrypt counters. The arguments are uint64 and broadcast to two dimensions [R, C].

    Returns words 0 and 2 of each call, uint32 [2, R, C], and words 1 and 3 likewise. A counter's four words and a key's
    two begin with the lowest.
    """
    shape = (2, *np.broadcast_shapes(key.shape, high.shape, low.shape))
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    multipliers, weyl = (np.array(pair, np.uint64).reshape(2, 1, 1) for pair in (MULTIPLIERS, WEYL))
    keys = np.stack([key & mask, key >> half])
    even, product, odd = np.empty(shape, np.uint64), np.empty(shape, np.uint64), np.empty(shape, np.uint64)
    even[0], even[1] = low & mask, high & mask
    odd[0], odd[1] = low >> half, high >> half
    for number in range(ROUNDS):
        round_keys = (keys + np.uint64(number) * weyl) & mask
        np.multiply(even, multipliers, out=product)
        # Upper halves of the products change places, as do the lower ones, of which the upper bits are left to mask.
        np.right_shift(product[::-1], half, out=even)
        np.bitwise_and(odd, mask, out=odd)
        np.bitwise_xor(odd, round_keys, out=odd)
        np.bitwise_xor(even, odd, out=even)
        odd, product = product[::-1], odd
    return even.astype(np.uint32), odd.astype(np.uint32)


def _box_muller(x: UInt32, y: UInt32, out_RC4: Float32) -> None:
    """Turn words, uint32 [2, R, C] each, into normals; first index pairs (0, 1) and (2, 3) of the last of `out_RC4`."""
    radius = _radius(x)
    t = (y << np.uint32(1)).view(np.int32).astype(np.float32)
    t *= np.float32(2**-31)
    square = t * t
    sine = _polynomial(SIN, square)
    sine *= t
    cosine = _polynomial(COS, square)
    cosine *= np.subtract(np.float32(1), square, out=square)
    sign = y
    sign &= np.uint32(0x80000000)
    bits = cosine.view(np.uint32)
    bits ^= sign
    for pair in range(2):
        np.multiply(radius[pair], cosine[pair], out=out_RC4[..., 2 * pair])
        np.multiply(radius[pair], sine[pair], out=out_RC4[..., 2 * pair + 1])


def _radius(x: UInt32) -> Float32:
    u = x.astype(np.float32)
    u *= np.float32(2**-32)
    u += np.float32(2**-33)
    # u = 2^exponent m: what lies above sqrt(1/2) in the bits of u are exponent and m.
    mantissa = u.view(np.int32)
    mantissa -= np.int32(SQRT_HALF_BITS)
    minus_log = (mantissa >> np.int32(23)).astype(np.float32)
    minus_log *= np.float32(MINUS_2_LN_2)
    mantissa &= np.int32(0x7FFFFF)
    mantissa += np.int32(SQRT_HALF_BITS)
    m = u
    above = m + np.float32(1)
    m -= np.float32(1)
    m /= above
    m *= _polynomial(LOG, np.multiply(m, m, out=above))
    minus_log += m
    return np.sqrt(minus_log, out=minus_log)


def _polynomial(coefficients: tuple[float, ...], x: Float32) -> Float32:
    *rest, second, last = (np.float32(c) for c in coefficients)
    total = x * last
    total += second
    for coefficient in reversed(rest):
        total *= x
        total += coefficient
    return total
