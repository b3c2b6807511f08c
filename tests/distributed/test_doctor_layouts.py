"""Sizes of updates are sums over all shards, and a stop for one rank's alarm is every rank's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toy_family
from forked import train_forked
from runs import REPOSITORY, read_metrics, tiny_argv
from toy_run import ASSETS

from titan_distill.fault_tolerance.exit_codes import EXIT_UNHEALTHY
from titan_distill.train import main

P = "--parallelism."
LAYOUTS = {
    "fsdp 2": (2, ("--training.local_batch_size", "2")),
    "replicate 2": (2, (f"{P}dp_replicate", "2", f"{P}dp_shard", "1", "--training.local_batch_size", "2")),
    "tensor 2": (2, (f"{P}tensor", "2")),
    "tensor 2, fsdp 2": (4, (f"{P}tensor", "2", "--training.local_batch_size", "2")),
}
KEYS = ("doctor/student/update_size", "doctor/critic/update_size")


def test_ranks_stop_together_with_the_doctors_exit_code(tmp_path: Path) -> None:
    toy_family.write_data(tmp_path / "toy.parquet")
    argv = [
        "--job.config_file", str(ASSETS / "toy_dmd2.toml"), "--data.path", str(tmp_path / "toy.parquet"),
        "--job.output_dir", str(tmp_path / "run"), "--training.local_batch_size", "4", "--checkpoint.enabled", "true",
        "--doctor.on_alarm", "stop",
    ]  # fmt: skip
    assert train_forked(2, argv, tmp_path) == [EXIT_UNHEALTHY] * 2
    (alarm,) = [json.loads(line) for line in (tmp_path / "run" / "doctor.jsonl").read_text().splitlines()]
    assert alarm["measure"] == "prompts" and alarm["step"] == 4  # rank 0 has had four times four captions, all alike
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()


@pytest.mark.nightly
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_size_of_an_update_does_not_depend_on_the_layout(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    num_ranks, options = LAYOUTS[layout]
    few = ("--training.steps", "3", "--checkpoint.enabled", "false")
    assert main(tiny_argv("dmd2", tmp_path / "one", *few)) == 0
    assert train_forked(num_ranks, tiny_argv("dmd2", tmp_path / "many", *few, *options), tmp_path) == [0] * num_ranks
    expected, found = (
        {key: value for line in read_metrics(tmp_path / name) for key, value in line.items() if key in KEYS}
        for name in ("one", "many")
    )
    assert expected.keys() == {*KEYS} and found == pytest.approx(expected, rel=1e-3)
