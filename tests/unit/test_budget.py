"""Budget of a step: parts, the page and comments that quote the plan, and measurements that a plan quotes."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import REPOSITORY

from benchmarks import budget
from benchmarks.gpu_suite.plan import PARTS
from benchmarks.gpu_suite.supervisor import Supervisor
from titan_distill.commands.plan import planner
from titan_distill.config.loading import load_config
from titan_distill.observability.flops import ForwardFlops
from titan_distill.planner import seconds
from titan_distill.planner.hardware import EFFICIENCY, GPUS
from titan_distill.planner.measured import measurements
from titan_distill.planner.report import parts
from titan_distill.planner.seconds import Backward, products

H100 = GPUS["H100"]
CARD = "NVIDIA H100 80GB HBM3"
QUOTED = [path.stem for path in budget.planned_files()]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_the_page_has_the_tables_that_the_command_writes() -> None:
    text = budget.PAGE.read_text(encoding="utf-8")
    assert budget.page(text) == text, "run python -m benchmarks.budget"


@pytest.mark.parametrize(
    "name", [name if name == "wan1.3b_finetune" else pytest.param(name, marks=pytest.mark.nightly) for name in QUOTED]
)
def test_comments_quote_the_plan(name: str) -> None:
    path = REPOSITORY / "train_configs" / f"{name}.toml"
    assert budget.with_plan(path) == path.read_text(encoding="utf-8"), "run python -m benchmarks.budget"


def test_every_large_job_that_fits_names_its_plan() -> None:
    assert {"wan1.3b_finetune", "wan1.3b_sparse", "wan14b_to_1.3b", "wan14b_to_1.3b_8gpu"} <= set(QUOTED)


def test_parts_of_the_1_3b_step_make_up_the_budget() -> None:
    """Seconds on an H100 at 32,760 tokens, against an estimate by hand: attention 1.27, linear layers 0.37 without
    recomputed products, cross-attention 0.03, pointwise 0.13, FSDP and optimizer 0.05."""
    mode = budget.MODES["selective, interval 1"]
    with planner(1, H100) as planned:
        plan = planned.plan(load_config(["--job.config_file", str(budget.CONFIG), *budget.ONE_SAMPLE, *mode]))
    found = {part.name: part.seconds for part in parts(plan)}
    attention = found[seconds.ATTENTION_FORWARD] + found[seconds.ATTENTION_BACKWARD]
    assert attention == pytest.approx(1.27, rel=0.02)
    assert found[seconds.LINEAR] == pytest.approx(0.37, rel=0.02)
    assert found[seconds.CROSS_ATTENTION] == pytest.approx(0.03, abs=0.005)
    assert found[seconds.POINTWISE] == pytest.approx(0.13, rel=0.1)
    assert found[seconds.WEIGHTS] + found[seconds.OPTIMIZER] == pytest.approx(0.05, abs=0.01)
    assert sum(found.values()) == pytest.approx(plan.seconds)
    assert sum(phase.dense_flops for phase in plan.phases) / 1e12 == pytest.approx(849, abs=1)


def test_kernels_execute_five_and_seven_products_and_whole_tiles() -> None:
    flops = ForwardFlops(linear=100, self_attention=20, cross_attention=7, embeddings=3, data_layers=1)
    backward = Backward(of_weights=True, matmuls=11, attention=0.0, checkpointed=1.0)
    dense = products(flops, 2, backward, None)
    assert dense[seconds.ATTENTION_FORWARD] == 20 and dense[seconds.ATTENTION_BACKWARD] == 50
    assert dense[seconds.LINEAR] == 3 * 105 - 1 + 11
    assert dense[seconds.CROSS_ATTENTION] == 3.5 * 5
    sparse = products(flops, 2, backward, 0.5)
    assert sparse[seconds.SPARSE_FORWARD] == 40 and sparse[seconds.SPARSE_BACKWARD] == 140


@pytest.mark.parametrize(("tile", "share"), [("[3, 5, 4]", 0.879), ("[2, 8, 8]", 0.691)])
def test_a_sparse_role_is_planned_at_the_rate_of_sparse_kernels(tile: str, share: float) -> None:
    arguments = ["--job.config_file", "train_configs/wan1.3b_sparse.toml", "--sparse_attention.tile", tile]
    with planner(8, H100) as planned:
        plan = planned.plan(load_config(arguments))
    (student,) = [phase for phase in plan.phases if phase.passes.update == phase.passes.role == "student"]
    found = {part.name: part for part in student.parts}
    part = found[seconds.SPARSE_FORWARD]
    assert plan.roles["student"].useful_share == pytest.approx(share, abs=5e-4)
    assert part.seconds == pytest.approx(part.flops / (989e12 * EFFICIENCY.sparse_forward))
    assert seconds.ATTENTION_FORWARD not in found
    assert not any("lower FLOP/s" in thing for thing in plan.left_out)


# Measurements -------------------------------------------------------------------------------------


def suite(out: Path, scratch: Path, *, rehearse: bool, card: str, copy: float = 2.9, dated: bool = True) -> None:
    """Rows that a suite's own supervisor writes, as if a worker had sent them."""
    out.mkdir(parents=True)
    supervisor = Supervisor(out, scratch, 60, rehearse, None, lambda: None)
    if not rehearse:
        supervisor._card = card
    if dated:
        supervisor._add(PARTS[0], "versions", date="2026-12-01")
    supervisor._add(PARTS[0], "copy", tb_per_second=copy)
    supervisor._add(PARTS[4], "compiled", seconds_per_step=2.05, mfu=0.418)
    supervisor._add(PARTS[3], "32760 tokens, 12 heads: vsa kernels 0.9 x1 3x5x4", forward_tflops=400, useful_share=0.8)


def test_a_plan_quotes_what_a_suite_measured_on_this_card(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    suite(results / "h100", tmp_path / "scratch", rehearse=False, card=CARD)
    suite(results / "older", tmp_path / "scratch", rehearse=False, card=CARD, copy=1.5, dated=False)
    quoted = [str(each) for each in measurements(H100, results)]
    assert quoted == [
        f"sparse attention, forward: 500 TFLOP/s ({CARD}, 2026-12-01, benchmarks/results/h100/rows.jsonl)",
        f"pointwise: 2.9 TB/s ({CARD}, 2026-12-01, benchmarks/results/h100/rows.jsonl)",
        f"step: 2.05 s ({CARD}, 2026-12-01, benchmarks/results/h100/rows.jsonl)",
        f"step: 41.8 % of peak (MFU) ({CARD}, 2026-12-01, benchmarks/results/h100/rows.jsonl)",
    ]
    assert not measurements(GPUS["H200"], results)


@pytest.mark.parametrize(("rehearse", "card"), [(True, ""), (False, "NVIDIA H100 PCIe")])
def test_neither_a_rehearsal_nor_a_slower_card_is_quoted(rehearse: bool, card: str, tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    suite(results / "other", tmp_path / "scratch", rehearse=rehearse, card=card)
    assert not measurements(H100, results)


def test_an_installed_package_without_results_quotes_nothing(tmp_path: Path) -> None:
    assert not measurements(H100, tmp_path / "benchmarks" / "results")
