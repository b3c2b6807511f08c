"""The attention benchmark and the GPU suite: what they count, plan and print, on a CPU."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

from benchmarks import attention, gpu_suite


def test_the_benchmark_runs_and_counts_pairs_exactly(tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--tokens", "180", "--heads", "2", "--sparsity", "0.5", "0.9", "--out", str(out)]
    attention.main(arguments)
    result = json.loads(out.read_text())
    rows = {(row["kind"], row["sparsity"], row["tiles_per_list"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 3 + 2 * 4 and not result["skipped"]
    assert result["machine"]["torch"] == torch.__version__
    dense = rows["sdpa flash", None, None]
    product = 2 * 2 * 32 * 180**2
    assert math.isclose(dense["forward_tflops"] * dense["forward_ms"] * 1e9, 2 * product)
    assert math.isclose(dense["backward_tflops"] * dense["backward_ms"] * 1e9, 5 * product)
    one = rows["vsa kernels", 0.9, 1]
    pairs_of_both_heads = one["forward_tflops"] * one["forward_ms"] * 1e9 / (2 * 2 * 32)
    # Every query reads one tile of the grid's 8, whose lengths are those of 4 + 1, 4 + 2 and 4 + 2 tokens an axis.
    assert one["topk"] == 1 and pairs_of_both_heads == pytest.approx(round(pairs_of_both_heads))
    assert 2 * 180 * 4 <= pairs_of_both_heads <= 2 * 180 * 64
    assert math.isclose(one["backward_tflops"] * one["backward_ms"], 3.5 * one["forward_tflops"] * one["forward_ms"])
    assert "no measure of the kernels" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--tokens", "5"], ["--sparsity", "1"]])
def test_impossible_choices_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        attention.main(["--device", "cpu", *arguments])
    assert stopped.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_the_target_is_timed_before_everything_else():
    cases = gpu_suite.cases()
    first = cases[: 3 + 4]
    assert {(math.prod(case.grid), case.heads) for case in first} == {(75_600, 12)}
    assert {case.sparsity for case in first} == {None, 0.9}
    assert len(cases) == len(set(cases)) == 9 * (3 + 4 * 4)
    assert {(math.prod(case.grid), case.heads) for case in cases[: 3 * 9 + 4 * 9]} == {
        (tokens, heads) for tokens in (32_760, 75_600, 27_280) for heads in (12, 24, 40)
    }


def test_a_deadline_in_the_past_skips_every_case_and_says_so():
    cases = attention.plan([(5, 6, 6)], [1], [0.9])
    result = attention.benchmark(cases, "cpu", time.monotonic() - 1)
    assert result["rows"] == [] and len(result["skipped"]) == len(cases)
    assert "skipped for lack of time: 180 tokens, 1 heads: vsa 0.9 x2" in attention.table(result)


def test_the_suite_leaves_time_for_timings_and_the_table():
    schedule = gpu_suite.Schedule.starting(100, 8.5)
    assert 100 < schedule.tests_end < schedule.timings_end < 100 + 8.5 * 60
    tests = {"passed": False, "summary": "1 failed, 9 passed in 3 s", "seconds": 3.0}
    timings = attention.benchmark([], "cpu")
    assert gpu_suite.report(tests, timings).endswith("tests: 1 failed, 9 passed in 3 s (3 s)")


def test_crossover_lies_on_the_line_between_measured_sparsities():
    assert attention.crossover({0.5: 12.0, 0.8: 6.0, 0.9: 4.0}, 9.0) == pytest.approx(0.65)
    assert attention.crossover({0.5: 8.0, 0.8: 6.0}, 9.0) == "below 0.5"
    assert attention.crossover({0.5: 12.0, 0.8: 10.0}, 9.0) == "above 0.8"
    assert attention.crossover({0.9: 4.0}, 9.0) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_cuda_the_suite_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.main(["--out", str(tmp_path)])
    assert stopped.value.code == gpu_suite.EXIT_NO_CUDA
    assert capsys.readouterr().err == "error: the GPU suite needs CUDA, and torch sees no GPU here\n"
