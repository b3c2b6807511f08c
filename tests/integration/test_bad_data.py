"""Data, prompts and scorers that do not fit the run are told by `--check`; a bad row later ends in one sentence."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_media
import tiny_ti2v
import torch
import toy_family
from damaged_rows import damage
from forked import train_forked
from runs import HELPERS, REPOSITORY, TINY_SHAPES, read_metrics, tiny_argv
from toy_run import toy_trainer

from titan_distill.commands.ode_pairs import OdePairsOptions, ode_pairs
from titan_distill.data.order import SampleOrder
from titan_distill.data.parquet import LatentRow, ParquetDataset, write_rows
from titan_distill.fault_tolerance.exit_codes import EXIT_BAD_INPUT, EXIT_FAILED
from titan_distill.train import CHECK, main

TOY = REPOSITORY / "tests" / "assets" / "toy_finetune.toml"
NUM_ROWS = 64

Say = Callable[[list[str]], str]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Say:
    """Runs `--check` and returns its one sentence. It takes seconds and writes nothing."""
    monkeypatch.chdir(REPOSITORY)

    def said(argv: list[str]) -> str:
        capsys.readouterr()  # of the libraries that wrote the input
        began = time.process_time()
        assert main([*argv, CHECK]) == EXIT_BAD_INPUT
        assert time.process_time() - began < 10
        assert not (tmp_path / "run").exists()
        shown = capsys.readouterr().err
        assert shown.startswith("error: ") and len(shown.splitlines()) == 1
        return shown

    return said


def tiny_latents(folder: Path, **changes: object) -> Path:
    """Two good rows of the tiny world, and the second one changed, in a file of its own."""
    good = ParquetDataset(TINY_SHAPES / "latents.parquet")
    write_rows(folder / "a.parquet", [good[0], good[1]])
    write_rows(folder / "b.parquet", [replace(good[1], **changes)])  # type: ignore[arg-type]
    return folder


OTHER_LATENTS = {
    "another resolution": (
        {"vae_latent": torch.zeros(16, 5, 10, 12)},
        "b.parquet, row 0: latents of [16, 5, 10, 12], but pipeline_config's num_frames, height and width make "
        "[16, 5, 12, 12]",
    ),
    "another VAE": ({"vae_latent": torch.zeros(48, 5, 12, 12)}, "b.parquet, row 0: latents of [48, 5, 12, 12]"),
    "another text encoder": (
        {"text_embedding": torch.zeros(3, 4096)},
        "b.parquet, row 0: a text embedding of width 4096, but the networks take 64",
    ),
    "longer captions": (
        {"text_embedding": torch.zeros(512, 64)},
        "b.parquet, row 0: 512 text tokens, but data.max_text_tokens is 64",
    ),
    "no latent": ({"vae_latent": None}, "b.parquet, row 0: holds only text, but this job trains on latents"),
}


@pytest.mark.parametrize("case", OTHER_LATENTS)
def test_latents_of_another_run(case: str, say: Say, tmp_path: Path) -> None:
    changes, message = OTHER_LATENTS[case]
    shown = say(tiny_argv("finetune", tmp_path / "run", "--data.path", str(tiny_latents(tmp_path / "data", **changes))))
    assert message in shown and "data.max_bad_rows = 0 allows no bad row" in shown


def test_values_that_are_not_finite(say: Say, tmp_path: Path) -> None:
    data = toy_family.write_data(tmp_path / "toy.parquet")
    damage(data, 2, vae_latent_bytes=struct.pack("<64f", *[0.0] * 63, float("nan")))
    shown = say(toy_argv(data, tmp_path / "run"))
    assert f"{data}, row 2: vae_latent has non-finite values" in shown


def test_text_of_another_encoder(say: Say, tmp_path: Path) -> None:
    """Data-free distillation reads text alone, and latents that it does not need are not asked for."""
    write_rows(tmp_path / "text.parquet", [LatentRow("0", "a", torch.zeros(3, 32))])
    shown = say(tiny_argv("dmd2", tmp_path / "run", "--data.path", str(tmp_path / "text.parquet")))
    assert "text.parquet, row 0: a text embedding of width 32, but the networks take 64" in shown
    assert "max_bad_rows" not in shown, "there is no row to leave out"


def test_a_text_encoder_of_other_networks(say: Say, tmp_path: Path) -> None:
    """Prompts that the run encodes have no first row to look at; the encoder's configuration says their width."""
    pipeline = tiny_media.write_pipeline(tmp_path / "pipeline")
    shown = say(tiny_argv("dmd2", tmp_path / "run", "--pipeline_config.path", str(pipeline)))
    assert "roles.teacher takes text embeddings of width 64, but the text encoder of the run makes 16" in shown


