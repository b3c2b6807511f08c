"""Measurements that the GPU suite left in `benchmarks/results/`, which a plan quotes beside its assumptions.

The suite writes `rows.jsonl`, one JSON object per line, each with the name of the card. A rehearsal names a CPU there,
so it is never quoted. An installed package has no `benchmarks/` and quotes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_distill.observability.flops import peak_flops_by_name
from titan_distill.planner import seconds
from titan_distill.planner.hardware import Gpu

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STEP = "step"
UNDATED = "undated"
"""Date of a suite that ended before it wrote one."""

_480P = "32760 tokens, 12 heads"
FIGURES: tuple[tuple[str, str, str, str, float], ...] = (
    (seconds.LINEAR, "matmul", "tflops", "TFLOP/s", 1.0),
    (seconds.ATTENTION_FORWARD, f"{_480P}: sdpa cudnn", "forward_tflops", "TFLOP/s", 1.0),
    (seconds.ATTENTION_BACKWARD, f"{_480P}: sdpa cudnn", "backward_tflops", "TFLOP/s", 1.0),
    (seconds.SPARSE_FORWARD, f"{_480P}: vsa kernels 0.9 x1 3x5x4", "forward_tflops", "TFLOP/s", 1.0),
    (seconds.SPARSE_BACKWARD, f"{_480P}: vsa kernels 0.9 x1 3x5x4", "backward_tflops", "TFLOP/s", 1.0),
    (seconds.POINTWISE, "copy", "tb_per_second", "TB/s", 1.0),
    (STEP, "compiled", "seconds_per_step", "s", 1.0),
    (STEP, "compiled", "mfu", "% of peak (MFU)", 100.0),
)
"""Part, the suite's case and the key of its row, unit, and a factor to it."""


@dataclass(frozen=True)
class Measurement:
    """One figure of a suite: of the rate that a part reached, or of the step of `wan1.3b_finetune` on one GPU."""

    part: str
    value: float
    unit: str
    card: str
    date: str
    file: Path

    def __str__(self) -> str:
        return f"{self.part}: {self.value:.3g} {self.unit} ({self.card}, {self.date}, {self.file})"


def measurements(gpu: Gpu, folder: Path = RESULTS) -> list[Measurement]:
    """Returns what suites in `folder` measured on this GPU, the latest of each figure."""
    found: dict[tuple[str, str], Measurement] = {}
    for each in sorted(_all(gpu, folder), key=lambda each: (each.date != UNDATED, each.date)):
        found[each.part, each.unit] = each
    order = [(part, unit) for part, _, _, unit, _ in FIGURES]
    return sorted(found.values(), key=lambda each: order.index((each.part, each.unit)))


def _all(gpu: Gpu, folder: Path) -> Iterator[Measurement]:
    for file in sorted(folder.rglob("rows.jsonl")):
        rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        date = next((row["date"] for row in rows if "date" in row), UNDATED)
        for row in rows:
            if not _is_on(gpu, str(row.get("card", ""))) or "failure" in row:
                continue
            for part, case, key, unit, factor in FIGURES:
                if row.get("case") == case and row.get(key) is not None:
                    # The suite counts pairs of tokens of the video, the plan pairs in whole tiles.
                    value = factor * row[key] / row.get("useful_share", 1.0)
                    shown = file.relative_to(folder.parents[1])
                    yield Measurement(part, value, unit, row["card"], date, shown)


def _is_on(gpu: Gpu, card: str) -> bool:
    """Whether a card is this GPU, and not a variant of it with another peak."""
    return gpu.name in card and peak_flops_by_name(card) == gpu.peak_flops
