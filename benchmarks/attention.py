"""Attention of one layer, dense and sparse, forward and backward: `python -m benchmarks.attention [--out FILE]`.

Measured on the token grids of Wan at 480p and 720p (81 frames) and of its 5B model:

- `sdpa ...`: PyTorch's dense attention by backend, without a coarse branch;
- `dense branch`: a sparse role below its crossover: dense attention, coarse branch and gate;
- `vsa`: `video_sparse_attention`, all of it: pooling, choice, coarse and fine branch, gate;
- `vsa kernels`: its fine branch alone, on lists that exist: the attention kernels themselves;
- `candidates`: each kept way to build each of these kernels (`titan_kernels.tuning`), by itself;
- `jvp`: dense attention with its forward-mode derivative (`titan_kernels.attention_jvp`), forward only.

*Executed* FLOPs are those of the fine attention: two matrix products forward, six with the derivative; backward five
for dense kernels and seven for ours, which are split in two to need no atomics. *Counted* products are those of the
pairs of tokens that the lists name: exact for ragged tiles, nothing for padding, pooling or the coarse branch.
*Tensor* FLOPs count whole blocks, as the matrix units compute them: ragged tiles are masked, not skipped. Sparse rows
have both rates. *Dense-equivalent* FLOPs are two and five products over all pairs: what dense attention would have had
to do. The ceiling is a large matrix product of the same dtype in the same run.

The crossover is the sparsity at which `vsa` takes as long as `dense branch`, forward and backward together, between
measured ones by a straight line. On CPUs the plain-torch twins run on small grids: a check of this file, no measure of
the kernels.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import titan_kernels
import torch
import torch.nn.functional as F
import triton
from titan_kernels import tile_layout, tuning
from titan_kernels.layout import DEFAULT_TILE
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.launches import WAN_5B, WAN_480P, WAN_720P, Grid
from benchmarks.machine import write_result

GRIDS: dict[str, list[Grid]] = {
    "cuda": [WAN_720P, WAN_480P, WAN_5B],
    "cpu": [(5, 10, 14), (4, 8, 8), (5, 6, 6)],
}
HEADS = {"cuda": [12, 40, 24], "cpu": [2, 1]}
SPARSITIES = [0.9, 0.8, 0.95, 0.5]
HEAD_DIM = {"cuda": 128, "cpu": 32}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
BACKENDS = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}
DENSE = ["dense branch", *BACKENDS]
SPARSE = ["vsa", "vsa kernels"]

FORWARD_PRODUCTS, DENSE_BACKWARD_PRODUCTS, SPLIT_BACKWARD_PRODUCTS = 2, 5, 7
JVP_PRODUCTS = 6
KERNEL_PRODUCTS = {"forward": 2, "grad_q": 3, "grad_kv": 4}
FLUSH_BYTES = 256 * 2**20
"""More than any L2 holds."""


@dataclass(frozen=True)
class Case:
    """One measurement. `sparsity` and `tiles_per_list` are None for dense attention."""

    grid: Grid
    heads: int
    kind: str
    sparsity: float | None = None
    tiles_per_list: int | None = None
    tile: Grid = DEFAULT_TILE

    def __str__(self) -> str:
        sparse = f" {self.sparsity} x{self.tiles_per_list}" if self.sparsity is not None else ""
        tile = f" {'x'.join(map(str, self.tile))}" if self.tile != DEFAULT_TILE else ""
        return f"{math.prod(self.grid)} tokens, {self.heads} heads: {self.kind}{sparse}{tile}"


def plan(grids: Sequence[Grid], heads: Sequence[int], sparsities: Sequence[float]) -> list[Case]:
    """All cases, the most important first: each size dense and at the first sparsity, then the other sparsities.

    `grids`, `heads` and `sparsities` are in order of importance; the first of heads goes over all grids first.
    """
    sizes = [(grid, num_heads) for num_heads in heads for grid in grids]
    cases = []
    for round_, sparsity in enumerate(sparsities):
        for size in sizes:
            cases += [Case(*size, kind) for kind in DENSE if not round_]
            cases += [Case(*size, kind, sparsity, join) for join in (2, 1) for kind in SPARSE]
    return cases


class Tensors:
    """Random inputs of a size, in tile order."""

    def __init__(self, grid: Grid, heads: int, device: str, tile: Grid = DEFAULT_TILE) -> None:
        self.layout = tile_layout(grid, tile, device)
        shape = (1, self.layout.num_tokens, heads, HEAD_DIM[device])
        generator = torch.Generator(device).manual_seed(0)

        def draw() -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(DTYPE[device])

        self.q, self.k, self.v, self.gate = (draw().requires_grad_() for _ in range(4))
        self.grad = draw()

    @property
    def pair_flops(self) -> int:
        """FLOPs of one matrix product, for one query token, one key token and all heads."""
        return 2 * self.q.shape[2] * self.q.shape[3]

    def topk(self, sparsity: float) -> int:
        return max(1, math.ceil((1 - Fraction(str(sparsity))) * self.layout.num_tiles))


@dataclass
class Work:
    """Calls to time, and the token pairs that they compute, averaged over heads."""

    forward: Callable[[], Any]
    backward: Callable[[], Any]
    pairs: float
    backward_products: int
    tensor_pairs: float = 0.0
    """Pairs in whole blocks: at least `pairs`, and the same where no tile is ragged. Set for sparse attention."""


def work(case: Case, x: Tensors) -> Work | str:
    """The case ready to run, or why it cannot."""
    if case.sparsity is None:
        return _dense(case.kind, x)
    topk, join = x.topk(case.sparsity), case.tiles_per_list or 1
    with torch.no_grad():
        lists = _lists(x, topk, join)
    blocks, tiles = x.layout.tiles(None, join), x.layout.tiles()
    pairs = (blocks.length * tiles.length[lists].sum(-1)).sum((0, 1)).double().sum().item() / x.q.shape[2]
    rows, columns = (triton.next_power_of_2(run.longest) for run in (blocks, tiles))
    tensor_pairs = float(len(blocks.start) * rows * topk * columns)
    if case.kind == "vsa":
        return _with_autograd(lambda: _sparse(x, topk, join), x, pairs, SPLIT_BACKWARD_PRODUCTS, tensor_pairs)
    q, k, v = (y.detach() for y in (x.q, x.k, x.v))
    out, lse = titan_kernels.ops.vsa_forward(q, k, v, lists, blocks, tiles)
    return Work(
        lambda: titan_kernels.ops.vsa_forward(q, k, v, lists, blocks, tiles),
        lambda: torch.ops.titan_kernels.vsa_backward(x.grad, q, k, v, out, lse, lists, *blocks, *tiles),
        pairs,
        SPLIT_BACKWARD_PRODUCTS,
        tensor_pairs,
    )


def _lists(x: Tensors, topk: int, join: int) -> Tensor:
    tiles = x.layout.tiles()
    pooled_q, pooled_k, _ = titan_kernels.ops.tile_pool(x.q, x.k, x.v, tiles, tiles)
    chooser = titan_kernels.attention.join_means(pooled_q, tiles.length, join)
    return titan_kernels.attention.select_tiles(chooser, pooled_k, topk)


def _sparse(x: Tensors, topk: int, join: int) -> Tensor:
    fine, coarse = titan_kernels.branches(x.q, x.k, x.v, x.layout, topk, tiles_per_list=join)
    return titan_kernels.add_coarse(fine, coarse, x.gate, x.layout.tiles())


def _dense(kind: str, x: Tensors) -> Work | str:
    by_head = [y.transpose(1, 2) for y in (x.q, x.k, x.v)]
    pairs = float(x.layout.num_tokens) ** 2
    if kind == "dense branch":

        def branch() -> Tensor:
            with sdpa_kernel([*BACKENDS.values(), SDPBackend.MATH], set_priority=True):  # cuDNN first, as in a run
                fine = F.scaled_dot_product_attention(*by_head).transpose(1, 2)
            coarse = titan_kernels.coarse_branch(x.q, x.k, x.v, x.layout)
            return titan_kernels.add_coarse(fine, coarse, x.gate, x.layout.tiles())

        return _with_autograd(branch, x, pairs, DENSE_BACKWARD_PRODUCTS)
    if not _available(kind, by_head):
        return f"PyTorch has no {kind} here"

    def sdpa() -> Tensor:
        with sdpa_kernel(BACKENDS[kind]):
            return F.scaled_dot_product_attention(*by_head).transpose(1, 2)

    return _with_autograd(sdpa, x, pairs, DENSE_BACKWARD_PRODUCTS)


def _available(kind: str, by_head: list[Tensor]) -> bool:
    if not by_head[0].is_cuda:
        return kind == "sdpa flash"
    parameters = torch.backends.cuda.SDPAParams(*by_head, None, 0.0, False, False)
    can_use = {
        "sdpa flash": torch.backends.cuda.can_use_flash_attention,
        "sdpa cudnn": torch.backends.cuda.can_use_cudnn_attention,
    }
    return can_use[kind](parameters)


def _with_autograd(
    forward: Callable[[], Tensor], x: Tensors, pairs: float, backward_products: int, tensor_pairs: float = 0.0
) -> Work:
    out = forward()
    leaves = (x.q, x.k, x.v, x.gate)

    def backward() -> Any:
        return torch.autograd.grad(out, leaves, x.grad, retain_graph=True, allow_unused=True)

    return Work(forward, backward, pairs, backward_products, tensor_pairs)


class Clock:
    """Median milliseconds of a call that finds nothing of its own in L2."""

    def __init__(self, device: str, milliseconds: float = 300, most: int = 30) -> None:
        self.device, self.milliseconds, self.most = device, milliseconds, most
        self.flush = torch.empty(FLUSH_BYTES if device == "cuda" else 1, dtype=torch.int8, device=device)

    @classmethod
    def of(cls, device: str) -> Clock:
        """The clock for a device: CPUs only check this file, with few repetitions."""
        return cls(device) if device == "cuda" else cls(device, 20, 5)

    def __call__(self, call: Callable[[], Any]) -> float:
        for _ in range(2):  # compiles, times the kernels' candidates, allocates
            call()
        first = self._once(call)
        num_calls = max(4, min(self.most, int(self.milliseconds / first)))
        return statistics.median(self._once(call) for _ in range(num_calls))

    def _once(self, call: Callable[[], Any]) -> float:
        self.flush.zero_()
        if self.device == "cpu":
            started = time.perf_counter()
            call()
            return (time.perf_counter() - started) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def matmul_tflops(device: str, clock: Clock) -> float:
    """The ceiling: a large product of random matrices of the benchmark's dtype."""
    size = 8192 if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(DTYPE[device]) for _ in range(2))
    return 2 * size**3 / clock(lambda: a @ b) / 1e9


