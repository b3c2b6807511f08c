"""The time budget of a step, and all figures of the planner that files quote: `python -m benchmarks.budget`.

Writes the tables between the markers of `docs/performance.md`: FLOPs, bytes and seconds by part, as `titan-distill
plan` computes them for one H100, the GPU suite's figures where `benchmarks/results/` has some, and the modes of
recomputation. Writes also the line `# Planned: N × GPU …` of every file in `train_configs/` that has one. Tests compare
both with what this command writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from titan_distill.commands.plan import Planner, planner
from titan_distill.config.config import Config
from titan_distill.config.loading import load_config
from titan_distill.observability.flops import forward_flops
from titan_distill.planner.hardware import EFFICIENCY, GPUS, Gpu
from titan_distill.planner.measured import STEP, Measurement, measurements
from titan_distill.planner.memory import GIB
from titan_distill.planner.plan import Plan
from titan_distill.planner.report import parts
from titan_distill.planner.seconds import LINEAR, RATES, Part

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "performance.md"
BEGIN, END = "<!-- written by python -m benchmarks.budget -->", "<!-- end -->"
CONFIG = REPOSITORY / "train_configs" / "wan1.3b_finetune.toml"
ONE_SAMPLE = ("--training.global_batch_size", "1", "--parallelism.dp_shard", "1")
PLANNED = re.compile(r"^# Planned: (\d+) × (\w+).*$", re.MULTILINE)
"""Line of a configuration that quotes its plan: ranks, GPU, and figures that the command writes."""

_SELECTIVE = ("--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_interval")
MODES: dict[str, tuple[str, ...]] = {
    "none": ("--activation_checkpoint.mode", "none", "--activation_checkpoint.selective_interval", "none"),
    "selective, interval 1": (*_SELECTIVE, "1"),
    "selective, interval 1, store_hidden = false": (*_SELECTIVE, "1", "--activation_checkpoint.store_hidden", "false"),
    "selective, interval 2": (*_SELECTIVE, "2"),
    "full": ("--activation_checkpoint.mode", "full", "--activation_checkpoint.selective_interval", "none"),
}
ONE_GPU_MODE = "selective, interval 1, store_hidden = false"

FLOAT8_PRODUCTS = 1.8
"""Assumed rate of a float8 product over that of a bf16 one, at tensorwise scales."""
FLOAT8_BYTES = 5
"""Bytes that casting moves per element of a layer's input and of its output's gradient: read for the largest value,
read again, one byte written."""


def main() -> None:
    """Writes the page and the configurations."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for path in planned_files():
        path.write_text(with_plan(path), encoding="utf-8")


def planned_files() -> list[Path]:
    """Returns the configurations that quote their plan."""
    files = sorted((REPOSITORY / "train_configs").glob("*.toml"))
    return [path for path in files if PLANNED.search(path.read_text(encoding="utf-8"))]


def with_plan(path: Path) -> str:
    """Returns a configuration's text with the line of its plan as the planner has it now."""
    text = path.read_text(encoding="utf-8")
    line = PLANNED.search(text)
    assert line is not None
    ranks, gpu = int(line[1]), GPUS[line[2]]
    with planner(ranks, gpu) as planned:
        plan = planned.plan(load_config(["--job.config_file", os.path.relpath(path)]))
    shown = (
        f"# Planned: {ranks} × {gpu.name}, {plan.peak / GIB:.1f} of {gpu.usable_gib:.1f} GiB on the fullest rank, "
        f"{plan.seconds:.1f} s per step at assumed rates"
    )
    return PLANNED.sub(shown, text)


