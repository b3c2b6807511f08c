"""The page of a run: its verdict, films, charts, settings; and what a run does when it can't be written."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from planted_run import FPS, LEVELS, NUM_FRAMES, PROMPTS, REQUEST, plant_run, planted_video

from titan_distill.cli import main
from titan_distill.config.degrees import Degrees
from titan_distill.validation.report import page as page_module
from titan_distill.validation.report.charts import MAX_POINTS, marks, sections, thin
from titan_distill.validation.report.layout_picture import layout_picture, left_out
from titan_distill.validation.report.page import NAME, page, update_page
from titan_distill.validation.report.run_files import RunFiles, read_run_files, told_apart
from titan_distill.validation.report.verdict import compare, judge
from titan_distill.validation.report.videos import Column, Film, columns, films
from titan_distill.validation.video import write_mp4

REFRESH = 'http-equiv="refresh"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant_run(tmp_path_factory.mktemp("runs") / "planted")


@pytest.fixture(scope="module")
def run(folder: Path) -> RunFiles:
    return read_run_files(folder, is_running=False)


@pytest.fixture(scope="module")
def text(run: RunFiles) -> str:
    return page([run])


def with_distance(run: RunFiles, now: float) -> RunFiles:
    key = "validation/student/sliced_wasserstein_excess"
    return replace(run, metrics=[{**line, key: now} if key in line else line for line in run.metrics])


@pytest.mark.parametrize(
    ("now", "tone", "sentence"),
    [
        (0.1, "good", "It worked: after 20 steps the student's videos are 4.0× closer to the teacher's"),
        (0.3, "fair", "It helped: after 20 steps the student's videos are 25 % closer to the teacher's"),
        (0.4, "open", "No effect: after 20 steps the student's videos are as far from the teacher's"),
        (0.8, "bad", "It failed: after 20 steps the student's videos are 2.0× as far from the teacher's"),
    ],
)
def test_the_verdict_is_the_distance_now_over_the_distance_before(
    run: RunFiles, now: float, tone: str, sentence: str
) -> None:
    verdict = judge(with_distance(run, now))
    assert verdict.tone == tone
    assert verdict.sentence.startswith(sentence)


def test_the_numbers_behind_the_verdict(run: RunFiles) -> None:
    facts = {fact.title: (fact.value, fact.note) for fact in judge(run).facts}
    assert facts["Distance to the teacher (0: alike)"] == ("0.40 → 0.10", "teacher itself in 4 steps: 0.26")
    assert facts["Accuracy"] == ("0.71 → 0.90", "teacher: 0.97; in 4 steps: 0.92")
    assert facts["Network passes per video"] == ("96 → 4", "24× fewer")
    assert facts["Steps"] == ("20 of 20", "finished")


def test_a_run_without_a_reference_is_judged_by_its_held_out_loss(run: RunFiles) -> None:
    losses = [{"step": 0, "validation/loss/student": 2.0}, {"step": 9, "validation/loss/student": 1.0}]
    verdict = judge(replace(run, metrics=losses, validations=[]))
    assert verdict.tone == "good"
    assert "held-out loss has fallen, 2 → 1" in verdict.sentence
    losses[1]["validation/loss/student"] = 3.0
    assert judge(replace(run, metrics=losses, validations=[])).tone == "bad"


def test_of_several_runs_the_closest_is_named(run: RunFiles) -> None:
    other = with_distance(replace(run, name="other"), 0.05)
    assert compare([run, other]) == "other is closest to the teacher: distance 0.05, against 0.10 (planted)."
    fewer = replace(other, config={"validation": {"num_prompts": 8}})
    assert "different numbers of prompts" in compare([run, fewer])
    samples = [replace(sample, guidance_scale=2.0) for sample in REQUEST.samples]
    last = replace(run.validations[-1], request=replace(REQUEST, samples=tuple(samples)))
    assert "not sampled in the same way" in compare([run, replace(other, validations=[last])])


def decode(film: Film) -> np.ndarray:
    kind, _, content = film.source.partition(";base64,")
    with av.open(io.BytesIO(base64.b64decode(content)), format=kind.removeprefix("data:video/")) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(container.streams.video[0])])


def test_a_films_columns_show_the_same_frame_of_teacher_before_and_now(run: RunFiles) -> None:
    shown = columns([run])
    assert [column.heading for column in shown] == ["Teacher", "Before training", "Now, step 20"]
    assert [column.note for column in shown] == ["48 steps, guidance 3", "4 steps", "4 steps"]
    made, note = films(shown)
    assert [film.prompt for film in made] == [PROMPTS[index] for index in (0, 1, 3, 4)] and not note
    film = made[0]
    frames = decode(film)
    assert frames.shape == (NUM_FRAMES, 64, 3 * 64 + 2 * 8, 3) and film.fps == FPS
    for (left, width), label in zip(film.columns, ("teacher", "student_before", "student"), strict=True):
        first, last = round(left * film.width), round((left + width) * film.width)
        for number in range(NUM_FRAMES):
            middle = frames[number, 16:48, first + 16 : last - 16].mean()
            assert middle == pytest.approx(LEVELS[label] - 2 * number, abs=2.5)


def test_a_tall_video_is_scaled_to_256_pixels(tmp_path: Path) -> None:
    write_mp4(tmp_path / "000-student.mp4", planted_video("student", 400), FPS)
    made, _ = films([Column("Now", "", tmp_path, "student", {0: "a"})])
    assert decode(made[0]).shape == (NUM_FRAMES, 256, 256, 3)


def test_prompts_are_left_out_from_the_last_one_on_and_a_line_says_so(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), np.uint8)
    for index in range(3):
        write_mp4(tmp_path / f"{index:03d}-student.mp4", noise, FPS)
    shown = [Column("Now", "", tmp_path, "student", {0: "a", 1: "b", 2: "c"})]
    sizes = [len(film.source) for film in films(shown)[0]]
    budget = sizes[0] + sizes[1] + 10
    made, note = films(shown, budget)
    assert [film.prompt for film in made] == ["a", "b"]
    assert note == f"The page has the first 2 of 3 prompts: all videos in it may take {budget / 1e6:g} MB."
    (smaller,), _ = films(shown, sizes[0] // 3)
    assert smaller.height < 128
    made, note = films(shown, 100)
    assert not made and note.startswith("The page has no prompt")


def test_charts_hold_the_values_of_the_metrics(run: RunFiles) -> None:
    found = {chart.title: chart for charts in sections([run]).values() for chart in charts}
    loss = {series.name: series for series in found["Loss"].series}
    assert loss["student"].x == list(range(1, 21)) and loss["student"].y[3] == 0.25
    assert found["Loss"].is_logarithmic
    seconds = {series.name: series.y for series in found["Seconds per step, by phase"].series}
    assert seconds == {"data": [0.5] * 20, "backward": [1.5] * 20}
    planned = replace(run, plan={"memory_gib": 3.0})
    memory = next(
        c for c in sections([planned])["Speed and memory"] if c.title == "Memory in GiB (on a CPU: of the process)"
    )
    assert [(series.name, series.y[-1]) for series in memory.series] == [("measured", 2.0), ("planned", 3.0)]
    scores = sections([run])["Scores"]
    assert [series.name for series in scores[0].series] == ["student before", "teacher few steps", "student"]
    assert (scores[0].series[-1].x, scores[0].series[-1].y) == ([0, 20], [0.4, 0.1])


def test_resumes_skips_and_alarms_are_marks(run: RunFiles) -> None:
    lines = [{"step": 3, "nonfinite_skips/student": 0.0}, {"step": 4, "nonfinite_skips/student": 1.0}]
    found = marks([replace(run, metrics=lines, alarms=[{"step": 7, "measure": "contrast"}])])
    assert [(mark.step, mark.text, mark.is_fault) for mark in found] == [
        (10, "resume on 4 ranks", False),
        (4, "skip of student", True),
        (7, "alarm: contrast", True),
    ]


def test_a_long_curve_keeps_its_spikes() -> None:
    y: list[float | None] = [1.0] * 100_000
    y[54_321], y[60_000] = 99.0, None
    steps, values = thin(list(range(len(y))), y)
    assert len(steps) <= MAX_POINTS and (54_321, 99.0) in zip(steps, values) and steps[-1] == 99_999


def test_a_layouts_picture_has_every_rank_once_or_says_how_many_are_missing() -> None:
    small = Degrees(dp_replicate=2, dp_shard=2, sequence=2, tensor=2)
    ranks = re.findall(r">(\d+)</text>", layout_picture(small))
    assert [int(rank) for rank in ranks] == list(range(16)) and not left_out(small)
    large = Degrees(dp_shard=64, tensor=8)
    drawn = len(re.findall(r"</text>", layout_picture(large)))
    assert left_out(large).startswith(f"{512 - drawn} more ranks")


def test_the_page_needs_nothing_from_outside_and_runs_nothing_of_a_prompt(text: str) -> None:
    head, _, data = text.partition('<script type="application/json" id="data">')
    assert not re.search(r"""(src|href)=["'](?!data:)""", head) and "url(" not in head and "@import" not in head
    assert "a &lt;b&gt;red&lt;/b&gt; circle" in head and "<b>red" not in head
    assert "</script> lines" not in text
    assert "<" not in data.partition("</script>")[0]
    assert len(text) < 4e6


