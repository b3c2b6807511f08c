"""One line a step, whatever interrupts the run; rates of the interval; each second in one phase."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from titan_distill.config.sections import (
    CheckpointConfig,
    JobConfig,
    MetricsConfig,
    ProfilingConfig,
    TrainingConfig,
    ValidationConfig,
)
from titan_distill.observability.flops import WorkCounter
from titan_distill.observability.metrics import MetricsFile, MetricsLogger, memory_gib
from titan_distill.observability.profiling import build_profiler
from titan_distill.observability.timing import PhaseTimer
from titan_distill.parallelisms.mesh import World

CPU = torch.device("cpu")


def logger(folder: Path, *, log_interval: int = 1, start_step: int = 0, **options: Any) -> MetricsLogger:
    config = SimpleNamespace(
        job=JobConfig(name="test", output_dir=str(folder)),
        checkpoint=CheckpointConfig(),
        validation=ValidationConfig(),
        metrics=MetricsConfig(log_interval=log_interval),
        training=TrainingConfig(steps=10, global_batch_size=4, local_batch_size=4),
    )
    options = {"is_main": True, "timer": PhaseTimer(CPU), **options}
    return MetricsLogger(config, start_step=start_step, **options)  # type: ignore[arg-type]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_numbers_keep_every_bit(tmp_path: Path) -> None:
    metrics = logger(tmp_path)
    metrics.step(1, {"loss/student": 0.1 + 0.2}, samples_seen=4)
    metrics.close()
    (line,) = lines(tmp_path)
    assert line["step"] == 1 and line["samples_seen"] == 4
    assert line["loss/student"] == 0.1 + 0.2
    assert line["memory_gib"] == pytest.approx(memory_gib(CPU), rel=0.2)
    assert metrics.latest["loss/student"] == 0.1 + 0.2


def test_interval_line_has_the_latest_value_of_every_key(tmp_path: Path) -> None:
    metrics = logger(tmp_path, log_interval=4)
    for step in range(1, 11):
        values = {"loss/critic": float(step)} | ({"loss/student": float(step)} if step % 3 == 0 else {})
        metrics.step(step, values, samples_seen=4 * step)
    metrics.close()
    shown = [(line["step"], line["loss/critic"], line.get("loss/student")) for line in lines(tmp_path)]
    assert shown == [(4, 4.0, 3.0), (8, 8.0, 6.0), (10, 10.0, 9.0)]  # the last step is logged whatever the interval


def test_validation_joins_the_line_of_its_step(tmp_path: Path) -> None:
    timer = PhaseTimer(CPU)
    metrics = logger(tmp_path, timer=timer)
    with timer("validation"):
        time.sleep(0.01)
    metrics.log(0, {"validation/teacher/accuracy": 0.9})
    metrics.step(1, {"loss/student": 1.0}, samples_seen=4)
    with timer("validation"):
        time.sleep(0.01)
    metrics.log(1, {"validation/student/accuracy": 0.5})
    metrics.step(2, {"loss/student": 2.0}, samples_seen=8)
    metrics.close()
    before, first, second = lines(tmp_path)
    assert before["step"] == 0 and before["time/validation"] >= 0.01
    assert (
        first["loss/student"] == 1.0
        and first["validation/student/accuracy"] == 0.5
        and first["time/validation"] >= 0.01
    )
    assert second["step"] == 2 and "time/validation" not in second


def test_phases_of_an_interval_survive_a_validation_inside_it(tmp_path: Path) -> None:
    timer = PhaseTimer(CPU)
    metrics = logger(tmp_path, timer=timer, log_interval=2)
    with timer("backward"):
        time.sleep(0.02)
    metrics.step(1, {}, samples_seen=4)
    metrics.log(1, {"validation/accuracy": 1.0})
    metrics.step(2, {}, samples_seen=8)
    metrics.close()
    first, second = lines(tmp_path)
    assert "time/backward" not in first and second["time/backward"] >= 0.02


def test_resume_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    metrics = logger(tmp_path)
    for step in range(1, 7):
        metrics.step(step, {"loss/student": float(step)}, samples_seen=4 * step)
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss/stu')  # killed in the middle of a line
    resumed = logger(tmp_path, start_step=4)
    resumed.step(5, {"loss/student": 50.0}, samples_seen=20)
    resumed.close()
    assert [(line["step"], line["loss/student"]) for line in lines(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (5, 50),
    ]
    logger(tmp_path, start_step=0).close()
    assert lines(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_lines_are_on_disk_at_once_and_strict_json(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", start_step=0)
    file.write(3, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    assert lines(tmp_path) == [{"step": 3, "loss": None, "grad_norm": None, "lr": 0.5}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(AssertionError):
        file.write(2, {})
    file.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = logger(tmp_path / "run", is_main=False)
    metrics.step(1, {"loss/student": 1.0}, samples_seen=4)
    metrics.close()
    assert not (tmp_path / "run").exists()


def test_rates_are_of_the_interval_and_leave_pauses_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    timer, counter = PhaseTimer(CPU), WorkCounter(tokens_per_sample=180)
    metrics = logger(tmp_path, timer=timer, counter=counter, log_interval=2)

    def train(step: int, seconds: float) -> None:
        clock[0] += seconds
        counter.forward(3e12, backward=True, recompute=True)
        metrics.step(step, {}, samples_seen=4 * step)

    def pause(phase: str, seconds: float) -> None:
        with timer(phase):
            clock[0] += seconds

    pause("validation", 1000)
    metrics.log(0, {})
    train(1, 2.0)
    pause("checkpoint", 500)
    train(2, 4.0)
    pause("validation", 300)
    metrics.log(2, {})
    train(3, 1.0)
    train(4, 1.0)
    metrics.close()
    _, first, second = lines(tmp_path)
    assert first["tokens_per_second"] == 2 * 4 * 180 / 6.0
    assert first["tflops"] == 2 * 9 / 6.0
    assert second["tokens_per_second"] == 2 * 4 * 180 / 2.0
    assert "mfu" not in first  # a CPU has no peak to compare with


def test_nested_phases_never_count_a_second_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    timer = PhaseTimer(CPU)
    with timer("critic"):
        clock[0] += 1
        with timer("teacher"):
            clock[0] += 10
        clock[0] += 100
    clock[0] += 1000
    with timer("critic"):
        clock[0] += 5
    assert timer.drain() == {"time/critic": 106, "time/teacher": 10}
    assert timer.drain() == {}


@pytest.mark.gpu
def test_on_a_gpu_phases_cost_what_the_stream_spends() -> None:
    device = torch.device("cuda")
    timer, x = PhaseTimer(device), torch.randn(4096, 4096, device=device)
    x @ x  # the first product of a process loads libraries
    torch.cuda.synchronize()
    with timer("queued"):  # returns long before the device is done
        for _ in range(50):
            x @ x
    with timer("waiting"):
        torch.cuda.synchronize()
    seconds = timer.drain()
    assert seconds["time/queued"] > 10 * seconds["time/waiting"]


def test_a_phase_that_is_open_at_a_drain_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    timer = PhaseTimer(CPU)
    with timer("data"):
        clock[0] += 1
        assert timer.drain() == {"time/data": 1}
        clock[0] += 2
    assert timer.drain() == {"time/data": 2}


@pytest.mark.parametrize("first_step", [0, 3])
def test_profile_covers_the_steps_it_was_asked_for(tmp_path: Path, first_step: int) -> None:
    config = ProfilingConfig(enabled=True, start_step=4, num_steps=2)
    with build_profiler(config, tmp_path, World(0, 1, CPU), first_step) as profiler:
        for step in range(first_step, 8):
            torch.ones(step + 2, 7).sum()
            profiler.step()
    (path,) = tmp_path.iterdir()
    assert path.name == "step-00000004.rank0.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    lengths = {event["args"]["Input Dims"][0][0] for event in events if event["name"] == "aten::sum"}
    assert lengths == {6, 7}  # those of steps 4 and 5


def test_no_profile_when_off_or_when_resumed_behind_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for config, first_step in ((ProfilingConfig(), 0), (ProfilingConfig(enabled=True, start_step=4), 5)):
        with build_profiler(config, tmp_path / "profile", World(0, 1, CPU), first_step) as profiler:
            for _ in range(10):
                profiler.step()
    assert not (tmp_path / "profile").exists()
    assert "profiling.start_step = 4" in caplog.text
