"""Numbers that were predicted before any GPU ran this, so that a measurement can prove them wrong.

Each is derived in `docs/kernels.md`, whose table a test compares with this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.gpu_suite.records import Row


@dataclass(frozen=True)
class Prediction:
    """A range for one number of one case.

    Attributes:
        case: as the row calls it.
        key: of the row.
        low, high: the range, in the row's unit.
    """

    case: str
    key: str
    low: float
    high: float

    @property
    def range(self) -> str:
        return f"{self.low:g}–{self.high:g}"


_720P, _480P, _ANCHOR = "75600 tokens, 12 heads", "32760 tokens, 12 heads", "40768 tokens, 16 heads"

PREDICTIONS = (
    Prediction("copy", "tb_per_second", 2.7, 3.1),
    Prediction("matmul", "tflops", 680, 800),
    Prediction(f"{_720P}: sdpa cudnn", "forward_tflops", 550, 650),
    Prediction(f"{_720P}: sdpa cudnn", "backward_tflops", 450, 560),
    Prediction(f"{_720P}: sdpa flash", "forward_tflops", 320, 400),
    Prediction(f"{_720P}: vsa kernels 0.9 x1", "forward_tflops", 290, 350),
    Prediction(f"{_720P}: vsa kernels 0.9 x1", "backward_tflops", 220, 270),
    Prediction(f"{_720P}: vsa kernels 0.9 x1 3x5x4", "forward_tflops", 380, 455),
    Prediction(f"{_720P}: vsa kernels 0.9 x1 3x5x4", "backward_tflops", 290, 350),
    Prediction(f"{_480P}: vsa kernels 0.9 x1 3x5x4", "forward_tflops", 370, 455),
    Prediction(f"{_480P}: vsa kernels 0.9 x1 3x5x4", "backward_tflops", 280, 350),
    Prediction(f"{_ANCHOR}: vsa kernels 0.9 x1", "forward_ms", 2.6, 3.2),
    Prediction(f"{_ANCHOR}: vsa kernels 0.9 x1", "backward_ms", 12.0, 14.6),
    Prediction(f"{_720P}: transposed lists", "counting_ms", 0.1, 0.4),
    Prediction(f"{_720P}: transposed lists", "ratio", 2.0, 8.0),
    Prediction(f"{_480P}: jvp", "forward_tflops", 200.0, 350.0),
    Prediction("compiled", "mfu", 0.38, 0.46),
    Prediction("compiled", "seconds_per_step", 1.8, 2.3),
    Prediction("compiled, full recomputation", "seconds_per_step", 2.3, 2.9),
)


def compared(rows: Sequence[Row]) -> Iterator[tuple[Prediction, float | None]]:
    """Yield every prediction with what was measured; None where nothing was."""
    for prediction in PREDICTIONS:
        found = (row[prediction.key] for row in rows if row["case"] == prediction.case and row.get(prediction.key))
        yield prediction, next(found, None)
