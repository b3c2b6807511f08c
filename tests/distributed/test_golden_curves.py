"""The golden jobs on this machine: their curves are the files', on any layout, and show what they are named for.

The layout matrix compares one commit with itself; here one commit is compared with all before it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
from forked import train_forked
from golden_mutants import PLANTED, Planted
from mutants import is_caught, planted

from benchmarks import golden
from titan_distill.parallelisms.mesh import start_world

MICRO_BATCHES = ("--training.local_batch_size", "1")
ONE_SAMPLE = ("--training.global_batch_size", "1", *MICRO_BATCHES)
ALL_STEPS = 8
RESULT = "curves.json"


@pytest.fixture(scope="module")
def recorded() -> Callable[[str], golden.Recording]:
    """A golden job's recording by one process."""
    return functools.cache(golden.record)


def on_two_ranks(names: Sequence[str], folder: Path, steps: int, *overrides: str) -> dict[str, golden.Curves]:
    """The curves of golden jobs, on two gloo ranks in one launch."""

    def record_all(argv: Sequence[str]) -> None:
        world = start_world(120)
        curves = {name: golden.record(name, "cpu", *argv, world=world, until=steps).curves for name in names}
        if world.is_main:
            (folder / RESULT).write_text(json.dumps(curves))
        dist.barrier()
        dist.destroy_process_group()

    codes = train_forked(2, overrides, folder, main=record_all, timeout=500)
    assert codes == [0, 0], (folder / "rank0.txt").read_text()[-3000:]
    return json.loads((folder / RESULT).read_text())


def first(curves: golden.Curves, steps: int) -> golden.Curves:
    return {metric: values[:steps] for metric, values in curves.items() if any(v is not None for v in values[:steps])}


def check(expected: golden.Curves, found: golden.Curves, bound: float) -> None:
    differences = golden.compare(expected, found)
    assert golden.largest(differences) <= bound, differences


@pytest.mark.parametrize("name", golden.NAMES)
def test_the_curve_is_the_files(recorded: Callable[[str], golden.Recording], name: str) -> None:
    rows = golden.judge(name, recorded(name), "cpu")
    assert all(row["passed"] for row in rows), golden.table(rows)


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        # The others make curves of their own on two ranks in the layout matrix.
        pytest.param(("dmd2", "finetune", "sparse"), 3, id="three jobs begin"),
        pytest.param(golden.NAMES, ALL_STEPS, id="all jobs", marks=pytest.mark.nightly),
    ],
)
def test_two_ranks_with_micro_batches_make_the_same_curves(
    recorded: Callable[[str], golden.Recording], tmp_path: Path, names: Sequence[str], steps: int
) -> None:
    """Micro-batches of one sample: two a rank in the jobs of four samples, one in the others."""
    for name, curves in on_two_ranks(names, tmp_path, steps, *MICRO_BATCHES).items():
        check(first(recorded(name).curves, steps), curves, golden.SAME_MACHINE)


@pytest.mark.nightly
@pytest.mark.parametrize("name", golden.NAMES)
def test_accumulation_makes_the_same_curve(recorded: Callable[[str], golden.Recording], name: str) -> None:
    found = golden.record(name, "cpu", *MICRO_BATCHES)
    check(recorded(name).curves, found.curves, golden.SAME_MACHINE)


@pytest.mark.parametrize("case", PLANTED, ids=lambda case: case.mutant.__name__)
def test_the_curves_catch(case: Planted) -> None:
    expected = first(golden.read(case.job)["curves"], case.steps)
    with planted(case.mutant):
        found = golden.record(case.job, until=case.steps)
    assert is_caught(lambda: check(expected, found.curves, 10 * golden.AGAINST_FILE))


@dataclass(frozen=True)
class Misnamed:
    """A golden job, changed so that it isn't what its name says, and what its spy says of it."""

    job: str
    overrides: str
    fault: str
    steps: int = 2


MISNAMED = (
    Misnamed("dmd2", "--roles.critic.optimizer.lr 1e-30", "critic does not train", 1),
    Misnamed("finetune", "--ema.start_step 3", "is a copy of its weights", 3),
    Misnamed("finetune", "--optimizer.lr 1e-30", "still where it began", 1),
    Misnamed("sparse", "--sparse_attention.crossover 1", "step 4 reads 100% of the tiles", 5),
    Misnamed("sparse", "--sparse_attention.sparsity 0.375", "step 4 reads 62% of the tiles", 5),
    Misnamed("self_forcing", "--method_config.last_step_only true", "every rollout has the same exit"),
    Misnamed("self_forcing", "--pipeline_config.frames_per_block 4", "no two segments", 1),
    Misnamed("rcm", "--method_config.tangent_warmup 3", "no student update has both terms", 3),
    Misnamed("rcm", "--method_config.consistency_weight 0.01", "consistency is", 3),
    Misnamed("rcm", "--method_config.consistency_weight 1e9", "distribution matching is", 3),
)


@pytest.mark.parametrize("case", MISNAMED, ids=lambda case: f"{case.job}: {case.fault}")
def test_the_spy_sees(case: Misnamed) -> None:
    faults = golden.record(case.job, "cpu", *ONE_SAMPLE, *case.overrides.split(), until=case.steps).faults
    assert any(case.fault in fault for fault in faults), faults
