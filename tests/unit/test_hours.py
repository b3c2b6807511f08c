"""Hours of a run: counted parts, exact checkpoint sizes, nothing made up for a CPU; and `plan.json`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import REPOSITORY

from titan_distill import cli, train
from titan_distill.commands.calibrate import timed_steps
from titan_distill.commands.plan import planner
from titan_distill.config.loading import load_config
from titan_distill.planner import hardware
from titan_distill.planner.hardware import GPUS, Gpu
from titan_distill.planner.hours import Hours, Seconds, summary
from titan_distill.planner.plan import Plan
from titan_distill.trainer import Trainer

TINY = "train_configs/tiny_wan_dmd2.toml"
UNWATCHED = ("--doctor.enabled", "false")


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("NGPU", "1")


def planned(*overrides: str, job: str = TINY, num_ranks: int = 1) -> tuple[Plan, Hours]:
    config = load_config(["--job.config_file", job, *overrides])
    with planner(num_ranks, GPUS["H100"]) as found:
        plan = found.plan(config)
        return plan, found.hours(config, plan)


def test_all_parts_of_a_run_make_up_its_hours() -> None:
    plan, found = planned("--validation.interval", "100", "--checkpoint.interval", "300", *UNWATCHED)
    assert found.parts["steps"] == (800, pytest.approx(plan.seconds))
    assert found.parts["validations"][0] == 8 and found.parts["saves"][0] == 3  # 300, 600, and the last step
    assert found.parts["baselines, before step 1"][0] == 1
    seconds = found.seconds
    assert seconds.baselines and seconds.validation and seconds.checkpoint
    # Per prompt: the teacher's 48 and 2 guided steps and the student's 2, against the student's 2. A guided pass copies
    # the weights once for both conditions, which makes it a little cheaper than two passes.
    assert 0.93 < seconds.baselines / seconds.validation / ((2 * 48 + 2 * 2 + 2) / 2) < 1
    assert seconds.checkpoint == pytest.approx(found.checkpoint_bytes / 1e9)
    total = 800 * plan.seconds + seconds.baselines + 8 * seconds.validation + 3 * seconds.checkpoint
    assert found.total == pytest.approx(total / 3600)


def test_validation_forwards_cost_what_those_of_a_step_do() -> None:
    """96 prompts through the teacher's 50 guided steps are 50 × 96 / 4 × its one guided forward per student update."""
    plan, found = planned("--method_config.update_ratio", "1", *UNWATCHED)
    (teacher,) = [phase for phase in plan.phases if phase.passes.role == "teacher"]
    assert teacher.passes.num_forwards == 1 and teacher.passes.num_conditions == 2
    assert found.seconds.baselines is not None
    of_teacher = 50 * 96 / 4 * (teacher.compute_seconds + teacher.exposed_seconds)
    assert of_teacher < found.seconds.baselines < 1.1 * of_teacher


def test_the_doctors_samples_and_passes_are_planned() -> None:
    """Three more samples, which the critic, as large as the student, denoises at three levels."""
    (_, watched), (_, alone) = planned(), planned(*UNWATCHED)
    assert watched.seconds.validation and alone.seconds.validation
    expected = (2 + 3) * 99 / (2 * 96)
    assert watched.seconds.validation / alone.seconds.validation == pytest.approx(expected, rel=0.01)


def test_an_untrained_network_judges_only_where_there_is_a_reference() -> None:
    _, without = planned(job="train_configs/tiny_wan_finetune.toml")
    assert without.seconds.baselines == without.seconds.validation


@pytest.mark.parametrize("name", ["dmd2", "dmd2_gan", "self_forcing"])
def test_an_untrained_network_that_sees_whole_videos_judges_the_first_samples(name: str) -> None:
    """Before step 1 four sets are judged and not one: the teacher's, its few steps', the student's before and now."""
    job = f"train_configs/tiny_wan_{name}.toml"
    (_, watched), (_, alone) = planned(job=job), planned(*UNWATCHED, job=job)
    assert watched.seconds.baselines and watched.seconds.validation
    assert alone.seconds.baselines and alone.seconds.validation
    first = watched.seconds.baselines - alone.seconds.baselines
    later = watched.seconds.validation - alone.seconds.validation
    assert 4 < first / later < 6


def test_data_groups_sample_in_rounds() -> None:
    batch = ("--training.global_batch_size", "4", "--training.local_batch_size", "1", *UNWATCHED)
    of_five, of_eight = (
        planned("--validation.num_prompts", number, "--validation.num_videos", "1", *batch, num_ranks=4)[1].seconds
        for number in ("5", "8")
    )
    assert of_five.validation == of_eight.validation and of_five.baselines == of_eight.baselines


