"""Parts that need torch, Triton and `titan_kernels` only: ceilings, correctness in bf16, and timings of attention."""

from __future__ import annotations

import functools
import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before CUDA starts: deterministic mode refuses matrix products without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import titan_kernels
import torch
import torch.nn.functional as F
from titan_kernels import tile_layout, tuning, video_sparse_attention
from titan_kernels.layout import DEFAULT_TILE
from vsa_oracle import NAMES, Oracle, error, random_inputs, run

from benchmarks import attention, compiled_cache, gpu_checks, transposed_lists
from benchmarks.attention import DTYPE, Case, Clock, Grid
from benchmarks.gpu_suite.worker import Cases, Context, Row
from benchmarks.launches import JVP, SHORT_TILE, WAN_480P, WAN_720P, WHOLE_TILES
from benchmarks.machine import machine

TOY_GRID = (5, 10, 14)
TOLERANCE = {"cuda": 1e-2, "cpu": 1e-5}
JVP_TOLERANCE = 1e-4
COPY_BYTES = {"cuda": 4 * 2**30, "cpu": 2**24}


def card(context: Context) -> Cases:
    """The machine, and its two ceilings."""
    device = context.device
    return {
        "loopback": lambda: [_judged(1 - gpu_checks.loopback_is_up(), 0)],
        "versions": lambda: [versions(device)],
        "compiled cache": functools.partial(use_cache, context),
        "copy": lambda: [copy_bandwidth(device)],
        "matmul": lambda: [{"tflops": ceiling(device)}],
        "clocks": lambda: [clocks(device)],
    }


def use_cache(context: Context) -> Iterator[Row]:
    """Unpacks the kernels compiled ahead of time; where there are none for this Triton, compiles in the background."""
    folder = Path(os.environ[compiled_cache.FOLDER_VARIABLE])
    differences = ["no compiled cache was given"]
    if context.cache is not None:
        installed = compiled_cache.install(context.cache, folder)
        yield {"kernels": installed.num_kernels, "hit": installed.matches, "differences": installed.differences}
        differences = installed.differences
    if differences and not context.rehearse:
        log = context.scratch / "logs" / "compile.log"
        compiled_cache.start_making(folder, max(1, (os.cpu_count() or 1) - 2), log)
        yield {"compiling": "; ".join(differences)}


def compiled_here(context: Context) -> Iterator[Row]:
    """Kernels that the cache did not hold."""
    if context.cache is not None:
        names = compiled_cache.compiled_since(Path(os.environ[compiled_cache.FOLDER_VARIABLE]))
        yield {"compiled_here": len(names), "names": ", ".join(sorted(set(names)))}


def versions(device: str) -> Row:
    """Names the card and everything that computes."""
    row: Row = {**machine(), "triton": version("triton"), "c_compiler": shutil.which("gcc") or shutil.which("cc")}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {
            "card": properties.name,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": properties.L2_cache_size / 2**20,
        }
    return row


CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")


def clocks(device: str) -> Row:
    """The card's clocks, power and temperature under load, by nvidia-smi and in its units."""
    if device != "cuda":
        return {"unavailable": "a CPU has no nvidia-smi"}
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    a = torch.randn(8192, 8192, device=device).bfloat16()
    for _ in range(1500):  # some two seconds of work, queued ahead
        torch.mm(a, a)
    values = subprocess.run(command, capture_output=True, check=True, timeout=10, encoding="utf-8").stdout.split(",")
    torch.cuda.synchronize()
    return dict(zip(CLOCKS, map(str.strip, values)))


