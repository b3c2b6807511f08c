"""The counter-based normal generator: published words, a definition in integers and fp64, and no dependence on blocks.

The Triton kernel is compared with this twin in tests/helpers/kernels_in_interpreter.py and, on a GPU, in tests/gpu.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
from mutants import is_caught
from titan_kernels import philox, philox_normal
from torch import Tensor

# Random123 (Salmon et al. 2011), kat_vectors, philox4x32 with 10 rounds. Digits are those of pi.
ONES = 2**64 - 1
PUBLISHED = {
    (0, 0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    (ONES, ONES, ONES): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    (0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88): (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
}
"""Key, high half and low half of the counter, and the four words."""


def words(key: int, high: int, low: int) -> tuple[int, ...]:
    even, odd = philox.philox(*(np.array([[value]], np.uint64) for value in (key, high, low)))
    return tuple(int(x) for pair in range(2) for x in (even[pair, 0, 0], odd[pair, 0, 0]))


def defined_words(key: int, high: int, low: int) -> list[int]:
    """Section 3.3 of the paper, in Python's integers."""
    mask = 2**32 - 1
    c = [low & mask, low >> 32, high & mask, high >> 32]
    k = [key & mask, key >> 32]
    for _ in range(10):
        one, other = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [other >> 32 ^ c[1] ^ k[0], other & mask, one >> 32 ^ c[3] ^ k[1], one & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def defined_pair(x: int, y: int) -> tuple[float, float]:
    """Box-Muller of two words in fp64."""
    radius = math.sqrt(-2 * math.log(float(np.float32(x) * np.float32(2**-32) + np.float32(2**-33))))
    angle = math.pi / 2 * (2 * y % 2**32 - (2**32 if y & 2**30 else 0)) * 2**-31
    return radius * math.cos(angle) * (-1 if y >> 31 else 1), radius * math.sin(angle)


def defined(key: int, high: int, element: int) -> float:
    call = defined_words(key, high, element // 4)
    pair = element % 4 // 2
    return defined_pair(call[2 * pair], call[2 * pair + 1])[element % 2]


def streams(*rows: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.array(rows, np.uint64).view(np.int64))


@pytest.mark.parametrize("counter", PUBLISHED)
def test_words_are_the_published_ones(counter):
    assert words(*counter) == PUBLISHED[counter] == tuple(defined_words(*counter))


def test_every_bit_of_key_and_counter_counts():
    seen = {words(1 << bit, 0, 0) for bit in range(64)} | {words(0, 1 << bit, 0) for bit in range(64)}
    seen |= {words(0, 0, 1 << bit) for bit in range(64)} | {words(0, 0, 0)}
    assert len(seen) == 3 * 64 + 1


def check_definition() -> None:
    """Elements on both sides of every edge between blocks, of streams that need all bits of keys."""
    rows = [(3, 5), (2**64 - 7, 2**63 + 11), (2**31, 2**32)]
    with patch.object(philox, "_LANES", 8):
        drawn = philox_normal(streams(*rows), 99)
    expected = [[defined(key, high, element) for element in range(99)] for key, high in rows]
    assert drawn.dtype == torch.float32 and drawn.shape == (3, 99)
    torch.testing.assert_close(drawn.double(), torch.tensor(expected, dtype=torch.float64), atol=2e-6, rtol=0)


def test_normals_are_their_definition():
    check_definition()


ORIGINAL = philox.philox
COUNTER_MUTANTS: dict[str, Callable] = {
    "one ahead": lambda key, high, low: ORIGINAL(key, high, low + np.uint64(1)),
    "one ahead after the first block": lambda key, high, low: ORIGINAL(key, high, low + np.uint64(low.min() > 0)),
    "every block from 0": lambda key, high, low: ORIGINAL(key, high, low - low.min()),
    "halves swapped": lambda key, high, low: ORIGINAL(key, low, high),
    "31 bits of the key": lambda key, high, low: ORIGINAL(key & np.uint64(2**31 - 1), high, low),
    "high half ignored": lambda key, high, low: ORIGINAL(key, np.zeros_like(high), low),
}


@pytest.mark.parametrize("name", COUNTER_MUTANTS)
def test_mutant_of_the_counter_is_caught(name):
    assert is_caught(check_definition, patch.object(philox, "philox", COUNTER_MUTANTS[name]))


def test_edges_of_box_muller():
    """Words at which a logarithm, a quadrant or a rounding changes, and the largest radius."""
    edges = [0, 1, 2, 127, 128, 129, 2**24, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 0xB504F333, 0xB504F334]
    edges += [3 << 30, (3 << 30) - 1, 2**32 - 257, 2**32 - 129, 2**32 - 128, 2**32 - 2, 2**32 - 1]
    pairs = [(x, y) for x in edges for y in edges]
    x, y = (np.array([part, part], np.uint32)[:, None] for part in zip(*pairs, strict=True))
    out = np.empty((1, len(pairs), 4), np.float32)
    philox._box_muller(x.copy(), y.copy(), out)
    expected = np.array([defined_pair(*pair) for pair in pairs])
    assert np.abs(out[0] - np.tile(expected, 2)).max() < 2e-6
    assert np.abs(out).max() <= 6.76379 and np.abs(out).max() > 6.7637


@pytest.mark.parametrize("num_elements", [0, 1, 2, 3, 4, 5, 31, 32, 33, 67])
@pytest.mark.parametrize("lanes", [1, 8, 16384])
def test_an_element_depends_on_key_and_index_only(num_elements, lanes):
    keys = streams(*((n, n * n) for n in range(7)))
    whole = philox_normal(keys, 100)
    with patch.object(philox, "_LANES", lanes):
        assert torch.equal(philox_normal(keys, num_elements), whole[:, :num_elements])
        assert torch.equal(philox_normal(keys.flip(0)[2:4], num_elements), whole.flip(0)[2:4, :num_elements])
    assert philox_normal(keys[:0], num_elements).shape == (0, num_elements)


def test_law_of_the_normals():
    """Against the standard normal: Kolmogorov-Smirnov, and moments within five deviations of their estimates."""
    n = 2_000_000
    x = philox_normal(streams((1, 2)), n)[0].double()
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96), 6: (15, 10170)}.items():
        assert abs(float((x**power).mean()) - moment) < 5 * math.sqrt(variance / n), power
    cdf = torch.special.ndtr(x.sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max(float((steps[1:] - cdf).max()), float((cdf - steps[:-1]).max()))
    assert distance * math.sqrt(n) < 1.95  # p = 0.001
    for lag in (1, 2, 3, 4, 8, 65536):
        assert abs(float((x[lag:] * x[:-lag]).mean())) < 5 / math.sqrt(n), lag
        assert abs(float((x[lag:] ** 2 * x[:-lag] ** 2).mean()) - 1) < 5 * math.sqrt(8 / n), lag


def test_neighbouring_streams_are_uncorrelated():
    """Keys and high halves that differ in one bit, or by one."""
    starts = [(0, 0)] + [(1 << bit, 0) for bit in range(64)] + [(0, 1 << bit) for bit in range(64)]
    starts += [(n, 0) for n in (3, 5, 6, 7)] + [(ONES, 0), (0, ONES), (ONES, ONES)]
    x = philox_normal(streams(*starts), 4096).double()
    size = len(starts)
    for values in (x, x**2 - 1):
        off = torch.corrcoef(values)[~torch.eye(size, dtype=torch.bool)]
        assert off.abs().max() < 6 / math.sqrt(4096)
        assert float((off**2).mean() * 4096) == pytest.approx(1, abs=0.1)  # as many products of either sign and size


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_compiled_arithmetic_is_that_of_ieee_754():
    """No fused product, no approximate quotient or root: what makes a GPU's bits those of the twin."""
    from titan_kernels import normal
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"keys": "*i64", "out": "*fp32", "num_elements": "i32", "BLOCK": "constexpr"}
    source = ASTSource(normal._philox_normal_kernel, signature, {(3,): 128})
    ptx = build(source, target=GPUTarget("cuda", 90, 32), options=normal.OPTIONS).asm["ptx"]
    found = {word for line in ptx.splitlines() for word in line.split()[:1] if ".f32" in word}
    rounded = {f"{name}.rn.f32" for name in ("add", "sub", "mul", "div", "sqrt")}
    assert found == rounded | {"cvt.rn.f32.u32", "cvt.rn.f32.s32"}, found
