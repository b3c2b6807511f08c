"""The doctor: measures with their values in closed form, alarms of toy runs, stops, resumes, and its page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_family
from runs import REPOSITORY, read_metrics
from torch import nn
from toy_run import ASSETS, METHODS, toy_trainer

from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.diffusion.requests import SampleRequest, ValidationRequest
from titan_distill.fault_tolerance.exit_codes import EXIT_DONE, EXIT_UNHEALTHY
from titan_distill.fault_tolerance.signals import DOCTORS_VOTE, Stop, StopRequested
from titan_distill.launch import Relay
from titan_distill.methods.base import method_class
from titan_distill.train import main
from titan_distill.trainer import Trainer
from titan_distill.validation.distances import project
from titan_distill.validation.health import LEVELS, START, Reading, Traits, denoising_errors, readings
from titan_distill.validation.looks import Looks, diversity, looks
from titan_distill.validation.report import doctor as doctors
from titan_distill.validation.report.measures import MEASURES
from titan_distill.validation.report.weights import squares, stored_weights, update_size

SAVING = ("--checkpoint.enabled", "true", "--checkpoint.interval", "100")
ENABLED = ("--validation.enabled", "true", "--validation.num_prompts", "8", "--validation.num_videos", "1")


@pytest.fixture(autouse=True)
def captions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The captions of the toy rows; one and the same in other tests."""
    named = [f"sample {index}" for index in range(64)]
    real = toy_family.LatentRow

    def row(id: str, caption: str, **tensors: Any) -> Any:
        return real(id=id, caption=named[int(id)], **tensors)

    monkeypatch.setattr(toy_family, "LatentRow", row)
    return named


def alarms(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "doctor.jsonl").read_text().splitlines()]


def trained(folder: Path, method: str, *overrides: str) -> Trainer:
    trainer = toy_trainer(folder, method, *overrides)
    assert trainer.run()
    trainer.metrics.close()
    return trainer


# --- numbers ---


def test_looks_of_a_video_whose_numbers_are_known() -> None:
    """Left half (200, 100, 0), right half grey 50; in the second frame all 51 brighter."""
    video = np.full((2, 4, 4, 3), 50, dtype=np.uint8)
    video[:, :, :2] = (200, 100, 0)
    video[1] += 51
    light = 0.299 * 200 + 0.587 * 100
    values = np.array([[light, 50], [light + 51, 101]]) / 255
    expected = {"saturation": 100 / 255, "contrast": values.std(), "motion": 0.2}
    assert vars(looks(video)) == pytest.approx(expected, rel=1e-5)
    assert looks(video[:1]).motion == 0