def copy_bandwidth(device: str) -> Row:
    """TB/s of a large copy, bytes read and bytes written both counted."""
    source = torch.randint(0, 127, (COPY_BYTES[device] // 2,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    milliseconds = Clock.of(device)(lambda: target.copy_(source))
    return {"tb_per_second": 2 * source.nbytes / milliseconds / 1e9}


@functools.cache
def ceiling(device: str) -> float:
    """TFLOP/s of a large matrix product; measured once per process."""
    return attention.matmul_tflops(device, Clock.of(device))


def smoke(context: Context) -> Cases:
    """The outputs of bf16 kernels at head dim 128, against fp64."""
    device = context.device
    grids = [(5, 6, 7), (9, 9, 15)]
    cases: dict[str, Any] = {}
    for grid in grids[: 1 if context.rehearse else None]:
        cases |= {
            f"oracle {grid}, tile {tile}": functools.partial(against_oracle, device, grid, tile)
            for tile in (DEFAULT_TILE, SHORT_TILE)
        }
    full = TOY_GRID if context.rehearse else WAN_480P
    return cases | {
        "same bits twice": functools.partial(same_bits, device, TOY_GRID if context.rehearse else (13, 18, 30)),
        "all tiles against dense attention": functools.partial(against_dense, device, full),
        "jvp against fp64": functools.partial(jvp_against_fp64, device),
        "rms_norm, forward mode": lambda: [_judged(gpu_checks.rms_norm_jvp_error(device), JVP_TOLERANCE)],
    }


def _judged(worst: float, limit: float, **others: Any) -> Row:
    row = {"error": worst, "limit": limit, "right": worst <= limit, **others}
    return row if row["right"] else row | {"failure": "wrong", "text": f"an error of {worst:.3g}, limit {limit:.3g}"}


def against_oracle(device: str, grid: Grid, tile: Grid) -> Iterator[Row]:
    """Output and gradients against the dense-mask definition in fp64: worst relative distance."""
    oracle, layout = Oracle(grid, tile, device=device), tile_layout(grid, tile, device)
    inputs, grad = random_inputs(grid, 2, 128, DTYPE[device], device=device)
    topk = 1 + layout.num_tiles // 3
    with tuning.untimed():
        actual = run(video_sparse_attention, layout, inputs, grad, topk)
    errors = dict(zip(NAMES, map(error, actual, oracle(inputs, grad, topk))))
    # NaN is the worst of all, and `max` alone would lose it.
    worst = max(errors.values(), key=lambda value: float("inf") if value != value else value)
    yield _judged(worst, TOLERANCE[device], **errors)


def same_bits(device: str, grid: Grid) -> Iterator[Row]:
    """Two runs on the same inputs, compared bit by bit."""
    layout = tile_layout(grid, device=device)
    inputs, grad = random_inputs(grid, 4, 128, DTYPE[device], device=device)
    with tuning.untimed():
        first, second = (run(video_sparse_attention, layout, inputs, grad, 1 + layout.num_tiles // 8) for _ in "ab")
    different = [name for name, one, other in zip(NAMES, first, second) if not torch.equal(one, other)]
    yield _judged(len(different), 0, different=different)


def against_dense(device: str, grid: Grid) -> Iterator[Row]:
    """With every tile listed, sparse attention is dense attention."""
    layout = tile_layout(grid, device=device)
    inputs, grad = random_inputs(grid, 2, 128, DTYPE[device], device=device)

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    with tuning.untimed():
        actual = run(video_sparse_attention, layout, inputs[:3], grad, layout.num_tiles)
    errors = list(map(error, actual, run(dense, layout, inputs[:3], grad, 0)))
    # Both are rounded to the dtype, so their distance may be twice the distance of one.
    yield _judged(max(errors), 2 * TOLERANCE[device])


def jvp_against_fp64(device: str, num_tokens: int = 300) -> Iterator[Row]:
    """Output and tangent of the attention with its forward-mode derivative, against the fp64 derivative of a softmax
    that is written out."""
    if (attention_jvp := getattr(titan_kernels, "attention_jvp", None)) is None:
        yield {"unavailable": "titan_kernels has no attention_jvp"}
        return
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, num_tokens, 2, 128, generator=generator).to(device, DTYPE[device]) for _ in range(6)]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = (torch.einsum("blhd,bshd->bhls", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        return torch.einsum("bhls,bshd->blhd", weights, v)

    wide = tuple(x.double() for x in inputs)
    expected = torch.func.jvp(attend, wide[:3], wide[3:])
    errors = dict(zip(("out", "tangent"), map(error, attention_jvp(*inputs), expected)))
    yield _judged(max(errors.values()), TOLERANCE[device], **errors)


def lists_both_ways(context: Context, grid: Grid, heads: int) -> Cases:
    """The case that transposes lists by counting and by a sort."""
    name = f"{math.prod(grid)} tokens, {heads} heads: transposed lists"
    return {name: functools.partial(_lists_row, grid, heads, context.device)}


def _lists_row(grid: Grid, heads: int, device: str) -> Iterator[Row]:
    yield transposed_lists.measure(grid, heads, device)


def attention_720p(context: Context) -> Cases:
    """The headline: 75,600 tokens × 12 heads at 0.9, dense and sparse, in both tiles."""
    size = (TOY_GRID, 2) if context.rehearse else (WAN_720P, 12)
    return {**timings(context, headline(*size)), **lists_both_ways(context, *size)}


def attention_480p(context: Context) -> Cases:
    """32,760 tokens × 12 heads likewise, the derivative, and the shape of the public anchor."""
    jvp = Case(TOY_GRID, 1, "jvp") if context.rehearse else Case(JVP.grid, JVP.heads, "jvp")
    sizes = [*headline(WAN_480P, 12), jvp, *headline(WHOLE_TILES, 16, [DEFAULT_TILE])]
    cases = [*headline(TOY_GRID, 1, [SHORT_TILE]), jvp] if context.rehearse else sizes
    return {**timings(context, cases), "compiled cache": functools.partial(compiled_here, context)}


def attention_rest(context: Context) -> Cases:
    """Other sparsities, then 40 heads."""
    if context.rehearse:
        return timings(context, [Case(TOY_GRID, 1, "vsa", 0.5, 1)])
    others = [
        Case(grid, 12, "vsa", sparsity, 2, SHORT_TILE) for sparsity in (0.8, 0.95, 0.5) for grid in (WAN_720P, WAN_480P)
    ]
    wide = [Case(WAN_480P, 40, "sdpa cudnn"), Case(WAN_480P, 40, "vsa", 0.9, 2, SHORT_TILE)]
    return timings(context, [*others, *wide, Case(WAN_720P, 40, "vsa", 0.9, 2, SHORT_TILE)])


def headline(grid: Grid, heads: int, tiles: Iterable[Grid] = (DEFAULT_TILE, SHORT_TILE)) -> list[Case]:
    """Cases of one size at sparsity 0.9: dense by backend, every candidate, the kernels, the whole operator."""
    cases = [Case(grid, heads, kind) for kind in (*attention.BACKENDS, "dense branch")]
    for tile in tiles:
        for join in (1, 2):
            cases += [Case(grid, heads, kind, 0.9, join, tile) for kind in ("candidates", "vsa kernels", "vsa")]
    return cases


def timings(context: Context, cases: Iterable[Case]) -> Cases:
    """Cases of the attention benchmark as cases of the suite."""
    clock = functools.cache(Clock.of)

    def measured(case: Case) -> Iterator[Row]:
        x = inputs(case.grid, case.heads, context.device, case.tile)
        started = time.monotonic()
        for row in attention.measure_case(case, x, ceiling(context.device), clock(context.device)):
            yield row | {"seconds": round(time.monotonic() - started, 2)}

    return {str(case): functools.partial(measured, case) for case in cases}


@functools.lru_cache(maxsize=1)
def inputs(grid: Grid, heads: int, device: str, tile: Grid) -> attention.Tensors:
    """Random inputs, kept until those of another size are made."""
    return attention.Tensors(grid, heads, device, tile)