def test_settings_layouts_and_environment_are_on_the_page(text: str) -> None:
    for part in ("Differs from x.toml", "<td>training.steps</td>", "4 ranks: tensor 4", "torch 2.13.0"):
        assert part in text
    assert REFRESH not in text


def test_several_runs_show_where_their_configurations_differ(tmp_path: Path, run: RunFiles) -> None:
    other = read_run_files(plant_run(tmp_path / "other", name="other", steps=10, size=16))
    found = page([run, other])
    assert re.search(r"<td>training.steps</td><td>20</td><td>10</td>", found)
    assert "<td>validation.num_prompts</td>" not in found
    assert [column.heading for column in columns([run, other])][2:] == ["planted, step 20", "other, step 10"]


def test_a_run_that_went_back_shows_what_it_has_reached(tmp_path: Path) -> None:
    """A resume from an earlier step cuts the metrics, but the videos of later validations stay on the disk."""
    folder = plant_run(tmp_path / "x", steps=20)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:11]), encoding="utf-8")
    assert [sampled.step for sampled in read_run_files(folder).validations] == [0]


def test_an_excess_that_was_cut_at_zero_is_not_the_measure(run: RunFiles) -> None:
    plain = {"validation/student_before/sliced_wasserstein": 0.2, "validation/student/sliced_wasserstein": 0.9}
    excess = {"validation/student_before/sliced_wasserstein_excess": 0.0}
    worse = replace(with_distance(run, 0.8), metrics=[{**run.metrics[-1], **plain, **excess}])
    assert judge(worse).tone == "bad" and "4.5× as far" in judge(worse).sentence