def test_gpu_hours_are_those_of_all_ranks() -> None:
    batch = ("--training.global_batch_size", "16", "--training.local_batch_size", "1")
    plan, found = planned(*batch, num_ranks=4)
    facts: Any = summary(plan, found)
    assert facts["gpu_hours"] == pytest.approx(4 * facts["hours"])
    assert facts["memory_gib"] == pytest.approx(sum(facts["memory_parts"].values()))
    assert {"teacher", "student", "critic"} < set(facts["memory_parts"])


def test_a_cpus_plan_has_no_hours_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["plan", TINY, "--gpu", "CPU"])
    shown = capsys.readouterr().out
    assert "HOURS    no hours of this run on 1 × CPU are known; titan-distill plan JOB.toml --calibrate" in shown
    assert "SECONDS  not known" in shown and "nan" not in shown
    assert "saves" in shown and "per checkpoint" in shown  # what is known all the same


def test_a_gpus_plan_has_hours(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["plan", TINY, "--gpu", "A100"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("HOURS")]
    assert " on 1 × A100 = " in line and line.endswith("GPU-hours, at assumed rates, not measured")


@pytest.mark.parametrize(
    ("name", "memory_gib", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, GPUS["H100"]),
        ("NVIDIA A100-SXM4-40GB", 39.4, replace(GPUS["A100"], memory_gib=39.4)),
        ("NVIDIA L40S", 44.4, replace(GPUS["H100"], name="NVIDIA L40S at the rates of an H100", memory_gib=44.4)),
    ],
)
def test_a_plan_is_for_the_memory_that_is_there(
    name: str, memory_gib: float, expected: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU of no known rates gets those of an H100, but not its memory."""
    monkeypatch.setattr(hardware, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    properties = SimpleNamespace(total_memory=memory_gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert hardware.planned_gpu() == expected


def test_calibration_contradicts_a_named_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["plan", TINY, "--gpu", "A100", "--calibrate"])
    assert leaving.value.code == 2 and "--gpu A100 contradicts --calibrate" in capsys.readouterr().err


def test_measured_seconds_take_the_place_of_assumed_ones() -> None:
    _, found = planned()
    measured = found.with_measured(Seconds(step=2.0, baselines=100.0, validation=10.0, checkpoint=5.0))
    assert measured.total == pytest.approx((800 * 2 + 100 + 1 * 10 + 2 * 5) / 3600)
    assert found.with_measured(Seconds(2.0, 100.0, 10.0, None)).total is None


def method(cadence: dict[str, int]) -> Any:
    """A method that updates each role after every so many steps."""
    return SimpleNamespace(
        updates=lambda step: [SimpleNamespace(role=role) for role, n in cadence.items() if step % n == n - 1]
    )


@pytest.mark.parametrize(
    ("cadence", "num_steps", "expected"),
    [
        ({"critic": 1, "student": 5}, 600, [589, 594, 599]),
        ({"student": 1}, 600, [597, 598, 599]),
        ({"critic": 1, "student": 2}, 2, [0, 1]),
        ({"critic": 7, "student": 5}, 30, [24, 27, 29]),  # no step has both
        ({"a": 7, "b": 2, "c": 2}, 12, [6, 7, 9, 11]),  # 6 is the only one with a
    ],
)
def test_timed_steps_are_late_ones_that_update_every_role(
    cadence: dict[str, int], num_steps: int, expected: list[int]
) -> None:
    assert timed_steps(method(cadence), num_steps) == expected


@pytest.mark.nightly
def test_a_calibration_predicts_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predicted over measured seconds of steps, validations and saves, in one run of at most three: other processes on
    this machine may slow one of the two down."""
    run, measured = Trainer.run, [0.0]

    def timed(trainer: Trainer) -> bool:
        started = time.perf_counter()
        try:
            return run(trainer)
        finally:
            measured[0] = time.perf_counter() - started

    monkeypatch.setattr(Trainer, "run", timed)
    few = ("--training.steps", "40", "--checkpoint.interval", "20", "--validation.num_prompts", "32")
    ratios = []
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        job = (TINY, "--job.output_dir", str(folder), *few)
        cli.main(["plan", *job, "--calibrate"])
        shown = capsys.readouterr().out
        assert "measured on this machine" in shown
        rows = [line.split() for line in shown.split("HOURS")[1].splitlines()[2:6]]
        predicted = sum(float(times.replace(",", "")) * float(each) for *_, times, each, _ in rows)
        assert train.main(["--job.config_file", *job]) == 0
        ratios.append(predicted / measured[0])
        if 0.8 <= ratios[-1] <= 1.25:
            return
    raise AssertionError(f"predicted over measured seconds: {ratios}")
