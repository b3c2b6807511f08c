"""Held-out loss: a known value, of every method, the same on two ranks and after a resume, and no trace in training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import toy_family
from forked import train_forked
from runs import read_metrics
from toy_run import ASSETS, JOBS, toy_pairs, toy_trainer

from titan_distill.data.parquet import LatentRow, ParquetDataset, write_rows
from titan_distill.diffusion.noise import FixedNoise, KeyedNoise
from titan_distill.train import main

NUM_ROWS = 5
"""An odd number: over two ranks, the last row of the second one is a repetition, which must not count."""
UNUSED = ("time/", "memory_gib", "samples_seen")


def write_held_out(folder: Path, method: str = "finetune") -> tuple[str, ...]:
    """Writes rows that training does not have. Returns the options that name them."""
    rows = toy_family.write_data(folder / "held_out.parquet", NUM_ROWS + 3, seed=1)
    if method == "knowledge_distillation":
        (folder / "other").mkdir(exist_ok=True)
        rows = toy_pairs(folder / "other", rows, num_pairs=NUM_ROWS + 3)
    return "--validation.data", str(rows), "--validation.num_rows", str(NUM_ROWS)


def validations(folder: Path) -> dict[int, dict[str, float]]:
    lines = {line["step"]: line for line in read_metrics(folder)}
    found = {s: {k: v for k, v in line.items() if k.startswith("validation/")} for s, line in lines.items()}
    return {step: values for step, values in found.items() if values}


def curve(folder: Path) -> list[dict[str, float]]:
    """What training logs, without validation and without what a clock measures."""
    skipped = (*UNUSED, "validation/")
    return [{k: v for k, v in line.items() if not k.startswith(skipped)} for line in read_metrics(folder)]


def test_finetune_at_eight_levels(tmp_path: Path) -> None:
    """The loss of each level, written out: mean over rows of mean (v − (ε − x0))² at x = (1 − σ) x0 + σ ε."""
    options = (*write_held_out(tmp_path), "--method_config.cfg_dropout", "0", "--pipeline_config.flow_shift", "3")
    trainer = toy_trainer(tmp_path, "finetune", *options, "--training.local_batch_size", "2")
    trainer.validate()
    trainer.metrics.close()
    rows, network = ParquetDataset(tmp_path / "held_out.parquet"), trainer.roles["student"].transformer
    expected = {}
    for level in range(8):
        u = (level + 0.5) / 8
        sigma = 3 * u / (1 + 2 * u)
        losses = []
        for index in range(NUM_ROWS):
            latent = rows[index].vae_latent
            assert latent is not None
            x0 = latent.view(1, -1).double()
            noise = FixedNoise(0, 0).normal("finetune/noise", 0, [index], x0.shape[1:], device="cpu").double()
            x = (1 - sigma) * x0 + sigma * noise
            with torch.no_grad():
                velocity = network(x.float(), torch.tensor([[sigma]], dtype=torch.float32), torch.ones(1, 1)).double()
            losses.append(float((velocity - (noise - x0)).square().mean()))
        expected[f"validation/loss/student/timestep_{1000 * sigma:.1f}"] = sum(losses) / NUM_ROWS
    expected["validation/loss/student"] = sum(expected.values()) / 8
    assert validations(tmp_path / "run")[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", JOBS)
def test_every_method_has_a_held_out_loss(method: str, tmp_path: Path) -> None:
    """Of each trained role, finite, at the first step and the last, without gradients and without a trace in training's
    numbers. Normalised weights of a divergence run over all held-out rows."""
    options = ("--training.steps", "3", "--training.local_batch_size", "4", "--checkpoint.enabled", "false")
    if method == "adversarial":
        options += ("--method_config.f_divergence", "jensen_shannon")
    if method == "rcm":
        options += ("--method_config.tangent_warmup", "1")  # until then only the student trains
    plain = toy_trainer(tmp_path, method, *options)
    plain.run()
    plain.metrics.close()
    shutil.move(tmp_path / "run", tmp_path / "plain")
    trainer = toy_trainer(tmp_path, method, *options, *write_held_out(tmp_path, method), "--validation.interval", "2")
    state = torch.get_rng_state()
    trainer.validate()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for role in trainer.roles for p in role.network.parameters())
    trainer.run()
    trainer.metrics.close()
    assert curve(tmp_path / "run")[1:] == curve(tmp_path / "plain")
    found = validations(tmp_path / "run")
    assert list(found) == [0, 2, 3]
    for values in found.values():
        assert all(torch.tensor(value).isfinite() for value in values.values())
    assert {f"validation/loss/{role.name}" for role in trainer.roles.trainable} <= found[3].keys()
    if method == "scm":
        assert "validation/scm/tangent_size" in found[0]


@pytest.mark.parametrize("method", ["finetune", "adversarial"])
def test_two_ranks_measure_the_same(method: str, tmp_path: Path) -> None:
    options = (
        "--job.config_file", str(ASSETS / f"toy_{method}.toml"), *write_held_out(tmp_path),
        "--data.path", str(toy_family.write_data(tmp_path / "toy.parquet")), "--validation.interval", "4",
        *(("--method_config.f_divergence", "jensen_shannon") if method == "adversarial" else ()),
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*options, "--job.output_dir", str(one), "--training.local_batch_size", "8"]) == 0
    argv = [*options, "--job.output_dir", str(two), "--training.local_batch_size", "2"]
    assert train_forked(2, argv, tmp_path) == [0, 0], (tmp_path / "rank0.txt").read_text()
    expected, found = validations(one), validations(two)
    assert list(found) == list(expected) == [0, 4, 8]
    for step, tolerance in ((0, 1e-6), (4, 1e-5), (8, 1e-5)):
        assert found[step] == pytest.approx(expected[step], rel=tolerance, abs=0)
    key = "validation/loss/student/timestep_562.5" if method == "finetune" else "validation/loss/critic"
    assert abs(expected[8][key] / expected[0][key] - 1) > 1e-3, "eight steps change nothing"


def test_a_resumed_run_measures_the_same_bits(tmp_path: Path) -> None:
    options = (*write_held_out(tmp_path), "--validation.interval", "2", "--checkpoint.enabled", "true")
    whole = toy_trainer(tmp_path, "dmd2", *options, "--training.steps", "6")
    whole.run()
    whole.metrics.close()
    expected = validations(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    first = toy_trainer(tmp_path, "dmd2", *options, "--training.steps", "3")
    first.run()
    first.metrics.close()
    resume = ("--checkpoint.resume_from", str(tmp_path / "run" / "checkpoints" / "step-00000003"))
    second = toy_trainer(tmp_path, "dmd2", *options, *resume, "--training.steps", "6")
    second.run()
    second.metrics.close()
    found = validations(tmp_path / "run")
    assert [found[step] for step in (4, 6)] == [expected[step] for step in (4, 6)]
    assert expected[4] != expected[6]


def test_fixed_noise_knows_no_step_and_is_not_that_of_training() -> None:
    fixed, other = FixedNoise(0, 0), FixedNoise(0, 1)
    first = fixed.normal("a", 3, [5], (4,), device="cpu")
    assert torch.equal(first, fixed.normal("a", 8, [5], (4,), device="cpu"))
    assert not torch.equal(first, other.normal("a", 3, [5], (4,), device="cpu"))
    assert not torch.equal(first, KeyedNoise(0).normal("a", 0, [5], (4,), device="cpu"))
    assert fixed.uniform("a", 1, [2]) == fixed.uniform("a", 9, [2]) != other.uniform("a", 9, [2])
    assert {FixedNoise(0, draw).index("exit", 0, 2) for draw in range(16)} == {0, 1}


def test_wrong_rows_are_told_before_anything_is_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = toy_family.write_data(tmp_path / "a" / "toy.parquet")
    argv = ["--job.config_file", str(ASSETS / "toy_finetune.toml"), "--job.output_dir", str(tmp_path / "run")]
    argv += ["--data.path", str(data), "--check"]

    def refused(*options: str) -> str:
        assert main([*argv, *options]) == 2
        return capsys.readouterr().err

    assert "is data that the run trains on" in refused("--validation.data", str(data))
    (tmp_path / "b").mkdir()
    shutil.copy(data, tmp_path / "b" / "toy.parquet")
    assert "holds files that the run trains on" in refused("--validation.data", str(tmp_path / "b" / "toy.parquet"))
    both = tmp_path / "both"
    for name, seed in (("1", 0), ("2", 1)):
        toy_family.write_data(both / f"{name}.parquet", seed=seed)
    argv[argv.index(str(data))] = str(both)
    message = refused("--validation.data", str(both / "2.parquet"))
    assert f"holds {both / '2.parquet'} that the run trains on; name rows that are left out of it" in message
    argv[argv.index(str(both))] = str(data)
    (tmp_path / "videos.csv").write_text("video,prompt\na.mp4,x\n")
    assert "is a table of videos, but the run trains on parquet" in refused(
        "--validation.data", str(tmp_path / "videos.csv")
    )
    assert "validation.data = " in refused("--validation.data", str(tmp_path / "none.parquet"))
    assert 'num_rows = 3 has no effect with data = ""' in refused("--validation.num_rows", "3")
    rows = [
        LatentRow(str(i), "x", torch.ones(2 if i == 6 else 1, 1), torch.zeros(64, 1, 1, 1)) for i in range(8)
    ]  # row 6 has more text tokens than data.max_text_tokens
    write_rows(tmp_path / "long.parquet", rows)
    long = ("--validation.data", str(tmp_path / "long.parquet"), "--data.max_bad_rows", "3")
    assert "2 text tokens, but data.max_text_tokens is 1" in refused(*long)
    assert main([*argv, *long, "--validation.num_rows", "6"]) == 0
