"""Launch settings of the attention kernels: the candidates worth timing, and the choice for each shape.

The space is pipeline stages 1-6 x warps 4/8 x rows fetched by pointers or by the copy engine (TMA) x a register limit x
one program per block or persistent programs x scores ahead or in textbook order. `KEPT` leaves out candidates that
spill in their loop, that leave no room for a second program without a reason, or that are the same machine code as
another (docs/kernels.md, `benchmarks.kernel_builds`).

On a GPU the first launch of a shape times its candidates and keeps the fastest for the life of the process. A shape is
known by what changes the balance between loading and computing: head dim, dtype, block sizes, heads, and the density of
the lists in steps of a factor of sqrt(2). Candidates do the same arithmetic in the same order: they
differ in time only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from titan_kernels.layout import Tiles

_EXACT, _SPLIT = "ieee", "bf16x3"
"""Products of fp32 numbers: exact, without matrix units; or of two bf16 parts each (three products; the parts that are
left out are 2^-16 of the numbers)."""

_MOST_ROWS = {(torch.float32, _EXACT): (32, 32), (torch.float32, _SPLIT): (64, 64)}
"""Rows of a block of queries and of keys, for types other than 16-bit ones: exact fp32 products in blocks of 64 x 64
unroll to 12,840 instructions that spill 10 KB."""


@dataclass(frozen=True)
class Candidate:
    """One way to build a kernel.

    Attributes:
        warps, stages: Triton's.
        tma: fetch rows by the copy engine; Hopper and later.
        registers: limit per thread, so that another program fits beside; None for the compiler's choice.
        persistent: programs per multiprocessor that walk over all blocks (forward only); 0: one program per block.
        ahead: compute scores one tile ahead; otherwise in the textbook order (forward only).
        reason: for timing it.
    """

    warps: int
    stages: int
    tma: bool = False
    registers: int | None = None
    persistent: int = 0
    ahead: bool = True
    reason: str = ""

    def __str__(self) -> str:
        rows = "TMA" if self.tma else "pointers"
        persistent = f", {self.persistent} resident" if self.persistent else ""
        limit = "" if self.registers is None else f", {self.registers} registers"
        order = "" if self.ahead else ", textbook order"
        return f"{self.warps} warps, {self.stages} stages, {rows}{persistent}{order}{limit}"

    @property
    def options(self) -> dict[str, Any]:
        """Triton's launch options."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


