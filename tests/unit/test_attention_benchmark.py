"""The attention benchmark on a CPU: what it counts and prints."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import attention


def test_the_benchmark_runs_and_counts_pairs_exactly(tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--tokens", "180", "--heads", "2", "--sparsity", "0.5", "0.9", "--out", str(out)]
    attention.main(arguments)
    result = json.loads(out.read_text())
    rows = {(row["kind"], row["sparsity"], row["tiles_per_list"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 3 + 2 * 4
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


def test_crossover_lies_on_the_line_between_measured_sparsities():
    assert attention.crossover({0.5: 12.0, 0.8: 6.0, 0.9: 4.0}, 9.0) == pytest.approx(0.65)
    assert attention.crossover({0.5: 8.0, 0.8: 6.0}, 9.0) == "below 0.5"
    assert attention.crossover({0.5: 12.0, 0.8: 10.0}, 9.0) == "above 0.8"
    assert attention.crossover({0.9: 4.0}, 9.0) is None