def page(text: str) -> str:
    """Returns the page with new tables between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def tables() -> str:
    """Returns all tables of the page."""
    gpu = GPUS["H100"]
    with planner(1, gpu) as planned:
        plans = {name: planned.plan(_config(*ONE_SAMPLE, *mode)) for name, mode in MODES.items()}
    measured = measurements(gpu)
    plan = plans[ONE_GPU_MODE]
    return "\n\n".join([_budget(plan, measured), _float8(plan), _modes(plans, _eight_ranks(gpu))])


def _eight_ranks(gpu: Gpu) -> dict[str, Plan]:
    with planner(8, gpu) as planned:
        return {name: _plan_of_eight(planned, mode) for name, mode in MODES.items()}


def _plan_of_eight(planned: Planner, mode: Sequence[str]) -> Plan:
    return planned.plan(_config(*mode))


def _config(*overrides: str) -> Config:
    return load_config(["--job.config_file", os.path.relpath(CONFIG), *overrides])


def _budget(plan: Plan, measured: Sequence[Measurement]) -> str:
    gpu, found = plan.gpu, parts(plan)
    rows = [_row(part, gpu, measured) for part in found]
    dense = sum(phase.dense_flops for phase in plan.phases)
    mfu = dense / gpu.peak_flops / plan.seconds
    work = f"{dense / 1e12:,.0f} TFLOP counted, {sum(part.flops for part in found) / 1e12:,.0f} executed"
    rows.append(
        f"| **step** | {work} | {mfu:.0%} of peak (MFU) | **{plan.seconds:.2f}** | {_measured(STEP, measured)} |"
    )
    head = ["| part | work | rate, assumed | seconds, planned | measured |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows])


def _row(part: Part, gpu: Gpu, measured: Sequence[Measurement]) -> str:
    if part.name in RATES:
        rate = f"{RATES[part.name] * gpu.peak_flops / 1e12:.0f} TFLOP/s"
        work = f"{part.flops / 1e12:,.0f} TFLOP"
    else:
        rate = f"{EFFICIENCY.memory * gpu.memory_bytes / 1e12:.2f} TB/s"
        work = f"{part.num_bytes / 1e9:,.0f} GB"
    return f"| {part.name} | {work} | {rate} | {part.seconds:.2f} | {_measured(part.name, measured)} |"


def _measured(part: str, measured: Sequence[Measurement]) -> str:
    found = [f"{each.value:.3g} {each.unit} ({each.date})" for each in measured if each.part == part]
    return ", ".join(found) or "not measured"


def _float8(plan: Plan) -> str:
    """Returns the gain of float8 in the linear layers of the blocks, predicted from their FLOPs and bytes."""
    gpu, role = plan.gpu, plan.roles["student"]
    architecture, num_tokens = role.architecture, role.shards.bounds[-1]
    bf16 = 3 * forward_flops(architecture, num_tokens).linear / (gpu.peak_flops * RATES[LINEAR])
    float8 = bf16 / FLOAT8_PRODUCTS
    width = architecture.num_attention_heads * architecture.attention_head_dim
    # Inputs and outputs of q, k, v, out, q and out of cross-attention, and of both layers of the feed-forward.
    features = 12 * width + 2 * (width + architecture.ffn_dim)
    cast = FLOAT8_BYTES * architecture.num_layers * num_tokens * features
    casting = cast / (gpu.memory_bytes * EFFICIENCY.memory)
    gain = bf16 - float8 - casting
    return (
        f"Predicted gain of `float8.enabled = true`: {gain:.2f} s, {gain / plan.seconds:.0%} of the step. The products "
        f"of the blocks' linear layers take {float8:.2f} s instead of {bf16:.2f} s at {FLOAT8_PRODUCTS} × the rate, "
        f"and casting moves {cast / 1e9:,.0f} GB, {casting:.2f} s. Not measured."
    )


def _modes(one: dict[str, Plan], eight: dict[str, Plan]) -> str:
    head = [
        "| `activation_checkpoint` | kept GiB | 1 GPU, 1 sample: peak GiB | s | 8 GPUs, 32 samples: peak GiB | s |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *_mode_rows(one, eight)])


def _mode_rows(one: dict[str, Plan], eight: dict[str, Plan]) -> Iterator[str]:
    for name, plan in one.items():
        cells = [f"{plan.roles['student'].graph / GIB:.1f}"]
        for each in (plan, eight[name]):
            cells += [f"{each.peak / GIB:.1f}{'' if each.fits else ', does not fit'}", f"{each.seconds:.2f}"]
        yield f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
