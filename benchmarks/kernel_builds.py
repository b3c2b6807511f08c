"""Ahead-of-time builds of the attention kernels: `python -m benchmarks.kernel_builds --arch 80 90 100 --out FILE.tsv`.

No GPU is needed: Triton compiles for a named target, and the disassembler in its package reads the result. The machine
code shows registers, spills and shared memory, hence how many programs share a multiprocessor; whether matrix units and
the copy engine are used; and whether two settings are the same machine code under two names. It does not show time.

Builds are for contiguous inputs (strides divisible by 16), and for ragged tiles, which is the general case.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from titan_kernels.jvp import block_sizes, jvp_kernel
from titan_kernels.tuning import KEPT, Candidate
from titan_kernels.vsa_backward import grad_kv_kernel, grad_q_kernel
from titan_kernels.vsa_forward import forward_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.machine import machine

KERNELS = {"forward": forward_kernel, "grad_q": grad_q_kernel, "grad_kv": grad_kv_kernel, "jvp": jvp_kernel}
_DESCRIBED = {"forward": ("k", "v"), "grad_q": ("k", "v"), "grad_kv": ("q", "grad")}
_DESCRIBED["jvp"] = ("k", "v", "tangent_k", "tangent_v")
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MOST_SHARED_KIB = {80: 163, 90: 227, 100: 227}
_MOST_TENSOR_COLUMNS = 512
"""Of a Blackwell multiprocessor's tensor memory, where its matrix units add up."""
_GROUPS = {
    "wgmma": r"HGMMA",
    "mma": r"HMMA|UTC\w*MMA",
    "exp2": r"MUFU",
    "float": r"(FFMA|FADD|FMUL)2?|FMNMX|FSEL",
    "shared": r"LDS|LDSM|STS|STSM",
    "local": r"LDL|STL",
    "barrier": r"BAR|SYNCS",
    "tma": r"UTMALDG",
    "async_copy": r"LDGSTS",
    "wait": r"WARPGROUP",
}

PRODUCTS = {"forward": 2, "grad_q": 3, "grad_kv": 4, "jvp": 6}
"""Matrix products per pair of a query block and a key block."""

_FLOPS_PER_CYCLE = 4096
"""Of a multiprocessor's matrix units in bf16: 989 TFLOP/s by the H100's data sheet, 132 of them at 1.83 GHz."""

_CEILING_TFLOPS = 740
"""The middle of the range predicted for a large matrix product under the H100's power limit."""

_USEFUL_SHARE = 0.879
"""Of the pairs in whole tiles, those of valid tokens: tile 3 × 5 × 4 on 81 frames at 480p or 720p."""

BEGIN, END = "<!-- begin: benchmarks.kernel_builds --table -->", "<!-- end -->"


@dataclass(frozen=True)
class Build:
    """One kernel as compiled for one architecture.

    Attributes:
        registers: per thread.
        local_bytes: stack and local memory per thread; above zero, something spilled.
        shared_bytes: per program.
        tensor_columns: of tensor memory, per program (Blackwell).
        programs: that fit on one multiprocessor, by registers, shared memory, tensor memory and warps.
        instructions: in all.
        mix: instructions by group, each where it stands in the code; loops count once.
        loop: instructions of the innermost loop that multiplies: the work for one tile.
        waits: of these, waits for products (WARPGROUP.DEPBAR).
        sass: SHA-256 of the instructions.
    """

    kernel: str
    rows: int
    dtype: str
    head_dim: int
    arch: int
    candidate: Candidate
    registers: int
    local_bytes: int
    shared_bytes: int
    tensor_columns: int
    programs: int
    instructions: int
    mix: dict[str, int]
    loop: int
    waits: int
    sass: str

    @property
    def fits(self) -> bool:
        """True where a program gets the memory that it asks for; Triton raises `OutOfResources` where not."""
        return self.shared_bytes <= _MOST_SHARED_KIB[self.arch] * 1024 and self.tensor_columns <= _MOST_TENSOR_COLUMNS