def test_diversity_is_the_distance_of_two_samples() -> None:
    """Independent values of N(m, s²) lie s √2 apart, root mean square; equal samples 0."""
    generator = torch.Generator().manual_seed(0)
    samples = [3 + 0.5 * torch.randn(4096, generator=generator) for _ in range(8)]
    assert diversity(project(samples)) == pytest.approx(0.5 * 2**0.5, rel=0.05)
    assert diversity(project(samples[:1] * 4)) == 0


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, 1e-4 / torch.finfo(torch.float32).eps), (torch.bfloat16, 0.0)]
)
def test_an_update_below_the_last_place_has_no_size(dtype: torch.dtype, expected: float) -> None:
    """Weights of 1 lose 1e-4: 839 units of float32, and nothing of bfloat16, whose neighbour of 1 is 0.996."""
    parameter = nn.Parameter(torch.ones(100, dtype=dtype))
    optimizer = torch.optim.SGD([parameter], lr=1e-4)
    before = stored_weights([parameter], num_ranks=1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved, weights = squares(before, stored_weights([parameter], num_ranks=1)).tolist()
    assert update_size(moved, weights, dtype) == pytest.approx(expected, rel=1e-3)
    assert weights == 100


def test_large_roles_are_measured_by_a_part_of_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_distill.validation.report.weights.MAX_WEIGHTS", 100)
    parameters = [nn.Parameter(torch.ones(37, 30)), nn.Parameter(torch.ones(10))]
    (copied,) = stored_weights(parameters, num_ranks=1).values()
    assert 50 < len(copied) <= 101
    assert update_size(1.0, 0.0, torch.float32) == math.inf and update_size(0.0, 0.0, torch.float32) == 0


def test_the_error_of_a_denoiser_is_that_of_its_formula(tmp_path: Path) -> None:
    """The toy teacher's velocity at samples x0 and noise ε: mean (v - (ε - x0))² over values and levels."""
    trainer = toy_trainer(tmp_path, "dmd2")
    x0, label = torch.linspace(-1, 2, 2 * 64).view(2, 64), torch.ones(2, 1)
    teacher, noise = trainer.roles["teacher"], KeyedNoise(5)
    found = denoising_errors(trainer.adapter, {"teacher": teacher}, x0, {"label": label}, [3, 4], seed=5)
    total = torch.zeros(2)
    for index, sigma in enumerate(LEVELS):
        drawn = noise.normal("doctor/noise", index, [3, 4], (64,), device=x0.device)
        x = (1 - sigma) * x0 + sigma * drawn
        total += (teacher.transformer(x, torch.full((2, 1), sigma), label) - drawn + x0).square().mean(1) / len(LEVELS)
    assert [error["teacher"] for error in found] == pytest.approx(total.tolist(), rel=1e-5)


# --- readings ---


def traits(saturation: float, index: int = 0, **more: Any) -> Traits:
    return Traits(Looks(saturation, 2 * saturation, 3 * saturation), more.get("projections_P"), more.get("errors", {}))


REQUEST = ValidationRequest(
    (
        SampleRequest("teacher", "teacher", "euler", 4, baseline=True),
        SampleRequest("before", "student", "euler", 4, baseline=True),
        SampleRequest("student", "student", "euler", 4),
    ),
    reference="teacher",
    denoisers=(("critic", "student"),),
)


def test_readings_compare_the_same_prompts() -> None:
    """The second prompt of `before` was not decoded, so teacher and student are compared with it on the first only."""
    undecoded = Traits(None, None)
    sets = {
        "teacher": {0: traits(0.2), 1: traits(0.4)},
        "before": {0: traits(0.1, errors={"critic": 7.0}), 1: undecoded},
        "student": {0: traits(0.3, errors={"critic": 1.0}), 1: traits(0.3, errors={"critic": 2.0})},
    }
    found = {(reading.role, reading.measure): reading for reading in readings(REQUEST, sets, num_prompts=2)}
    assert found["student", "saturation"].value == pytest.approx(0.3)
    assert found["student", "saturation"].reference == pytest.approx(0.3)
    assert found["student", "motion"].reference == pytest.approx(0.9)
    assert found["critic", "denoising_error"] == Reading("critic", "denoising_error", 1.5)
    assert {role for role, _ in found} == {"student", "critic"}


def test_before_the_first_step_an_untrained_network_judges_the_teacher() -> None:
    """The further samples of the first prompt, which the student's set has not, do not count."""
    teacher = {0: traits(0.2, errors={START: 6.0}), 1: traits(0.2, errors={START: 100.0})}
    sets = {"teacher": teacher, "before": {0: traits(0.1, errors={"critic": 7.0, START: 3.0})}}
    assert readings(REQUEST, sets, num_prompts=1) == [
        Reading("teacher", "start_error", 6.0, 3.0),
        Reading("critic", "denoising_error", 7.0),
    ]


def test_diversity_is_that_of_the_first_prompt() -> None:
    """Indices from the number of prompts on are further samples of it."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(500, generator=generator) for _ in range(5)]
    samples[1] *= 100  # another prompt
    own = {index: traits(0.1, projections_P=row) for index, row in enumerate(project(samples))}
    (found,) = (r for r in readings(REQUEST, {"student": own}, num_prompts=2) if r.measure == "diversity")
    assert found.value == pytest.approx(2**0.5, rel=0.1) and found.reference is None


# --- runs ---


def test_a_role_that_does_not_move_is_named_with_its_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path, "dmd2", "--roles.critic.optimizer.lr", "1e-12")
    (alarm,) = alarms(tmp_path)
    assert (alarm["step"], alarm["role"], alarm["measure"]) == (2, "critic", "update_size")
    assert alarm["value"] < 0.1 and alarm["healthy"] == [0.1, None]
    assert "doctor: at step 2 the critic's update size" in caplog.text and alarm["message"] in caplog.text
    found = {key: value for line in read_metrics(tmp_path / "run") for key, value in line.items() if "doctor" in key}
    assert found["doctor/student/update_size"] > 1000 and found["doctor/critic/update_size"] < 0.1


def test_an_alarm_is_raised_once_until_the_measure_has_come_back(tmp_path: Path) -> None:
    doctor = toy_trainer(tmp_path, "dmd2").doctor
    for step, value in enumerate((1.0, 0.1, 0.2, 1.0, math.nan, 9.0)):
        doctor._judge(step, "student", "contrast", value)
    assert [alarm["step"] for alarm in alarms(tmp_path)] == [1, 4]
    assert [alarm["value"] for alarm in alarms(tmp_path)] == [0.1, None]


@pytest.mark.parametrize("method", METHODS)
def test_healthy_toy_runs_are_silent(method: str, tmp_path: Path, captions: list[str]) -> None:
    trained(tmp_path, method, *ENABLED)
    assert alarms(tmp_path) == []


def test_an_update_without_gradients_is_not_judged(tmp_path: Path) -> None:
    """A student that still equals an unguided teacher has no gradient in its first update."""
    trainer = toy_trainer(tmp_path, "dmd2")
    role = trainer.roles["student"]
    for norm, expected in ((0.0, []), (1.0, [(2, "student", "update_size")])):
        with trainer.doctor.weighing(role, norm):
            pass
        sums = trainer.doctor.sums(torch.device("cpu"))
        means = {name: value.item() / trainer.config.training.global_batch_size for name, value in sums.items()}
        trainer.doctor.received(1 + int(norm), "student", means)
        assert [(alarm["step"], alarm["role"], alarm["measure"]) for alarm in alarms(tmp_path)] == expected


def test_an_update_that_is_not_finite_is_no_measure(tmp_path: Path) -> None:
    """`training.max_nonfinite_skips` leaves such updates out; neither an alarm nor a reference comes of them."""
    doctor = toy_trainer(tmp_path, "dmd2").doctor
    (metric,) = doctor._signals.values()
    for step in range(1, 30):
        doctor.received(step, "student", {metric: math.nan if step == 3 else 1.0})
    assert alarms(tmp_path) == []
    assert json.loads((tmp_path / "run" / "doctor_references.json").read_text()) == {"student/score_difference": 1.0}


def test_a_reference_of_zero_is_no_measure(tmp_path: Path) -> None:
    """One frame has no motion, and grey footage no colour."""
    trainer = toy_trainer(tmp_path, "dmd2")
    for value in (0.0, 0.5):
        assert trainer.doctor.validated(1, [Reading("student", "motion", value, 0.0)], trainer.roles) == {}
    assert alarms(tmp_path) == []


def test_one_repeated_prompt_is_named(tmp_path: Path, captions: list[str]) -> None:
    """Eight samples a step: after two steps sixteen are alike."""
    captions[:] = ["a sample"] * len(captions)
    trained(tmp_path, "dmd2")
    (alarm,) = alarms(tmp_path)
    assert (alarm["step"], alarm["role"], alarm["measure"], alarm["value"]) == (2, "", "prompts", 1)


def test_a_collapsed_student_is_named_by_its_diversity(tmp_path: Path) -> None:
    """The student answers every noise with 4, as in the validation test; the critic's error is that of N(4, 0)."""
    trainer = toy_trainer(tmp_path, "dmd2", *ENABLED)
    trainer.validate()
    student = trainer.roles["student"].transformer
    with torch.no_grad():
        student.affine.copy_(torch.tensor([[0.0, 4.0]] * len(student.levels)))
    trainer.state.step = 7
    trainer.validate()
    trainer.metrics.close()
    named = {(alarm["step"], alarm["role"], alarm["measure"]): alarm for alarm in alarms(tmp_path)}
    assert named[7, "student", "diversity"]["value"] == pytest.approx(0, abs=1e-3)
    assert {key for key in named if key[1] == "student"} == {(7, "student", "diversity")}


def test_an_alarm_stops_the_run_with_a_checkpoint_and_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_family.write_data(tmp_path / "toy.parquet")
    argv = [
        "--job.config_file", str(ASSETS / "toy_dmd2.toml"), "--data.path", str(tmp_path / "toy.parquet"),
        "--job.output_dir", str(tmp_path / "run"), *SAVING, "--doctor.on_alarm", "stop",
        "--roles.critic.optimizer.lr", "1e-12",
    ]  # fmt: skip
    assert main(argv) == EXIT_UNHEALTHY == 3
    assert "stopped by the doctor after step 3, which is saved" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    assert len(alarms(tmp_path)) == 1
    healthy = ("--checkpoint.resume_from", "latest", "--roles.critic.optimizer.lr", "1e-2")
    assert main([*argv, *healthy]) == EXIT_DONE
    assert len(alarms(tmp_path)) == 1


def test_all_ranks_know_whose_stop_it_is() -> None:
    stop = Stop()
    stop.is_alarmed = True
    assert stop.vote == DOCTORS_VOTE
    for votes, is_doctors in ((3.0, False), (DOCTORS_VOTE / 4096, True)):  # 4096 ranks share samples
        other = Stop()
        other.agree(votes)
        assert other.is_agreed and other.is_doctors is is_doctors
    with pytest.raises(StopRequested):
        stop.poll()
    assert stop.is_doctors and not Stop().vote


def test_the_launcher_returns_the_doctors_code(monkeypatch: pytest.MonkeyPatch) -> None:
    relay = Relay.__new__(Relay)
    relay.received = set()
    assert relay.exit_code({EXIT_UNHEALTHY}) == EXIT_UNHEALTHY


def test_a_resume_drops_later_alarms_and_keeps_its_references(tmp_path: Path) -> None:
    folder, every = tmp_path / "run", ("--training.steps", "12", "--method_config.update_ratio", "1")
    trained(tmp_path, "dmd2", *SAVING, *every)
    references = json.loads((folder / "doctor_references.json").read_text())
    assert references.keys() == {"student/score_difference"}
    lines = [{"step": step, "role": "", "measure": "contrast", "value": 9.0} for step in (3, 12, 13)]
    (folder / "doctor.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4')
    resumed = toy_trainer(tmp_path, "dmd2", *SAVING, *every, "--checkpoint.resume_from", "latest")
    resumed.metrics.close()
    assert [alarm["step"] for alarm in alarms(tmp_path)] == [3, 12]
    assert resumed.doctor._reference("student/score_difference", 123.0) == references["student/score_difference"]
    for step, value in ((14, 9.0), (15, 1.0), (16, 9.0)):  # still out, back, and out again
        resumed.doctor._judge(step, "", "contrast", value)
    assert [alarm["step"] for alarm in alarms(tmp_path)] == [3, 12, 16]
    toy_trainer(tmp_path, "dmd2", *every).metrics.close()
    assert alarms(tmp_path) == []


@contextmanager
def forwards_counted(trainer: Trainer) -> Iterator[list[str]]:
    calls: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=f"{role.name}/{name}": calls.append(name))
        for role in trainer.roles
        for name, module in role.modules.items()
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def test_a_step_runs_no_forward_and_draws_nothing_for_the_doctor(tmp_path: Path) -> None:
    found = {}
    for enabled in ("true", "false"):
        trainer = toy_trainer(tmp_path, "dmd2", "--doctor.enabled", enabled)
        with forwards_counted(trainer) as calls:
            while trainer.state.step < 8:
                trainer.train_step()
        trainer.metrics.close()
        lines = read_metrics(tmp_path / "run")
        found[enabled] = calls, [{k: v for k, v in line.items() if k.startswith(("loss", "grad"))} for line in lines]
        assert any("time/doctor" in line for line in lines) is (enabled == "true")
        assert any(key.startswith("doctor/") for line in lines for key in line) is (enabled == "true")
    assert found["true"] == found["false"] and len(found["true"][0]) > 20


def test_a_run_without_a_doctor_writes_nothing_of_it(tmp_path: Path) -> None:
    trained(tmp_path, "dmd2", *ENABLED, "--doctor.enabled", "false")
    assert not list((tmp_path / "run").glob("doctor*"))


# --- its page ---


def test_methods_name_measures() -> None:
    assert {name for method in METHODS for name in method_class(method).signals} == {"score_difference"}
    assert {*MEASURES} >= {name for method in METHODS for name in method_class(method).signals}


def test_the_page_states_every_measure() -> None:
    page = (REPOSITORY / "docs" / "doctor.md").read_text()
    sections = re.findall(r"^### `(\w+)`$", page, re.M)
    assert sections == [*MEASURES]
    for measure in MEASURES.values():
        assert measure.section() in page
    for name in ("INTERVAL", "NUM_UPDATES", "NUM_CAPTIONS", "MIN_CAPTIONS"):
        assert str(getattr(doctors, name)) in page
