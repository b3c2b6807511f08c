"""The held-out loss of the tiny Wan is the same on shared weights, shared tokens and cut layers."""

from __future__ import annotations

from pathlib import Path

import pytest
from bucket_data import BUCKETS, write_buckets
from forked import train_forked
from runs import REPOSITORY, TINY_SHAPES, read_metrics, tiny_argv

from titan_distill.data.parquet import ParquetDataset, write_rows
from titan_distill.train import main

STEPS, NUM_ROWS = 8, 5
P = "--parallelism."
FSDP = ("--training.local_batch_size", "2")
LAYOUTS = {
    "fsdp 2": FSDP,
    "buckets, fsdp 2": FSDP,
    "sequence 2": (f"{P}sequence", "2"),
    "tensor 2": (f"{P}tensor", "2"),
    "teacher sequence 2, students fsdp 2": (*FSDP, "--roles.teacher.parallelism.sequence", "2"),
}


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("method", "layout"),
    [
        ("finetune", "fsdp 2"),
        ("finetune", "sequence 2"),
        ("finetune", "tensor 2"),
        ("finetune", "buckets, fsdp 2"),
        ("dmd2", "fsdp 2"),
        ("dmd2", "teacher sequence 2, students fsdp 2"),
        ("scm", "sequence 2"),
    ],
)
def test_two_ranks_measure_what_one_does(
    method: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 0 to 1e-6, after eight steps to 1e-5. Five rows: one rank repeats one, which does not count."""
    monkeypatch.chdir(REPOSITORY)
    if layout.startswith("buckets"):
        data = ("--data.path", str(write_buckets(tmp_path / "data")), *BUCKETS.split())
        write_buckets(tmp_path / "held_out", (3, 1, 2))  # over two ranks, two of the shapes repeat a row
    else:
        data, rows = (), ParquetDataset(TINY_SHAPES / "latents.parquet")
        write_rows(tmp_path / "held_out" / "a.parquet", (rows[len(rows) - 1 - i] for i in range(NUM_ROWS)))
    options = (
        "--training.steps", str(STEPS), "--checkpoint.enabled", "false",
        *data, "--validation.data", str(tmp_path / "held_out"),
        *(("--method_config.tangent_warmup", "2") if method == "scm" else ()),
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(tiny_argv(method, one, *options)) == 0
    assert train_forked(2, tiny_argv(method, two, *options, *LAYOUTS[layout]), tmp_path) == [0, 0]
    expected, found = ({line["step"]: line for line in read_metrics(folder)} for folder in (one, two))
    for step, tolerance in ((0, 1e-6), (STEPS, 1e-5)):
        values = {key: value for key, value in expected[step].items() if key.startswith("validation/")}
        assert "validation/loss/student" in values and (method != "dmd2" or "validation/loss/critic" in values)
        assert {key: found[step][key] for key in values} == pytest.approx(values, rel=tolerance, abs=0)