def measure(cases: Iterable[Case], device: str, ceiling: float, clock: Clock) -> Iterator[dict[str, Any]]:
    """Yields one row per case, and one per candidate: times, rates, and shares of `ceiling`, or why there are none."""
    size, x = None, None
    for case in cases:
        if x is None or size != (case.grid, case.heads, case.tile):
            size, x = (case.grid, case.heads, case.tile), None  # released before the next is made
            x = Tensors(case.grid, case.heads, device, case.tile)
        yield from measure_case(case, x, ceiling, clock)


def measure_case(case: Case, x: Tensors, ceiling: float, clock: Clock) -> Iterator[dict[str, Any]]:
    """Yields the rows of one case, whose size and tile are those of `x`."""
    row: dict[str, Any] = {**asdict(case), "tokens": x.layout.num_tokens}
    if case.kind == "jvp":
        yield row | _jvp(x, ceiling, clock)
        return
    ready = work(case, x)
    if isinstance(ready, str):
        yield row | {"unavailable": ready}
        return
    if case.sparsity is not None:
        row["topk"] = x.topk(case.sparsity)
    if case.kind != "candidates":
        yield row | _rates(ready, x, ceiling, clock)
    else:
        yield from (row | candidate for candidate in _candidates(ready, x))


def _candidates(ready: Work, x: Tensors) -> list[dict[str, Any]]:
    """Milliseconds and rates of every kept candidate of every kernel, or the error that it raised."""
    if not x.q.is_cuda:
        return [{"unavailable": "twins have no candidates"}]
    found: list[dict[str, Any]] = []

    def note(kernel: str, candidate: tuning.Candidate, result: float | Exception) -> None:
        row: dict[str, Any] = {"kernel": kernel, "candidate": str(candidate)}
        if isinstance(result, Exception):
            found.append(row | {"failed": f"{type(result).__name__}: {result}"[:300]})
            return
        rates = [
            KERNEL_PRODUCTS[kernel] * pairs * x.pair_flops / result / 1e9 for pairs in (ready.pairs, ready.tensor_pairs)
        ]
        found.append(row | {"ms": result, "tflops": rates[0], "tensor_tflops": rates[1]})

    with tuning.observed(note):
        ready.forward()
        ready.backward()
    return found