def build(
    kernel: str, candidate: Candidate, arch: int, rows: int, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128
) -> Build:
    """Compiles for compute capability `arch` / 10 and reads the machine code.

    Raises whatever Triton raises for what it cannot build.
    """
    compiled = triton.compile(
        source(kernel, candidate, rows, dtype, head_dim),
        target=GPUTarget("cuda", arch, 32),
        options=candidate.options,
    )
    usage, code = _disassemble(compiled.asm["cubin"])
    # An instruction's line: /*address*/ @predicate NAME.MODIFIERS operands ;
    addressed = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.M)
    lines = [line for _, line in addressed]
    names = Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0] for line in lines)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    loop = _innermost([(int(address, 16), line) for address, line in addressed])
    return Build(
        kernel,
        rows,
        _TYPES[dtype],
        head_dim,
        arch,
        candidate,
        registers,
        stack + local,
        shared,
        columns,
        _programs(registers, shared, columns, candidate.warps, arch),
        len(lines),
        {group: sum(n for name, n in names.items() if re.fullmatch(p, name)) for group, p in _GROUPS.items()},
        len(loop),
        sum("WARPGROUP.DEPBAR" in line for line in loop),
        hashlib.sha256("\n".join(lines).encode()).hexdigest(),
    )


def source(kernel: str, candidate: Candidate, rows: int, dtype: torch.dtype, head_dim: int) -> ASTSource:
    """The kernel specialised as its launcher does for contiguous inputs and tiles of at most 64 tokens."""
    function = KERNELS[kernel]
    block_d = triton.next_power_of_2(head_dim)
    rows, columns = blocks(kernel, candidate, rows, dtype)
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_M": rows, "BLOCK_N": columns, "TMA": candidate.tma}
    if kernel == "jvp":
        constants["KEYS_MOVE"] = True
    else:  # tiles of 64 tokens come in one piece, or as two halves for fp32
        constants |= {"Q_CHUNKS": 64 // columns, "KV_CHUNKS": 64 // columns}
        # Blocks of 64 rows of fp32 are multiplied in parts (titan_kernels.tuning).
        constants["PRECISION"] = "bf16x3" if dtype == torch.float32 and rows > 32 else "ieee"
    if kernel == "forward":
        constants |= {"PERSISTENT": bool(candidate.persistent), "AHEAD": candidate.ahead}
    elif kernel == "grad_kv":
        constants["BLOCK_SUMS"] = 64
    types = {name: _type(name, dtype) for name in function.arg_names} | dict.fromkeys(constants, "constexpr")
    if candidate.tma:
        types |= dict.fromkeys(_DESCRIBED[kernel], f"tensordesc<{_TYPES[dtype]}[64, {head_dim}]>")
        if kernel == "grad_kv":
            types["sums"] = f"tensordesc<fp32[1, {rows}]>"
    if candidate.tma and not candidate.ahead:
        types["q"] = f"tensordesc<{_TYPES[dtype]}[{rows}, {head_dim}]>"
    divisible = [
        i
        for i, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or (head_dim % 16 == 0 and "stride" in name)
    ]
    positions = {(function.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(function, types, positions, {(i,): [["tt.divisibility", 16]] for i in divisible})


def blocks(kernel: str, candidate: Candidate, rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows of a block of queries and of keys, for `rows` of `tuning.KEPT`."""
    return block_sizes(candidate, dtype) if kernel == "jvp" else (rows, min(rows, 64))


def _type(name: str, dtype: torch.dtype) -> str:
    if name.removeprefix("tangent_") in ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v"):
        return f"*{_TYPES[dtype]}"
    if name in ("lists", "offset", "chosen_by", "q_start", "q_length", "kv_start", "kv_length"):
        return "*i32"
    if name == "order":
        return "*i64"
    if name in ("lse", "sums"):
        return "*fp32"
    return "fp32" if name.startswith("scale") else "i32"


def _innermost(addressed: list[tuple[int, str]]) -> list[str]:
    """The shortest stretch that ends in a conditional jump back and has a matrix product or, without any, a sum.

    Unconditional jumps back close no loop: they return from waits at a barrier, which stand behind the code.
    """
    position = {address: i for i, (address, _) in enumerate(addressed)}
    loops = []
    for end, (address, line) in enumerate(addressed):
        # @P0 BRA 0x..., or BRA.U UP0, 0x...
        target = re.search(r"^(?:@\S+ BRA\b|BRA\S* !?U?P\w+,).* 0x([0-9a-f]+)", line)
        if target and int(target[1], 16) < address:
            loops.append([line for _, line in addressed[position[int(target[1], 16)] : end + 1]])
    for works in (rf"\b({_GROUPS['wgmma']}|{_GROUPS['mma']})\b", r"\bFFMA2?\b"):
        if working := [loop for loop in loops if any(re.search(works, line) for line in loop)]:
            return min(working, key=len)
    return []


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """The disassembler's report of resources, and the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        outputs = (
            subprocess.run(
                [_BINARIES / "cuobjdump", flag, file.name], capture_output=True, encoding="utf-8", check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
        return tuple(outputs)  # type: ignore[return-value]


def _programs(registers: int, shared: int, columns: int, warps: int, arch: int) -> int:
    # Registers are handed out in eights; the system keeps 1 KiB of shared memory for each program.
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = (_MOST_SHARED_KIB[arch] + 1) * 1024 // (shared + 1024)
    return min(by_registers, by_shared, _MOST_TENSOR_COLUMNS // max(1, columns), 64 // warps)


def space(kernel: str, rows: int, dtype: torch.dtype) -> Iterator[Candidate]:
    """All candidates considered: stages 1-6 x warps 4/8 x pointers or TMA, persistent programs, the textbook order, and
    room for a second program."""
    for tma in (True, False):
        for warps in (4, 8):
            for stages in range(1, 7):
                yield Candidate(warps, stages, tma)
                if kernel == "forward":
                    yield Candidate(warps, stages, tma, persistent=1)
                    yield Candidate(warps, stages, tma, registers=128 if tma else None, ahead=False)
    if rows == 128:
        yield Candidate(8, 2, True, registers=128)


@cache
def versions() -> dict[str, str]:
    """Triton's and its assembler's."""
    text = subprocess.run([_BINARIES / "ptxas", "--version"], capture_output=True, encoding="utf-8", check=True).stdout
    return {"triton": triton.__version__, "ptxas": re.search(r"V([\d.]+)", text)[1]}


def _line(name: str, tried: Build) -> str:
    counts = " ".join(f"{group}:{n}" for group, n in tried.mix.items() if n)
    return (
        f"{name:<12} sm_{tried.arch:<4}{tried.candidate!s:<55} {tried.loop:>4} in loop, {tried.waits} waits "
        f"{tried.registers:>4} regs {tried.local_bytes:>4} B local "
        f"{tried.shared_bytes / 1024:6.1f} KiB {tried.programs} a SM  {counts}  {tried.sass[:8]}"
    )


def table_row(built: Build) -> dict[str, Any]:
    """The build as a line of the table: its settings and figures, then what made it and when."""
    figures = asdict(built) | {"candidate": str(built.candidate)}
    mix, made = figures.pop("mix"), machine()
    return {**figures, **mix, **versions(), "date": made["date"], "commit": made["commit"][:10]}


def read_table(path: Path) -> list[dict[str, str]]:
    """The lines of a file that `write_table` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def write_table(path: Path, builds: list[Build]) -> None:
    """Adds lines to a tab-separated file, in place of those of the same kernels by the same Triton and assembler."""
    rows = list(map(table_row, builds))
    if path.exists():
        ours, kernels = versions().items(), {built.kernel for built in builds}
        rows = [row for row in read_table(path) if not (ours <= row.items() and row["kernel"] in kernels)] + rows
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def predicted_tflops(
    kernel: str, rows: int, warps: int, programs: int, loop: int, columns: int = 64
) -> tuple[float, float]:
    """Lower and upper prediction of the rate over whole tiles; docs/kernels.md says what it assumes."""
    multiplying = PRODUCTS[kernel] * 2 * rows * columns * 128 / _FLOPS_PER_CYCLE
    issuing = loop * warps / 4
    warpgroups = programs * warps / 4
    exposed = (issuing, issuing / warpgroups)
    return tuple(_CEILING_TFLOPS * multiplying / (multiplying + cycles) for cycles in exposed)  # type: ignore[return-value]


def static_table(lines: list[dict[str, str]]) -> str:
    """Markdown: every kept candidate on sm_90, with one value per version of Triton, oldest first, where they differ.
    Rates are predicted for 16-bit products only."""
    built: dict[tuple[str, str, str, str], list[dict[str, str]]] = {}
    for line in sorted(lines, key=lambda line: [int(part) for part in line["triton"].split(".")]):
        if line["arch"] == "90":
            built.setdefault((line["kernel"], line["rows"], line["dtype"], line["candidate"]), []).append(line)
    figures = ("registers", "spilled bytes", "shared KiB", "programs", "instructions", "waits", "tensor", "counted")
    text = [f"| kernel | candidate | {' | '.join(figures)} |", "|---" * (2 + len(figures)) + "|"]
    for (kernel, rows, bits), kept in KEPT.items():
        name, dtype = ("bf16", torch.bfloat16) if bits == 16 else ("fp32", torch.float32)
        for candidate in kept:
            of_versions = built[kernel, str(rows), name, str(candidate)]
            values = [
                [f"{int(line[name]) / 1024:.3g}" if name == "shared_bytes" else line[name] for line in of_versions]
                for name in ("registers", "local_bytes", "shared_bytes", "programs", "loop", "waits")
            ]
            cells = [each[0] if len(set(each)) == 1 else " / ".join(each) for each in values]
            block_rows, columns = blocks(kernel, candidate, rows, dtype)
            title, rates = f"{kernel}, {block_rows} rows, fp32", ["–", "–"]
            if bits == 16:
                programs, loop = (int(of_versions[0][name]) for name in ("programs", "loop"))
                tensor = predicted_tflops(kernel, block_rows, candidate.warps, programs, loop, columns)
                # Dense attention has no ragged tiles.
                shares = (1, 1 if kernel == "jvp" else _USEFUL_SHARE)
                title = f"{kernel}, {block_rows} rows"
                rates = [f"{share * tensor[0]:.0f}–{share * tensor[1]:.0f}" for share in shares]
            text.append(f"| {' | '.join([title, str(candidate), *cells, *rates])} |")
    return "\n".join(text)


def write_document(path: Path, lines: list[dict[str, str]]) -> None:
    """Replaces the table between the marks of a Markdown file."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n\n{static_table(lines)}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Builds, prints a line for each, and with --out writes them into a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(_MOST_SHARED_KIB), default=[90])
    parser.add_argument("--kernel", nargs="+", choices=sorted(KERNELS), default=sorted(KERNELS))
    parser.add_argument("--all", action="store_true", help="the whole space instead of what is kept")
    parser.add_argument("--out", type=Path, help="table that gets these builds for those of the same Triton")
    parser.add_argument("--table", type=Path, nargs=2, help="FILE.tsv and the document whose table it fills; no builds")
    arguments = parser.parse_args()
    if arguments.table:
        return write_document(arguments.table[1], read_table(arguments.table[0]))
    builds: list[Build] = []
    for (kernel, rows, bits), kept in KEPT.items():
        dtype = torch.bfloat16 if bits == 16 else torch.float32
        if kernel not in arguments.kernel:
            continue
        for arch in arguments.arch:
            for candidate in space(kernel, rows, dtype) if arguments.all and bits == 16 else kept:
                if candidate.tma and arch < 90:
                    continue
                tried = build(kernel, candidate, arch, rows, dtype)
                print(_line(f"{kernel} {rows}", tried), flush=True)
                builds.append(tried)
    if arguments.out:
        write_table(arguments.out, builds)


if __name__ == "__main__":
    main()
