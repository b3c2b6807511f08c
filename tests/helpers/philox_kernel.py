"""The Triton kernel of the normal generator against published words and its twin, wherever Triton runs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from titan_kernels import philox, triton_kernels
from titan_kernels.normal import philox_words
from torch import Tensor

# Key, counter (lowest word first) and words of Random123's kat_vectors, philox4x32 with 10 rounds.
PUBLISHED = [
    ((0,) * 2, (0,) * 4, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 2, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
KEYS = [(1, 2), (-3, 4), (2**62, -(2**63)), (0, 0), (-1, -1)]


@triton.jit
def _words_kernel(given, out, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)
    key = tl.load(given + 3 * row).to(tl.uint64, bitcast=True)
    high = tl.load(given + 3 * row + 1).to(tl.uint64, bitcast=True)
    low = tl.load(given + 3 * row + 2).to(tl.uint64, bitcast=True)
    word_0, word_1, word_2, word_3 = philox_words(key, high, low)
    tl.store(out + 4 * row, word_0.to(tl.int64))
    tl.store(out + 4 * row + 1, word_1.to(tl.int64))
    tl.store(out + 4 * row + 2, word_2.to(tl.int64))
    tl.store(out + 4 * row + 3, word_3.to(tl.int64))


def _signed(low: int, high: int) -> int:
    value = low | high << 32
    return value - 2**64 if value >= 2**63 else value


def check_published_words(device: str) -> None:
    rows = [(_signed(*key), _signed(*counter[2:]), _signed(*counter[:2])) for key, counter, _ in PUBLISHED]
    given = torch.tensor([*rows, rows[-1]], device=device)  # Triton counts in powers of two
    out = torch.empty(4, 4, dtype=torch.int64, device=device)
    _words_kernel[(1,)](given, out, SIZE=4)
    assert [tuple(row) for row in out.tolist()][:3] == [words for _, _, words in PUBLISHED]


def check_bits(num_elements: int, device: str, keys: list[tuple[int, int]] = KEYS) -> None:
    """The kernel's normals are the twin's, bit for bit."""
    keys_B2 = torch.tensor(keys, device=device)
    actual = triton_kernels.philox_normal(keys_B2, num_elements)
    expected = philox.philox_normal(keys_B2, num_elements)
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    assert torch.equal(_bits(actual), _bits(expected))


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)