def _jvp(x: Tensors, ceiling: float, clock: Clock) -> dict[str, Any]:
    """Milliseconds and rates of attention with its forward-mode derivative, all inputs moving."""
    if (attention_jvp := getattr(titan_kernels, "attention_jvp", None)) is None:
        return {"unavailable": "titan_kernels has no attention_jvp"}
    q, k, v = (y.detach() for y in (x.q, x.k, x.v))
    with torch.no_grad():
        ms = clock(lambda: attention_jvp(q, k, v, *reversed((q, k, v))))
    tflops = JVP_PRODUCTS * x.layout.num_tokens**2 * x.pair_flops / ms / 1e9
    return {"forward_ms": ms, "forward_tflops": tflops, "forward_share_of_matmul": tflops / ceiling}


def _rates(ready: Work, x: Tensors, ceiling: float, clock: Clock) -> dict[str, Any]:
    with torch.no_grad():
        forward_ms = clock(ready.forward)
    backward_ms = clock(ready.backward)
    product, dense_product = ready.pairs * x.pair_flops, x.layout.num_tokens**2 * x.pair_flops
    forward = FORWARD_PRODUCTS * product / forward_ms / 1e9
    backward = ready.backward_products * product / backward_ms / 1e9
    rates = {
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "forward_tflops": forward,
        "backward_tflops": backward,
        **_tensor_rates(ready, forward, backward),
        "forward_dense_equivalent_tflops": FORWARD_PRODUCTS * dense_product / forward_ms / 1e9,
        "backward_dense_equivalent_tflops": DENSE_BACKWARD_PRODUCTS * dense_product / backward_ms / 1e9,
        "forward_share_of_matmul": forward / ceiling,
        "backward_share_of_matmul": backward / ceiling,
    }
    return rates


