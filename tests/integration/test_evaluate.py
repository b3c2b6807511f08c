"""`titan-distill evaluate` on the small real Wan: a checkpoint, what was exported from it, and folders of videos."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from runs import REPOSITORY, tiny_argv
from tiny_media import write_video

from titan_distill import cli, train
from titan_distill.data.footage import read_mp4

FEW = ("--num-prompts", "1", "--seed", "3")
TWO_STEPS = (
    "--training.steps", "1", "--training.global_batch_size", "1", "--training.local_batch_size", "1",
    "--method_config.teacher_steps", "3", "--method_config.teacher_solver", "euler",
    "--method_config.denoising_steps", "[1000.0, 500.0]", "--ema.start_step", "0",
)  # fmt: skip


def call(*words: Any) -> int:
    try:
        cli.main([str(word) for word in words])
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def subjects(folder: Path) -> dict[str, dict[str, Any]]:
    result = json.loads((folder / "evaluation.json").read_text())
    return {subject["name"]: subject for subject in result["subjects"]}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, its student exported, and the videos of its first evaluation in `videos/`."""
    folder = tmp_path_factory.mktemp("evaluated") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        assert train.main(tiny_argv("dmd2", folder, *TWO_STEPS)) == 0
        latest, exported = folder / "checkpoints/latest", folder.parent / "exported"
        assert call("checkpoint", "export", "--checkpoint", latest, "--out", exported) == 0
        videos = ("--vbench-folder", folder.parent / "videos")
        assert call("evaluate", latest, exported, *FEW, *videos) == 0
    return folder


