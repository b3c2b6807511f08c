"""Validation on the toy family: distances with a known value, and a user's scorer that is called with real videos."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_family
from forked import train_forked
from runs import read_metrics
from toy_family import VARIANCE
from toy_run import ASSETS, toy_trainer

from titan_distill.config.loading import load_config
from titan_distill.diffusion.requests import SampleRequest
from titan_distill.observability.banner import closing
from titan_distill.trainer import Trainer
from titan_distill.validation import meter
from titan_distill.validation.validator import _title

ENABLED = ("--validation.enabled", "true", "--validation.num_prompts", "64", "--validation.num_videos", "2")
MORE_NOISES = 3
"""Further samples of the first prompt in each set, for the doctor."""
MEAN = 4.0
"""Mean of the teacher's samples under the job's guidance: -0.5 + 3 · 1.5."""

SCORER = '''
import numpy as np
from titan_distill.registry import register_model, register_scorer
from toy_family import ToyAdapter, ToyFamily

calls = []

@register_scorer("brightness")
def brightness(video_THW3, prompt):
    calls.append((video_THW3.copy(), prompt))
    return {"brightness": float(video_THW3.mean()), "red": float(video_THW3[..., 0].mean())}

class VideoAdapter(ToyAdapter):
    def decode_latents(self, latents):
        """Two frames of 16 by 32 pixels, each of one sample's mean."""
        grey_B = latents.mean(1).mul(30).clamp(0, 255).byte()
        return grey_B[:, None, None, None, None].expand(-1, 2, 16, 32, 3)

@register_model("toy_video")
class VideoFamily(ToyFamily):
    def video_size(self):
        return 2, 16, 32

    def build_adapter(self, device, layouts):
        return VideoAdapter(self.config.pipeline_config)