def test_prompts_of_another_encoder_for_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    write_rows(tmp_path / "text.parquet", [LatentRow("0", "a", torch.zeros(3, 32))])
    options = OdePairsOptions(Path("train_configs/tiny_wan_kd.toml"), tmp_path / "text.parquet", tmp_path / "pairs")
    with pytest.raises(ValueError, match=r"text\.parquet: a text embedding of width 32, but the networks take 64"):
        ode_pairs(options)
    assert not (tmp_path / "pairs").exists()


def test_trajectories_of_another_schedule(say: Say, tmp_path: Path) -> None:
    good = ParquetDataset(TINY_SHAPES / "latents.parquet")[0]
    assert good.vae_latent is not None
    extra = {"trajectory": torch.stack([good.vae_latent] * 4), "trajectory_timesteps": torch.tensor([1e3, 750, 500, 0])}
    write_rows(tmp_path / "pairs.parquet", [replace(good, extra=extra)])
    shown = say(tiny_argv("kd", tmp_path / "run", "--data.path", str(tmp_path / "pairs.parquet")))
    assert "pairs.parquet, row 0: a trajectory with the timesteps [1000.0, 750.0, 500.0, 0.0], but" in shown


def test_a_first_video_that_is_too_short(say: Say, tmp_path: Path) -> None:
    pipeline = tiny_ti2v.write_pipeline(tmp_path / "pipeline")
    tiny_media.write_video(tmp_path / "clips" / "short.mp4", 5)
    (tmp_path / "videos.csv").write_text("video,prompt\nclips/short.mp4,x\n")
    argv = tiny_ti2v.arguments("finetune", pipeline, tmp_path / "videos.csv", tmp_path / "run")
    assert "videos.csv, line 2: " in (shown := say(argv)) and "has 5 frames, but a clip needs 9" in shown
    assert "max_bad_rows" not in shown, "there is no row to leave out"
    (tmp_path / "videos.csv").write_text("video,prompt\nclips/short.mp4,x\nclips/short.mp4,y\n")
    assert "data.max_bad_rows = 0 allows no bad row" in say(argv)


def test_prompts_that_cannot_be_read(say: Say, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"caption": "a cat"}\n{"title": "a dog"}\n')
    prompts = ("--validation.enabled", "true", "--validation.prompts", str(tmp_path / "prompts.jsonl"))
    shown = say(tiny_argv("dmd2", tmp_path / "run", *prompts))
    assert "prompts.jsonl, line 2: there is no prompt or caption or text or cap among the columns title" in shown


def test_prompts_that_the_scorer_does_not_know(say: Say, tmp_path: Path) -> None:
    """Before the teacher is sampled for all of them, which is when the first one would be scored."""
    (tmp_path / "prompts.txt").write_text("a red circle moving left slowly\na cat on a sofa\n")
    prompts = ("--validation.enabled", "true", "--validation.prompts", str(tmp_path / "prompts.txt"))
    shown = say(tiny_argv("dmd2", tmp_path / "run", *prompts))
    assert "validation.scorer = 'shapes' cannot rate the prompts of " in shown
    assert "caption 'a cat on a sofa' does not describe a moving shape" in shown


# A row later in training


def toy_argv(data: Path, output: Path, *overrides: str) -> list[str]:
    argv = ["--job.config_file", str(TOY), "--data.path", str(data), "--job.output_dir", str(output)]
    return [*argv, "--training.local_batch_size", "4", *overrides]


def later_bad_row(folder: Path, sample_id: int) -> tuple[Path, int]:
    """Toy data in which the row of one sample has a latent of another size. Returns the file and the row."""
    data, row = toy_family.write_data(folder / "toy.parquet", NUM_ROWS), SampleOrder(NUM_ROWS, seed=0).row(sample_id)
    assert row > 4, "not one of the first"
    damage(data, row, vae_latent_shape=[2])
    return data, row


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_row_later_is_one_sentence(num_workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, row = later_bad_row(tmp_path, sample_id=8 * 3 + 1)
    argv = toy_argv(data, tmp_path / "run", "--data.num_workers", str(num_workers))
    assert main(argv) == EXIT_BAD_INPUT
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]
    assert capsys.readouterr().err == (
        f"error: {data}, row {row}: vae_latent_shape is [2]: expected 4 positive sizes; data.max_bad_rows = 0 allows "
        "no bad row: correct the data or raise it\n"
    )
    assert main([*argv, "--data.max_bad_rows", "1", "--job.output_dir", str(tmp_path / "tolerant")]) == 0


