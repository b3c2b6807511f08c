"""The GPU suite's plan, its documents, and what it reads from pytest."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from runs import REPOSITORY
from titan_kernels import tuning

from benchmarks import attention, launches
from benchmarks.gpu_suite import kernel_cases, plan, pytest_cases, training_cases, worker
from benchmarks.gpu_suite.__main__ import main
from benchmarks.gpu_suite.predictions import PREDICTIONS, compared
from benchmarks.gpu_suite.summary import summary
from titan_distill.config.loading import load_config
from titan_distill.observability.timing import PhaseTimer
from titan_distill.trainer import Trainer

PAGE = (REPOSITORY / "docs" / "kernels.md").read_text()


def table_rows(*columns: str) -> list[list[str]]:
    """Rows of the table of docs/kernels.md whose head begins with `columns`."""
    _, _, rest = PAGE.partition(f"| {' | '.join(columns)} |")
    lines = rest.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_has_every_estimate_and_they_fit_the_budgets():
    documented = {name: float(seconds) for name, seconds, _ in table_rows("part", "estimate in s")}
    assert documented == {part.name: part.estimate_s for part in plan.PARTS}
    first = [part for part in plan.PARTS if part.tier == plan.FIRST]
    assert list(plan.PARTS[: len(first)]) == first
    totals = sum(part.estimate_s for part in first), sum(part.estimate_s for part in plan.PARTS)
    assert totals[0] <= plan.BUDGETS[plan.FIRST] == 400 and totals[1] <= plan.BUDGETS[plan.REST] == 540
    assert [int(number) for number in re.findall(r"add up to (\d+) s .*? all of them to (\d+) s", PAGE)[0]] == list(
        totals
    )


def test_the_page_has_every_prediction():
    assert [tuple(row) for row in table_rows("case", "number", "predicted")] == [
        (prediction.case, prediction.key, prediction.range) for prediction in PREDICTIONS
    ]


def test_every_prediction_is_about_a_case_of_the_suite(context):
    names = {name for part in plan.PARTS for name in cases_of(part, context)}
    assert {prediction.case for prediction in PREDICTIONS} <= names


@pytest.fixture
def context(tmp_path) -> worker.Context:
    """The context of the parts on a GPU; listing cases computes nothing."""
    return worker.Context("cuda", False, tmp_path, tmp_path, None, 60.0)


def cases_of(part: plan.Part, context: worker.Context) -> worker.Cases:
    return getattr(import_module(part.module), part.function.partition(":")[2])(context)


def test_the_headline_is_timed_first_and_completely(context):
    first = list(kernel_cases.attention_720p(context))
    assert first[:3] == [f"75600 tokens, 12 heads: {kind}" for kind in ("sdpa cudnn", "sdpa flash", "dense branch")]
    kinds = [f"{kind} 0.9 x{join}" for join in (1, 2) for kind in ("candidates", "vsa kernels", "vsa")]
    assert first.pop() == "75600 tokens, 12 heads: transposed lists"
    assert first[3:] == [f"75600 tokens, 12 heads: {kind}{tile}" for tile in ("", " 3x5x4") for kind in kinds]
    anchor = [name for name in kernel_cases.attention_480p(context) if name.startswith("40768 tokens, 16 heads")]
    assert len(anchor) == 3 + 6 and not any("3x5x4" in name for name in anchor)
    assert math.prod(launches.WHOLE_TILES) == 40_768 and all(size % 4 == 0 for size in launches.WHOLE_TILES)


def test_the_derivative_is_timed_and_compiled_ahead(context):
    case = next(run.args[0] for name, run in kernel_cases.attention_480p(context).items() if name.endswith(": jvp"))
    assert (case.grid, case.heads, case.tile) == (launches.JVP.grid, launches.JVP.heads, launches.JVP.tile)


def test_a_candidate_that_the_table_gets_is_timed(monkeypatch):
    planted = tuning.Candidate(4, 5, True, reason="planted")
    key = ("forward", 64, 16)
    monkeypatch.setattr(tuning, "KEPT", {**tuning.KEPT, key: (*tuning.KEPT[key], planted)})
    timed: list[tuning.Candidate] = []
    monkeypatch.setattr(tuning, "_milliseconds", lambda kernel, start, candidate: timed.append(candidate) or 1.0)
    for name, value in {"is_available": True, "is_current_stream_capturing": False, "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    shape = tuning.Shape(128, torch.bfloat16, 64, 64, 1, 1, 12, 7)
    with tuning.observed(lambda *_: None):
        tuning.launch("forward", shape, lambda candidate: None, tma=True)
    assert timed == list(tuning.KEPT[key]) and planted in timed


def test_the_estimate_has_time_for_every_candidate():
    kept = {(kernel, rows): len(found) for (kernel, rows, bits), found in tuning.KEPT.items() if bits == 16}
    of_a_tile = sum(kept["forward", rows] + kept["grad_q", rows] + kept["grad_kv", 64] for rows in (64, 128))
    (estimated,) = re.findall(r"(\d+) candidates at 0.25", PAGE)
    assert 2 * of_a_tile == int(estimated)


@pytest.mark.nightly
def test_the_page_has_the_number_of_gpu_tests():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "tests/gpu"], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    (collected,) = re.findall(r"(\d+) tests collected", done.stdout)
    assert re.findall(r"(\d+) tests of \d", PAGE) == [collected]


def test_sparse_rows_have_counted_and_tensor_rates():
    case = attention.Case((3, 5, 5), 1, "vsa", 0.5, 1)
    x = attention.Tensors(case.grid, case.heads, "cpu")
    (row,) = attention.measure_case(case, x, 1.0, attention.Clock("cpu", 1, 4))
    lengths = x.layout.length.double()
    assert 0 < row["useful_share"] < 1 and lengths.min() < 64
    for way in ("forward", "backward"):
        counted, tensor = row[f"{way}_tflops"], row[f"{way}_tensor_tflops"]
        assert math.isclose(counted / tensor, row["useful_share"])
    shown = list(summary([{"part": "card", "case": str(case), "card": "CPU", "at_s": 1.0, **row}]).splitlines())
    assert any("forward_tflops | backward_tflops | forward_tensor_tflops | backward_tensor_tflops" in x for x in shown)


def test_the_host_may_wait_in_the_named_methods_only():
    modes: list[str] = []

    class Running:
        timer = PhaseTimer(torch.device("cpu"))

        def _sum_over_ranks(self, value):
            modes.append("summing")
            return value

    trainer = Running()
    assert all(callable(getattr(Trainer, name)) and hasattr(trainer, name) for name in training_cases.MAY_WAIT)
    with training_cases.no_host_waits(trainer, modes.append):
        assert trainer._sum_over_ranks(3) == 3
    assert modes == ["error", "default", "summing", "error", "default"]
    trainer._sum_over_ranks(4)
    assert modes[-2:] == ["default", "summing"]


@pytest.mark.parametrize("sentence", [training_cases.WAITED, "something else"])
def test_a_wait_costs_a_row_and_no_measurement(sentence, context, monkeypatch):
    def run(*arguments, watch=None):
        yield {"built": True}
        if watch is not None:
            raise RuntimeError(f"{sentence} (Triggered internally)")
        yield {"seconds_per_step": 1.0}

    monkeypatch.setattr(training_cases, "train_watched", run)
    rows = training_cases.train(context, "tiny_wan_finetune", (), 1, 1)
    if sentence != training_cases.WAITED:
        with pytest.raises(RuntimeError, match=sentence):
            list(rows)
        return
    built, failed, again, measured = rows
    assert built == again and measured == {"seconds_per_step": 1.0}
    assert failed["failure"] == "the host waited" and "raise RuntimeError" in failed["text"]


def test_the_kernels_of_every_timing_are_compiled_ahead(context):
    listed = {(size.grid, size.heads, size.tile) for size in launches.SIZES}
    for part in (kernel_cases.attention_720p, kernel_cases.attention_480p, kernel_cases.attention_rest):
        cases = [run.args[0] for run in part(context).values() if isinstance(run.args[0], attention.Case)]
        sparse = {(case.grid, case.heads, case.tile) for case in cases if case.sparsity is not None}
        assert sparse and sparse <= listed


@pytest.mark.parametrize("part", ["finetune", "distillation", "training_rest"])
def test_configurations_of_real_size_load_with_their_overrides(part, context, monkeypatch):
    started = []
    monkeypatch.setattr(training_cases, "train", lambda _, *arguments: started.append(arguments) or [])
    monkeypatch.setattr(training_cases, "save_and_load", lambda _, *arguments: started.append(arguments) or [])
    for run in getattr(training_cases, part)(context).values():
        list(run())
    assert started
    for config, overrides, *_ in started:
        loaded = load_config(["--job.config_file", str(training_cases.CONFIGS / f"{config}.toml"), *overrides])
        assert loaded.training.global_batch_size == 1
        assert loaded.compile.enabled == (part == "finetune")


def test_kernel_parts_import_nothing_of_the_trainer():
    imports = "import benchmarks.gpu_suite.kernel_cases"
    program = f"{imports}; print([m for m in sys.modules if m.split('.')[0] == 'titan_distill'])"
    paths = [str(REPOSITORY / name) for name in ("kernels", "tests/helpers", "")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}; {program}"],
        capture_output=True, text=True, check=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_a_junit_report_becomes_a_row_per_failure_and_totals(tmp_path):
    tests = tmp_path / "test_three.py"
    tests.write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_skipped(): pytest.skip('no')\n"
    )
    report = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(tests)]
    done = subprocess.run(command, capture_output=True, check=False, cwd=tmp_path)
    rows = list(pytest_cases.rows(report, done.returncode))
    assert rows[0]["failure"] == "test failed" and rows[0]["test"] == "test_three::test_bad"
    assert "one is not two" in rows[0]["text"]
    assert rows[1] == {"passed": 1, "failed": 1, "skipped": 1, "exit_code": 1}
    for code, kind in ((None, "out of time"), (4, "error")):
        assert [row["failure"] for row in pytest_cases.rows(tmp_path / "none.xml", code)] == [kind]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_kinds_of_running_out_of_memory(error):
    assert worker.failure_kind(error) == worker.OUT_OF_MEMORY
    assert worker.failure_kind(ValueError("memory")) == worker.ERROR


def test_the_summary_says_which_predictions_were_wrong():
    case = PREDICTIONS[0]
    rows = [{"part": "card", "case": case.case, "card": "H100", "at_s": 1.0, case.key: case.high * 2}]
    assert dict(compared(rows))[case] == case.high * 2
    line = next(line for line in summary(rows).splitlines() if line.startswith(f"| {case.case} | {case.key} "))
    assert "**wrong**" in line
    assert "Predictions" not in summary(rows, rehearse=True)
    assert json.dumps(rows)  # as rows.jsonl has it


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_suite_says_so(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "needs a GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_budget_too_short_for_anything_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path), "--budget", "5"])
    assert stopped.value.code == 2 and "at least 30 seconds" in capsys.readouterr().err