def test_a_damaged_video_is_left_out_with_a_line(tmp_path: Path) -> None:
    for index in range(2):
        write_mp4(tmp_path / f"{index:03d}-student.mp4", np.zeros((2, 16, 16, 3), np.uint8), FPS)
    (tmp_path / "000-student.mp4").write_bytes(b"")
    made, note = films([Column("Now", "", tmp_path, "student", {0: "a", 1: "b"})])
    assert [film.prompt for film in made] == ["b"] and "000-student.mp4 is no video" in note


def test_runs_of_one_name_are_called_by_their_folders(tmp_path: Path) -> None:
    runs = [read_run_files(plant_run(tmp_path / name / "x", steps=2)) for name in ("a", "b")]
    runs.append(read_run_files(plant_run(tmp_path / "c", name="other", steps=2)))
    assert [run.name for run in told_apart(runs)] == ["a/x", "b/x", "other"]


def test_films_are_of_prompts_from_the_first_to_the_last(tmp_path: Path) -> None:
    for index in range(8):
        write_mp4(tmp_path / f"{index:03d}-student.mp4", np.zeros((2, 16, 16, 3), np.uint8), FPS)
    shown = [Column("Now", "", tmp_path, "student", {index: str(index) for index in range(8)})]
    assert [film.prompt for film in films(shown)[0]] == ["0", "2", "5", "7"]


def test_the_page_of_a_run_that_goes_on_loads_itself_again(folder: Path) -> None:
    update_page(folder, is_running=True)
    assert REFRESH in (folder / NAME).read_text(encoding="utf-8")
    update_page(folder, is_running=False)
    assert REFRESH not in (folder / NAME).read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = (folder / NAME).read_bytes() if (folder / NAME).exists() else None
    monkeypatch.setattr(page_module, "_asset", lambda name: Path("/no/such/file").read_text(encoding="utf-8"))
    page_module._template.cache_clear()
    with caplog.at_level(logging.WARNING):
        update_page(folder, is_running=True)
    page_module._template.cache_clear()
    assert [record.message.count("\n") for record in caplog.records] == [0]
    assert "was not written" in caplog.text and "the run goes on" in caplog.text
    assert before == ((folder / NAME).read_bytes() if (folder / NAME).exists() else None)
    assert not list(folder.glob("*.tmp-*"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{tmp}/none"], "there is no such folder"),
        (["{tmp}"], "has neither metrics.jsonl nor config.toml"),
        (["{run}", "{run}/../planted"], "names a run twice"),
        (["{run}", "--out", "{tmp}/page.txt"], "must end in .html"),
        (["{damaged}"], "metrics.jsonl, line 2 is damaged"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: list[str], sentence: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 2}\n', encoding="utf-8")
    places = {"tmp": tmp_path, "run": folder, "damaged": damaged}
    with pytest.raises(SystemExit) as left:
        main(["report", *(word.format(**places) for word in words)])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_the_command_writes_the_page(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["report", str(folder)])
    assert str(folder / NAME) in capsys.readouterr().out
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "loss/student": 1.0}) + '\n{"step": 2, "lo', encoding="utf-8"
    )
    main(["report", str(bare), "--out", str(tmp_path / "bare.html")])
    assert "No validation yet, after 1 step" in (tmp_path / "bare.html").read_text(encoding="utf-8")