SENTENCE = "vae_latent_shape is [2]: expected 4 positive sizes; data.max_bad_rows = 0 allows no bad row: correct"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_row_of_one_rank_is_every_ranks_sentence(num_workers: int, tmp_path: Path) -> None:
    """The second rank reads it; the first is told before it waits for the other in a collective."""
    data, row = later_bad_row(tmp_path, sample_id=8 * 3 + 6)
    argv = toy_argv(data, tmp_path / "run", "--data.num_workers", str(num_workers))
    assert train_forked(2, argv, tmp_path) == [EXIT_BAD_INPUT] * 2
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]
    for rank in range(2):
        shown = (tmp_path / f"rank{rank}.txt").read_text()
        assert f"error: {data}, row {row}: {SENTENCE}" in shown and "Traceback" not in shown


@pytest.mark.nightly
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_row_of_two_ranks_is_one_sentence_of_the_launcher(num_workers: int, tmp_path: Path) -> None:
    """Only rank 0's output is shown. torchrun adds no more than that processes ended."""
    data, row = later_bad_row(tmp_path, sample_id=8 * 3 + 6)
    done = subprocess.run(
        ["./run_train.sh", *toy_argv(data, tmp_path / "run", "--data.num_workers", str(num_workers))],
        cwd=REPOSITORY,
        env={
            **os.environ, "NGPU": "2", "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == EXIT_BAD_INPUT, done.stderr[-3000:]
    _, _, after = done.stderr.partition(f"error: {data}, row {row}: {SENTENCE}")
    assert "error: " in done.stderr and len(after.splitlines()) <= 3, done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("kind", [TypeError, ValueError])
def test_a_fault_of_one_ranks_adapter(kind: type[Exception], tmp_path: Path) -> None:
    """A sentence is every rank's. A fault of the code keeps its traceback, on its own rank only."""

    def break_second_rank() -> None:
        def prepare_batch(self: object, batch: object) -> None:
            raise kind("a fault of the adapter")

        if os.environ["RANK"] == "1":
            toy_family.ToyAdapter.prepare_batch = prepare_batch

    argv = toy_argv(toy_family.write_data(tmp_path / "toy.parquet", NUM_ROWS), tmp_path / "run")
    codes = train_forked(2, argv, tmp_path, before=break_second_rank)
    first, second = ((tmp_path / f"rank{rank}.txt").read_text() for rank in range(2))
    assert "Traceback" not in first
    if kind is ValueError:
        assert codes == [EXIT_BAD_INPUT] * 2 and "Traceback" not in second
        assert [shown.count("error: a fault of the adapter\n") for shown in (first, second)] == [1, 1]
    else:
        assert codes == [EXIT_FAILED] * 2
        assert "error: rank 1 failed with TypeError: a fault of the adapter\n" in first
        assert second.count("Traceback") == 1 and "in prepare_batch" in second
        assert second.endswith("TypeError: a fault of the adapter\n")


def test_a_fault_of_the_reader_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collate(*arguments: object) -> None:
        raise TypeError("a fault of the reader")

    trainer = toy_trainer(tmp_path, "finetune")
    monkeypatch.setattr("titan_distill.data.loader.collate", collate)
    with pytest.raises(RuntimeError, match=r"can't load samples 0 to 7 .*: TypeError: a fault of the reader") as error:
        trainer.run()
    assert "test_bad_data.py" in str(error.value.__cause__) and "in collate" in str(error.value.__cause__)


def test_a_tolerated_first_row_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = toy_family.write_data(tmp_path / "toy.parquet", NUM_ROWS)
    damage(data, 2, vae_latent_shape=[2])
    assert main(toy_argv(data, tmp_path / "run", "--data.max_bad_rows", "1", "--training.steps", "1")) == 0
    assert sum("bad row 1 of at most 1" in message for message in caplog.messages) == 1