@dataclass(frozen=True)
class Shape:
    """The compile-time constants of a launch, and the other sizes that its best candidate depends on."""

    head_dim: int
    dtype: torch.dtype
    block_m: int
    block_n: int
    q_chunks: int
    kv_chunks: int
    num_heads: int
    density: int
    precision: str = _EXACT

    @classmethod
    def of(cls, q_BLHD: Tensor, lists_BHNK: Tensor, q_tiles: Tiles, kv_tiles: Tiles, exact: bool = True) -> Shape:
        # Triton's interpreter knows exact products only.
        precision = _EXACT if exact or q_BLHD.dtype != torch.float32 or not q_BLHD.is_cuda else _SPLIT
        most_m, most_n = _MOST_ROWS.get((q_BLHD.dtype, precision), (128, 64))
        block_m, block_n = _block(q_tiles.longest, most_m), _block(kv_tiles.longest, most_n)
        return cls(
            q_BLHD.shape[-1],
            q_BLHD.dtype,
            block_m,
            block_n,
            -(-q_tiles.longest // block_m),
            -(-kv_tiles.longest // block_n),
            q_BLHD.shape[2],
            round(2 * math.log2(len(kv_tiles.start) / lists_BHNK.shape[-1])),
            precision,
        )

    def of_keys(self, q_tiles: Tiles, kv_tiles: Tiles) -> Shape:
        """The same launch in the smaller blocks of dK/dV: two accumulators leave no registers for more."""
        most = 32 if self.dtype == torch.float32 else 64
        block_m, block_n = min(self.block_m, most), min(self.block_n, most)
        q_chunks, kv_chunks = -(-q_tiles.longest // block_m), -(-kv_tiles.longest // block_n)
        return replace(self, block_m=block_m, block_n=block_n, q_chunks=q_chunks, kv_chunks=kv_chunks)

    @property
    def constants(self) -> dict[str, int | str]:
        """Compile-time arguments that the attention kernels share."""
        return {
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": _block(self.head_dim, self.head_dim * 2),
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "Q_CHUNKS": self.q_chunks,
            "KV_CHUNKS": self.kv_chunks,
            "PRECISION": self.precision,
        }


def _block(size: int, most: int) -> int:
    # Matrix units multiply 16 rows at least.
    return min(max(16, triton.next_power_of_2(size)), most)


_TWO_PROGRAMS = "two programs on a multiprocessor, one computing while the other waits"
_FOUR_PROGRAMS = "four programs on a multiprocessor: others compute while one waits for its only buffers"
_DEEPER = "one more tile in flight, for lists that miss the L2"
_ANYWHERE = "no TMA: before Hopper, strided inputs, head dims between powers of two"
_RESIDENT = "programs that stay: a block's first loads wait for no launch"
_NO_MATRIX_UNITS = "exact fp32 products: with 4 warps the unrolled sums spill"
_NO_MATRIX_UNITS_JVP = "exact fp32 products: 4 warps spill 5,000 bytes, 8 warps without prefetching 224"
_PARTS = "products of bf16 parts: with 4 warps the parts of the query block spill 472 to 776 bytes"

KEPT: dict[tuple[str, int, int], tuple[Candidate, ...]] = {
    ("forward", 64, 16): (
        Candidate(4, 2, True, reason=_TWO_PROGRAMS),
        Candidate(4, 1, True, 128, ahead=False, reason=_FOUR_PROGRAMS),
        Candidate(4, 1, True, reason="three programs instead of prefetching"),
        Candidate(4, 2, True, persistent=2, reason=_RESIDENT),
        Candidate(4, 2, reason=_ANYWHERE),
        Candidate(4, 1, reason="the same where shared memory is short"),
    ),
    ("forward", 128, 16): (
        Candidate(8, 2, True, reason="half the traffic of 64 rows; two warpgroups of one program"),
        Candidate(8, 1, True, 128, ahead=False, reason="two programs of 128 rows: half the traffic of four of 64"),
        Candidate(8, 3, True, reason=_DEEPER),
        Candidate(8, 2, True, persistent=1, reason=_RESIDENT),
        Candidate(8, 2, reason=_ANYWHERE),
        Candidate(8, 3, reason=_DEEPER),
    ),
    ("grad_q", 64, 16): (
        Candidate(4, 2, True, reason=_TWO_PROGRAMS),
        Candidate(4, 2, reason=_ANYWHERE),
        Candidate(4, 1, reason="the same where shared memory is short"),
    ),
    ("grad_q", 128, 16): (
        Candidate(8, 2, True, reason="half the traffic of 64 rows; two warpgroups of one program"),
        Candidate(8, 3, True, reason=_DEEPER),
        Candidate(8, 2, reason=_ANYWHERE),
    ),
    ("grad_kv", 64, 16): (
        Candidate(4, 2, True, reason=_TWO_PROGRAMS),
        Candidate(8, 3, True, reason="both accumulators over two warpgroups, one more tile in flight"),
        Candidate(8, 2, reason=_ANYWHERE),
    ),
    ("jvp", 128, 16): (
        Candidate(8, 2, True, reason="128 queries: half the traffic of 64; one program of two warpgroups"),
        Candidate(4, 1, True, reason="64 queries: two programs instead of prefetching"),
        Candidate(8, 2, reason=_ANYWHERE),
    ),
    ("forward", 32, 32): (Candidate(8, 1, reason=_NO_MATRIX_UNITS),),
    ("grad_q", 32, 32): (Candidate(8, 1, reason=_NO_MATRIX_UNITS),),
    ("grad_kv", 32, 32): (Candidate(8, 1, reason=_NO_MATRIX_UNITS),),
    ("forward", 64, 32): (Candidate(8, 1, reason=_PARTS),),
    ("grad_q", 64, 32): (
        Candidate(8, 1, reason=_PARTS),
        Candidate(16, 1, reason="Blackwell: 8 warps ask for 576 of 512 columns of tensor memory; these spill 2.7 KB"),
    ),
    ("jvp", 16, 32): (Candidate(8, 2, reason=_NO_MATRIX_UNITS_JVP),),
}
"""By kernel, most rows of a query block and bits of a number. Where nothing may be timed, the first runs for which the
GPU has the memory."""


def candidates(kernel: str, rows: int, dtype: torch.dtype, tma: bool) -> list[Candidate]:
    """Candidates for blocks of `rows` queries; without `tma`, only those that fetch rows by pointers."""
    bits = 8 * dtype.itemsize
    kept = next(kept for (name, most, width), kept in KEPT.items() if (name, width) == (kernel, bits) and rows <= most)
    return [candidate for candidate in kept if tma or not candidate.tma]


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_may_time = True


@contextmanager
def timing(allowed: bool) -> Iterator[None]:
    """Within the block launches may be timed or not, on every thread: autograd runs CUDA's backward on its own."""
    global _may_time
    before, _may_time = _may_time, allowed
    try:
        yield
    finally:
        _may_time = before


def untimed() -> AbstractContextManager[None]:
    """Within the block every launch of the process takes its first candidate."""
    return timing(False)


Observer = Callable[[str, Candidate, float | Exception], None]
"""Takes a kernel's name, a candidate, and its milliseconds or the reason why it has none."""

_observer: Observer | None = None
"""One for the process, not for a context: autograd runs backwards on threads of its own."""


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Times the candidates of every launch within the block, known shapes included, and tells `observer` of each."""
    global _observer
    _observer = observer
    try:
        yield
    finally:
        _observer = None


_fastest: dict[tuple, Candidate] = {}


def launch(kernel: str, shape: Shape, start: Callable[[Candidate], None], *, tma: bool) -> None:
    """Starts `kernel` with the fastest candidate for `shape`; the first time, finds out which that is.

    Launches are repeated for that, so `start` must overwrite its outputs whole. Nothing is timed on CPUs (Triton's
    interpreter), during graph capture, or within `untimed`: the first candidate for which this GPU has the memory runs.
    """
    kept = candidates(kernel, shape.block_m, shape.dtype, tma)
    if len(kept) == 1 or not _may_time or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return _start_first_that_fits(kept, start)
    key = (kernel, shape, tma, torch.cuda.current_device())
    if key not in _fastest or _observer is not None:
        _fastest[key] = min(kept, key=lambda candidate: _milliseconds(kernel, start, candidate))
    start(_fastest[key])


def _start_first_that_fits(kept: list[Candidate], start: Callable[[Candidate], None]) -> None:
    *larger, last = kept
    for candidate in larger:
        try:
            return start(candidate)
        except OutOfResources:  # before anything ran: too little shared memory, or Blackwell's tensor memory
            pass
    start(last)


def _milliseconds(kernel: str, start: Callable[[Candidate], None], candidate: Candidate) -> float:
    try:
        milliseconds = triton.testing.do_bench(lambda: start(candidate), warmup=10, rep=50, return_mode="median")
    except Exception as error:
        # OutOfResources: this GPU has less shared or tensor memory than the GPUs that the list was made for.
        if _observer is None and not isinstance(error, OutOfResources):
            raise
        if _observer is not None:
            _observer(kernel, candidate, error)
        return math.inf
    if _observer is not None:
        _observer(kernel, candidate, milliseconds)
    return milliseconds