def test_teacher_and_students_from_the_same_noise(run: Path) -> None:
    """The exported student has the checkpoint's scores, so its noise, levels and weights are the same."""
    found = subjects(run / "evaluation")
    student, exported = found["tiny-step-00000001"], found["exported"]
    assert list(found) == ["teacher", "teacher_few_steps", "tiny-step-00000001", "exported"]
    forwards = {name: (x["role"], x["steps"], x["guidance"], x["forwards_per_video"]) for name, x in found.items()}
    assert forwards == {
        "teacher": ("teacher", 3, 2.0, 6), "teacher_few_steps": ("teacher", 2, 2.0, 4),
        "tiny-step-00000001": ("student", 2, 1.0, 2), "exported": ("student", 2, 1.0, 2),
    }  # fmt: skip
    assert all(subject["seconds_per_video"] > 0 and subject["num_videos"] == 2 for subject in found.values())
    own = {"prompt_accuracy", "motion", "flicker", "diversity"}
    compared = {"psnr", "ssim", "sliced_wasserstein"}
    assert own <= found["teacher"]["scores"].keys() and not compared & found["teacher"]["scores"].keys()
    assert own | compared <= student["scores"].keys()
    assert exported["scores"] == pytest.approx(student["scores"], rel=1e-5)
    assert 8 < student["scores"]["psnr"] < 60 and 0 < student["scores"]["ssim"] < 1
    result = json.loads((run / "evaluation/evaluation.json").read_text())
    assert len(result["prompts"]) == 1
    assert result["command"].startswith("titan-distill evaluate ") and "--num-prompts 1" in result["command"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", result["date"])
    table = (run / "evaluation/evaluation.md").read_text().splitlines()
    assert len({len(line) for line in table}) == 1
    assert "exported" in table[0]
    assert {"forwards", "psnr", "prompt accuracy"} <= {line.split("|")[1].strip() for line in table}


def test_the_first_video_of_a_prompt_is_what_generate_makes(run: Path, tmp_path: Path) -> None:
    (prompt,) = json.loads((run / "evaluation/evaluation.json").read_text())["prompts"]
    out = tmp_path / "video.mp4"
    assert call(
        "generate", "--checkpoint", run / "checkpoints/latest", "--prompt", prompt, "--out", out, "--seed", 3
    ) == 0  # fmt: skip
    ours, fps = read_mp4(run.parent / "videos/tiny-step-00000001" / f"{prompt}-0.mp4")
    other, _ = read_mp4(run.parent / "videos/tiny-step-00000001" / f"{prompt}-1.mp4")
    made, _ = read_mp4(out)
    assert fps == 8 and ours.shape == (17, 96, 96, 3)
    assert abs(ours.astype(int) - made).mean() < 1 < abs(ours.astype(int) - other).mean()


def test_folders_of_videos_without_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder beside itself has an infinite PSNR, which JSON cannot hold, and an SSIM of 1."""
    videos = run.parent / "videos"
    shutil.copytree(videos / "teacher", tmp_path / "copy")
    shutil.copy(videos / "teacher.json", tmp_path / "copy.json")
    words = (tmp_path / "copy", videos / "tiny-step-00000001", "--reference", videos / "teacher", "--out", tmp_path)
    assert call("evaluate", *words) == 0
    found = subjects(tmp_path)
    assert list(found) == ["teacher", "copy", "tiny-step-00000001"]
    assert found["copy"]["scores"]["psnr"] is None and found["copy"]["scores"]["ssim"] == pytest.approx(1, abs=1e-4)
    assert re.search(r"^\| psnr .*\| +inf \|", capsys.readouterr().out, re.M)
    of_file = found["tiny-step-00000001"]
    assert of_file["role"] is None and of_file["forwards_per_video"] is None and of_file["num_videos"] == 2
    sampled = subjects(run / "evaluation")["tiny-step-00000001"]["scores"]
    assert of_file["scores"]["psnr"] == pytest.approx(sampled["psnr"], abs=1)  # the codec's share
    assert of_file["scores"]["diversity"] == pytest.approx(sampled["diversity"], rel=0.05)


def test_an_earlier_result_is_kept(run: Path, tmp_path: Path) -> None:
    folder = run.parent / "videos/teacher"
    for _ in range(2):
        assert call("evaluate", folder, "--out", tmp_path) == 0
    names = sorted(re.sub(r"\d{8}-\d{6}", "DATE", path.name) for path in tmp_path.iterdir())
    assert names == ["evaluation-DATE.json", "evaluation-DATE.md", "evaluation.json", "evaluation.md"]


@pytest.mark.nightly
def test_the_teacher_against_itself(run: Path, tmp_path: Path) -> None:
    """Sampled twice, from the same noise: the same videos."""
    teacher = f"{run}/checkpoints/latest#teacher"
    assert call("evaluate", teacher, "--reference", teacher, "--out", tmp_path, *FEW) == 0
    found = subjects(tmp_path)
    assert list(found) == ["teacher", "teacher_few_steps", "teacher-2", "teacher_few_steps-2"]
    assert found["teacher-2"]["scores"]["psnr"] is None
    assert found["teacher-2"]["scores"]["ssim"] == pytest.approx(1, abs=1e-4)
    assert found["teacher-2"]["scores"]["sliced_wasserstein"] == 0
    assert found["teacher_few_steps-2"]["scores"] == found["teacher_few_steps"]["scores"]
    assert call("evaluate", f"{run}#student:raw", "--reference", "none", "--out", tmp_path / "raw", *FEW) == 0
    assert list(subjects(tmp_path / "raw")) == ["tiny-step-00000001-raw"]


BAD: tuple[tuple[Sequence[str], str], ...] = (
    ((), "no subject is named"),
    (("RUN/nothing",), "SUBJECT = '.*nothing': there is no such folder"),
    (("RUN/logs",), "neither a checkpoint .* nor an exported student .* nor does it hold videos"),
    (("RUN/checkpoints/step-00000009",), "SUBJECT = .*there is no such folder"),
    (("RUN#critics",), "has no role 'critics'; it has student, critic"),
    (("RUN#student:best",), "write PATH, PATH#ROLE, PATH#ROLE:ema or PATH#ROLE:raw"),
    (("RUN#critic",), "does not say how to sample from its critic"),
    (("EXPORTED#student",), "names a role of a checkpoint, and this is none"),
    (("EXPORTED",), "name one with --out"),
    (("WITHOUT_CARD", "--out", "OUT"), "does not tell the run's configuration, role and step"),
    (("RUN", "--reference", "SMALL"), r"have 17 × 96 × 96 \(frames, height, width\), but those of small 3 × 64 × 96"),
    (("SMALL", "--fvd-weights", "x", "--reference", "SMALL", "--out", "OUT"), "FVD reads 16 frames"),
    (("SMALL", "--lpips-weights", "x", "--out", "OUT"), "--lpips-weights compares with a reference, and there is none"),
    (("SMALL", "--clip", "RUN/nothing", "--out", "OUT"), "--clip = .*there is no folder"),
    (("RUN", "--reference", "SAME_SIZE"), "has no video of the evaluated prompts"),
    (("RUN", "--videos-per-prompt", "0"), "--videos-per-prompt 0 is out of range; choose 1 to 1000"),
    (("RUN", "--num-prompts", "0"), "--num-prompts 0 is out of range"),
    (("RUN", "--seed", "-1"), "--seed -1 is negative"),
    (("RUN", "--prompts", "RUN/no.txt"), "--prompts = .*no.txt"),
    (("RUN", "--vbench-folder", "SMALL"), "--vbench-folder = .* has files already; name a new folder"),
    (("RUN", "--out", "RUN/config.toml"), "--out = .* cannot be written, because .* is a file"),
)


@pytest.mark.parametrize(("words", "sentence"), BAD, ids=lambda value: value if isinstance(value, str) else None)
def test_bad_input_is_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Sequence[str], sentence: str
) -> None:
    exported, small, same = run.parent / "exported", tmp_path / "small", tmp_path / "same"
    (run / "logs").mkdir(exist_ok=True)
    write_video(small / "a prompt-0.mp4", 3)
    write_video(same / "another prompt-0.mp4", 17, size=(96, 96))
    (tmp_path / "uncarded").mkdir()
    (tmp_path / "uncarded/transformer").symlink_to(exported / "transformer")
    places = {"RUN": run, "EXPORTED": exported, "WITHOUT_CARD": tmp_path / "uncarded", "SMALL": small,
              "SAME_SIZE": same, "OUT": tmp_path / "out"}  # fmt: skip
    before = (run / "evaluation/evaluation.json").read_bytes()
    pattern = re.compile("|".join(sorted(places, key=len, reverse=True)))
    capsys.readouterr()
    assert call("evaluate", *(pattern.sub(lambda match: str(places[match[0]]), word) for word in words)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and re.search(sentence, message), message
    assert (run / "evaluation/evaluation.json").read_bytes() == before and not (tmp_path / "out").exists()


def test_a_teacher_that_is_gone_is_named_before_anything_is_sampled(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the run's paths are relative to the repository
    assert call("evaluate", run) == 2
    message = capsys.readouterr().err
    assert f"roles.teacher.path = 'tests/assets/tiny_wan' (seen from {tmp_path}) is no existing folder" in message