'''


def validated(trainer: Trainer, scale: float, shift: float) -> dict[str, float]:
    """Metrics of a validation at the last step, of a student with x0 = scale x + shift at every level."""
    trainer.validate()
    student = trainer.roles["student"].transformer
    with torch.no_grad():
        student.affine.copy_(torch.tensor([[scale, shift]] * len(student.levels)))
    trainer.state.step = trainer.config.training.steps
    trainer.validate()
    trainer.metrics.close()
    return trainer.metrics.latest


def test_distances_have_their_closed_form_and_samples_without_videos_nothing_else(tmp_path: Path) -> None:
    """The teacher's law is N(4, 0.49) for each value; an untrained student has mean 0, one that answers 4 no spread."""
    trainer = toy_trainer(tmp_path, "dmd2", *ENABLED)
    found = validated(trainer, scale=0.0, shift=MEAN)
    assert found["validation/student_before/sliced_wasserstein"] == pytest.approx(MEAN, rel=0.1)
    assert found["validation/student/sliced_wasserstein"] == pytest.approx(VARIANCE**0.5, rel=0.05)
    assert found["validation/teacher_few_steps/sliced_wasserstein"] < 0.2
    folder = trainer.config.job.output_folder / "validation" / f"step-{trainer.state.step:08d}"
    assert sorted(path.name for path in folder.iterdir()) == ["captions.txt", "request.json"]
    names = {name.rpartition("/")[2] for name in found if name.startswith("validation/")}
    assert names == {"sliced_wasserstein", "sliced_wasserstein_excess"}
    assert "contact_sheet" not in closing(trainer.config, found)


def test_the_end_of_a_run_names_its_page_where_there_is_one(tmp_path: Path) -> None:
    config = toy_trainer(tmp_path, "dmd2").config
    page = config.job.output_folder / "report.html"
    assert str(page) not in closing(config, {})
    page.parent.mkdir(parents=True, exist_ok=True)
    page.touch()
    assert str(page) in closing(config, {})


def test_passes_are_counted_as_they_are_made_and_the_next_validation_is_estimated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 prompts in 4 batches, and the doctor's samples in a fifth: the teacher in guided steps and in four, the
    student in four. A clock that only the passes move, a second each, knows what later validations take: five batches
    in four passes."""
    trainer = toy_trainer(tmp_path, "dmd2", *ENABLED)
    validator, request = trainer.validator, trainer.method.validation_request()
    assert validator is not None and len(validator.prompts) == 64
    assert validator.seconds(request, trainer.roles) is None
    clock = [0.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock[0])

    def tick() -> None:
        clock[0] += 1

    validator.poll = trainer.stop.poll = tick  # called before every pass
    with caplog.at_level(logging.INFO):
        trainer.validate()
    steps = trainer.config.method_config.teacher_steps
    num_passes = 5 * (2 * steps + 2 * 4 + 4)
    shown = [record.getMessage() for record in caplog.records]
    assert f"validation, sampling teacher, teacher_few_steps, student_before: {num_passes:,} forward passes" in shown
    assert sum(validator.meter._passes.values()) == num_passes
    assert validator.seconds(request, trainer.roles) == pytest.approx(5 * 4)


def test_titles_on_the_sheet_tell_the_student_before_from_the_student_now() -> None:
    made = (SampleRequest("student_before", "student", "sde", 1, baseline=True), SampleRequest("s", "s", "euler", 2))
    assert [_title(each, {}) for each in made] == ["student before, 1 step", "s now, 2 steps"]
    assert _title(replace(made[1], guidance_scale=2.5), {"color_accuracy": 0.5}) == (
        "s now, 2 steps, CFG 2.5\ncolor accuracy 0.50"
    )


@pytest.mark.parametrize("number, shown", [("2", 0), ("70", 1)])
def test_more_videos_than_prompts_are_clipped_with_a_line(number: str, shown: int) -> None:
    config = load_config(
        ["--job.config_file", str(ASSETS / "toy_dmd2.toml"), *ENABLED, "--validation.num_videos", number]
    )
    line = "validation.num_videos = 70 is clipped to num_prompts = 64"
    assert config.validation.clipped() == [line] * shown


def test_a_scorer_of_a_users_module_is_called_and_its_scores_are_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_scorer.py").write_text(SCORER)
    monkeypatch.syspath_prepend(tmp_path)
    imports = ("--job.imports", "toy_family,users_scorer", "--recipe.family", "toy_video")
    trainer = toy_trainer(tmp_path, "dmd2", *ENABLED, *imports, "--validation.scorer", "brightness")
    found = validated(trainer, scale=0.0, shift=MEAN)
    import users_scorer  # type: ignore[import-not-found]

    assert len(users_scorer.calls) == 4 * 64
    video, prompt = users_scorer.calls[-1]
    assert video.shape == (2, 16, 32, 3) and video.dtype == np.uint8 and prompt == "a sample"
    assert found["validation/student/brightness"] == found["validation/student/red"] == 30 * MEAN
    assert found["validation/teacher/brightness"] == pytest.approx(30 * MEAN, rel=0.05)
    assert found["validation/student_before/brightness"] != found["validation/student/brightness"]
    folder = trainer.config.job.output_folder / "validation" / f"step-{trainer.state.step:08d}"
    labels = ("teacher", "teacher_few_steps", "student_before", "student")
    assert {path.name for path in folder.glob("*.mp4")} == {f"{i:03d}-{label}.mp4" for i in (0, 1) for label in labels}
    assert str(folder / "contact_sheet.png") in closing(trainer.config, found)


@pytest.mark.parametrize(
    "changed, remade, names",
    [
        ((), (), ""),
        (("--validation.seed", "7"), ("teacher", "teacher_few_steps", "student_before"), "seed"),
        (("--validation.prompts", "prompts.txt"), ("teacher", "teacher_few_steps", "student_before"), "prompts"),
        (("--pipeline_config.flow_shift", "3"), ("teacher", "teacher_few_steps", "student_before"), "pipeline_config"),
        (("--method_config.guidance_scale", "2"), ("teacher", "teacher_few_steps"), "request"),
    ],
)
def test_baselines_are_those_of_the_present_settings(
    changed: tuple[str, ...],
    remade: tuple[str, ...],
    names: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After a resume with other settings: frozen roles are sampled again, the student before training is left out."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("another sample\n" * 4)
    few = (*ENABLED, "--validation.num_prompts", "4")
    toy_trainer(tmp_path, "dmd2", *few).validate()
    folder = tmp_path / "run" / "validation" / "baselines"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert len(before) == 3 * (4 + MORE_NOISES)
    for _ in range(2):  # resumed once more, they are those of the present settings
        resumed = toy_trainer(tmp_path, "dmd2", *few, *changed)
        resumed.state.step = 4
        resumed.validate()
        resumed.metrics.close()
        assert ("validation/student_before/sliced_wasserstein" in resumed.metrics.latest) == (
            "student_before" not in remade
        )
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    new = {path.parent.name for path in after if after[path] != before[path]}
    assert new == {*remade} - {"student_before"} and after.keys() == before.keys()
    for label in remade:
        times = 2 if label == "student_before" else 1
        lines = [line for line in caplog.messages if f"{label!r} were made with other settings (" in line]
        assert len(lines) == times and all(names in line for line in lines)


def test_baselines_without_a_note_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those of a version that wrote none, and no samples for a doctor."""
    few = (*ENABLED, "--validation.num_prompts", "4")
    toy_trainer(tmp_path, "dmd2", *few, "--doctor.enabled", "false").validate()
    folder = tmp_path / "run" / "validation" / "baselines"
    for note in folder.glob("*.json"):
        note.unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert len(before) == 3 * 4
    resumed = toy_trainer(tmp_path, "dmd2", *few, "--validation.seed", "7")
    resumed.state.step = 4
    resumed.validate()
    resumed.metrics.close()
    assert "validation/student_before/sliced_wasserstein" in resumed.metrics.latest and "not used" not in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_ranks_agree_on_a_baseline_of_other_settings(tmp_path: Path) -> None:
    """Two ranks that own three and two prompts. The seed is in rank 0's note only."""
    argv = ["--job.config_file", str(ASSETS / "toy_dmd2.toml"), "--job.output_dir", str(tmp_path / "run"), *ENABLED]
    argv += ["--data.path", str(toy_family.write_data(tmp_path / "toy.parquet")), "--validation.num_prompts", "5"]
    argv += ["--training.local_batch_size", "4", "--checkpoint.enabled", "true", "--checkpoint.resume_from", "latest"]
    assert train_forked(2, [*argv, "--training.steps", "2"], tmp_path) == [0, 0]
    folder = tmp_path / "run" / "validation" / "baselines"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert len(before) == 3 * (5 + MORE_NOISES)
    assert train_forked(2, [*argv, "--training.steps", "3", "--validation.seed", "7"], tmp_path) == [0, 0]
    new = {path.parent.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert new == {"teacher", "teacher_few_steps"}
    assert "'teacher' were made with other settings (seed)" in (tmp_path / "rank0.txt").read_text()
    assert "other settings" not in (tmp_path / "rank1.txt").read_text()
    last = read_metrics(tmp_path / "run")[-1]
    assert (
        "validation/student/sliced_wasserstein" in last and "validation/student_before/sliced_wasserstein" not in last
    )
