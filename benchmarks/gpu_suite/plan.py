"""The parts of the suite, in order, with their limits and estimates."""

from __future__ import annotations

from dataclasses import dataclass

FIRST, REST = "first", "rest"
"""Tiers: `first` fits into the default budget, `rest` into the larger one."""

BUDGETS = {FIRST: 400.0, REST: 540.0}
"""Seconds within which a tier, and those before it, are estimated to be done."""

KERNELS, TRAINING = "benchmarks.gpu_suite.kernel_cases", "benchmarks.gpu_suite.training_cases"
PYTEST = "benchmarks.gpu_suite.pytest_cases"


@dataclass(frozen=True)
class Part:
    """A group of cases that share a limit.

    Attributes:
        name: as rows call it.
        function: "module:name" of a function from `Context` to the part's cases.
        estimate_s: expected seconds on an H100, the start of its process included.
        limit_s: seconds after which what is left of the part is given up.
        case_limit_s: seconds after which one case is given up; None for the part's limit.
        process: parts in a row that name the same one share a worker process.
        tier: `first` or `rest`.
    """

    name: str
    function: str
    estimate_s: float
    limit_s: float
    case_limit_s: float | None = None
    process: str = "kernels"
    tier: str = FIRST

    @property
    def module(self) -> str:
        return self.function.partition(":")[0]


PARTS = (
    Part("card", f"{KERNELS}:card", 10, 40),
    Part("smoke", f"{KERNELS}:smoke", 15, 60, 30),
    Part("attention 75,600 × 12", f"{KERNELS}:attention_720p", 36, 85, 30),
    Part("attention 32,760 × 12, 40,768 × 16", f"{KERNELS}:attention_480p", 27, 60, 20),
    Part("finetune 1.3B", f"{TRAINING}:finetune", 127, 240, 150, process="finetune"),
    Part("golden curves", f"{TRAINING}:golden_curves", 45, 110, 60, process="golden"),
    Part("GPU tests", f"{PYTEST}:gpu_tests", 100, 140, process="tests"),
    Part("DMD2 14B to 1.3B", f"{TRAINING}:distillation", 90, 140, process="training", tier=REST),
    Part("training, the rest", f"{TRAINING}:training_rest", 66, 120, process="training", tier=REST),
    Part("attention, the rest", f"{KERNELS}:attention_rest", 24, 60, 20, tier=REST),
)
"""Estimates are explained in `docs/kernels.md`."""