def _tensor_rates(ready: Work, forward: float, backward: float) -> dict[str, float]:
    """The rates over whole blocks, and the share of the blocks' pairs that count; nothing for dense attention."""
    if not ready.tensor_pairs:
        return {}
    useful = ready.pairs / ready.tensor_pairs
    return {
        "forward_tensor_tflops": forward / useful,
        "backward_tensor_tflops": backward / useful,
        "useful_share": useful,
    }


def summaries(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each size and tiles_per_list: speedups over the fastest plain dense attention, and the crossover."""
    measured = [row for row in rows if "forward_ms" in row]
    result = []
    for size in dict.fromkeys((tuple(row["grid"]), row["heads"]) for row in measured):
        of_size = [row for row in measured if (tuple(row["grid"]), row["heads"]) == size]
        dense = [both(row) for row in of_size if row["kind"] in BACKENDS]
        branch = [both(row) for row in of_size if row["kind"] == "dense branch"]
        for join in (1, 2):
            sparse = {
                row["sparsity"]: both(row) for row in of_size if row["kind"] == "vsa" and row["tiles_per_list"] == join
            }
            if sparse and dense and branch:
                speedups = {sparsity: min(dense) / ms for sparsity, ms in sorted(sparse.items())}
                keys = {"grid": size[0], "heads": size[1], "tiles_per_list": join, "speedup_over_sdpa": speedups}
                result.append(keys | {"crossover": crossover(sparse, branch[0])})
    return result


def both(row: dict[str, Any]) -> float:
    """Milliseconds of forward and backward."""
    return row["forward_ms"] + row["backward_ms"]


def crossover(sparse_ms: dict[float, float], dense_ms: float) -> float | str | None:
    """The sparsity at which sparse attention takes `dense_ms`; words where it lies outside the measured ones."""
    points = sorted(sparse_ms.items())
    if len(points) < 2:
        return None
    if points[0][1] <= dense_ms:
        return f"below {points[0][0]}"
    for (left, slow), (right, fast) in pairwise(points):
        if fast <= dense_ms:
            return left + (right - left) * (slow - dense_ms) / (slow - fast)
    return f"above {points[-1][0]}"


def table(result: dict[str, Any]) -> str:
    """The result as a text."""
    unit = "TF/s"
    lines = [
        f"{result['dtype']}, head dim {result['head_dim']}; matmul {result['matmul_tflops']:.4g} TFLOP/s"
        + (" (CPU twins: no measure of the kernels)" if result["device"] == "cpu" else ""),
        f"{'tokens':>7}{'heads':>6}  {'':<14}{'spars.':>7}{'join':>5}{'fwd ms':>9}{'bwd ms':>9}"
        f"{'fwd ' + unit:>10}{'bwd ' + unit:>10}{'fwd tensor':>11}{'bwd tensor':>11}{'fwd dense':>10}{'bwd dense':>10}"
        f"{'fwd/mm':>8}{'bwd/mm':>8}",
    ]
    for row in sorted(result["rows"], key=_table_order):
        head = f"{row['tokens']:>7}{row['heads']:>6}  {row['kind']:<14}"
        if reason := row.get("unavailable"):
            lines.append(f"{head} {reason}")
            continue
        head += f"{'' if row['sparsity'] is None else row['sparsity']:>7}{row['tiles_per_list'] or '':>5}"
        rates = ("forward_tflops", "backward_tflops")
        tensor = ("forward_tensor_tflops", "backward_tensor_tflops")
        dense = ("forward_dense_equivalent_tflops", "backward_dense_equivalent_tflops")
        shares = ("forward_share_of_matmul", "backward_share_of_matmul")
        lines.append(
            f"{head}{row['forward_ms']:>9.3f}{row['backward_ms']:>9.3f}"
            + "".join(f"{row[name]:>10.4g}" for name in rates)
            + "".join(f"{row[name]:>11.4g}" if name in row else " " * 11 for name in tensor)
            + "".join(f"{row[name]:>10.4g}" for name in dense)
            + "".join(f"{row[name]:>8.1%}" for name in shares)
        )
    for summary in result["summaries"]:
        speedups = ", ".join(
            f"{speedup:.2f}x at {sparsity}" for sparsity, speedup in summary["speedup_over_sdpa"].items()
        )
        where = summary["crossover"]
        lines.append(
            f"{math.prod(summary['grid']):>7}{summary['heads']:>6}  join {summary['tiles_per_list']}: "
            f"forward + backward {speedups} over the fastest sdpa; crossover "
            + (f"{where:.3f}" if isinstance(where, float) else str(where))
        )
    return "\n".join(lines)


def _table_order(row: dict[str, Any]) -> tuple:
    return row["tokens"], row["heads"], row["sparsity"] or 0, row["kind"], row["tiles_per_list"] or 0


def benchmark(cases: Sequence[Case], device: str, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures cases in order."""
    clock = Clock.of(device)
    ceiling = matmul_tflops(device, clock)
    rows = []
    for row in measure(cases, device, ceiling, clock):
        rows.append(row)
        report(
            f"{row['tokens']} tokens, {row['heads']} heads, {row['kind']} {row['sparsity'] or ''}: "
            + row.get("unavailable", f"{row.get('forward_ms', 0):.3f} + {row.get('backward_ms', 0):.3f} ms")
        )
    return {
        "device": device,
        "dtype": str(DTYPE[device]).removeprefix("torch."),
        "head_dim": HEAD_DIM[device],
        "versions": versions() if device == "cuda" else {},
        "matmul_tflops": ceiling,
        "rows": rows,
        "summaries": summaries(rows),
    }


def versions() -> dict[str, Any]:
    """Versions of the libraries that compute; PyTorch's stands with the machine."""
    return {"triton": version("triton"), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; with --out also writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=GRIDS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", help="of these grids only")
    parser.add_argument("--heads", type=int, nargs="+")
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args(argv)
    grids = GRIDS[arguments.device]
    known = {math.prod(grid): grid for grid in grids}
    if unknown := set(arguments.tokens or ()) - set(known):
        parser.error(f"--tokens {min(unknown)} is none of {', '.join(map(str, known))}")
    if not all(0 <= sparsity < 1 for sparsity in arguments.sparsity):
        parser.error(f"--sparsity {arguments.sparsity} must be at least 0 and below 1")
    grids = [known[tokens] for tokens in arguments.tokens or known]
    cases = plan(grids, arguments.heads or HEADS[arguments.device], arguments.sparsity)
    result = benchmark(cases, arguments.device)
    print(table(result))
    if arguments.out:
        write_result(arguments.out, {"command": "attention", **result})


if __name__ == "__main__":
    main()
