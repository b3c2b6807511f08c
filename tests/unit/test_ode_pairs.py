"""`titan-distill data ode-pairs` on the small Wan: what is written is the teacher's own sampling, whoever writes it."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from forked import train_forked
from runs import REPOSITORY, TINY_SHAPES, TINY_WAN
from torch import Tensor
from torch.nn.functional import pad

from titan_distill import cli
from titan_distill.commands.ode_pairs import OdePairsOptions, initial_noise, ode_pairs
from titan_distill.commands.pair_identity import SETTINGS
from titan_distill.data.parquet import LatentRow, ParquetDataset, write_rows
from titan_distill.diffusion import sampler, schedule
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.diffusion.trajectory import grid_indices, sample_trajectory
from titan_distill.models.wan.state_dict import load_weights, read_config
from titan_distill.models.wan.text_encoder import TextEncoder
from titan_distill.models.wan.transformer import WanTransformer

JOB = REPOSITORY / "train_configs" / "tiny_wan_kd.toml"
TENSORS = ("trajectory", "trajectory_timesteps")
SHAPE = (16, 5, 12, 12)
STEPS = 4


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def options(out: Path, **changes: object) -> OdePairsOptions:
    default = OdePairsOptions(
        JOB, TINY_SHAPES / "prompts.parquet", out, num_pairs=3, num_steps=STEPS, batch_size=2, dtype="float32"
    )
    return dataclasses.replace(default, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pairs in two files."""
    out = tmp_path_factory.mktemp("made") / "pairs"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        ode_pairs(options(out))
    return out


def rows_of(folder: Path) -> list[LatentRow]:
    dataset = ParquetDataset(folder, tensors=TENSORS)
    return [dataset.read(index) for index in range(len(dataset))]


def assert_same(found: list[LatentRow], expected: list[LatentRow], tolerance: float = 0.0) -> None:
    assert [row.id for row in found] == [row.id for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row.caption == other.caption and torch.equal(row.text_embedding, other.text_embedding)
        assert row.vae_latent is not None and other.vae_latent is not None
        torch.testing.assert_close(row.vae_latent, other.vae_latent, rtol=0, atol=tolerance)
        for name in TENSORS:
            torch.testing.assert_close(row.extra[name], other.extra[name], rtol=0, atol=tolerance)


def test_pairs_are_the_teachers_guided_sampling(pairs: Path) -> None:
    """Against the transformer, the text encoder and `sample_ode` put together by hand."""
    model = WanTransformer(read_config(TINY_WAN / "transformer"))
    load_weights(model, TINY_WAN / "transformer")
    encoder = TextEncoder(TINY_WAN)
    rows = rows_of(pairs)
    assert [row.id for row in rows] == ["0-000000", "0-000001", "0-000002"]
    source = ParquetDataset(TINY_SHAPES / "prompts.parquet")
    for indices in ((0, 1), (2,)):  # a file each, and the batches in which they were made: then every bit agrees
        captions = [rows[index].caption for index in indices]
        assert captions == [source[index].caption for index in indices]
        stored = [rows[index].text_embedding.float() for index in indices]
        stored_BLD = torch.stack([pad(embedding, (0, 0, 0, 64 - len(embedding))) for embedding in stored])
        torch.testing.assert_close(stored_BLD, encoder.encode(captions, 64), rtol=1e-3, atol=1e-3)
        text = torch.cat([stored_BLD, encoder.encode([""] * len(indices), 64)])
        noise = KeyedNoise(0).normal("ode_pairs/noise", 0, indices, SHAPE, device="cpu")
        states: list[Tensor] = []

        def velocity(x: Tensor, sigma_B: Tensor, text: Tensor = text, states: list[Tensor] = states) -> Tensor:
            states.append(x)
            both = model(torch.cat([x, x]), schedule.timestep(torch.cat([sigma_B, sigma_B])), text)
            conditional, unconditional = both.chunk(2)
            return unconditional + 3.0 * (conditional - unconditional)

        ends = sampler.sample_ode(velocity, noise, num_steps=STEPS, shift=3.0, solver="euler")
        for place, index in enumerate(indices):
            row, own_states = rows[index], torch.stack([x[place] for x in states])
            assert row.vae_latent is not None
            torch.testing.assert_close(row.vae_latent, ends[place], rtol=0, atol=1e-6)
            torch.testing.assert_close(row.extra["trajectory"], own_states, rtol=0, atol=1e-6)
            assert torch.equal(row.extra["trajectory"][0], initial_noise(row.id, SHAPE))
            assert row.extra["trajectory_timesteps"].tolist() == pytest.approx([1000.0, 900.0, 750.0, 500.0])
    made = [row.vae_latent for row in rows]
    assert all((a - b).abs().mean() > 0.05 for a, b in pairwise(made))  # type: ignore[operator]


def test_only_what_is_missing_is_made(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    out.mkdir()
    for file in pairs.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    assert sorted(path.name for path in out.glob("*.parquet")) == [
        "pairs-000000-000001.parquet",
        "pairs-000002-000002.parquet",
    ]
    assert ode_pairs(options(out)) == f"{out}: all 3 pairs are there"

    (out / "pairs-000000-000001.parquet").unlink()
    kept = (out / "pairs-000002-000002.parquet").stat().st_ino
    assert ode_pairs(options(out)) == f"{out}: 3 pairs, 2 of them made now"
    assert (out / "pairs-000002-000002.parquet").stat().st_ino == kept
    assert_same(rows_of(out), rows_of(pairs))

    assert "4 pairs, 1 of them made now" in ode_pairs(options(out, num_pairs=4))
    assert (out / "pairs-000003-000003.parquet").is_file()
    assert_same(rows_of(out)[:3], rows_of(pairs))
    assert not [path for path in out.iterdir() if "tmp" in path.name]


def test_two_ranks_write_the_same_files_as_one(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    argv = ["data", "ode-pairs", str(JOB), "--prompts", str(TINY_SHAPES / "prompts.parquet"), "--out", str(out)]
    argv += ["--num-pairs", "3", "--num-steps", str(STEPS), "--batch-size", "2", "--dtype", "float32"]
    codes = train_forked(2, argv, tmp_path, main=cli.main)
    assert codes == [0, 0], (tmp_path / "rank0.txt").read_text()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in pairs.iterdir())
    assert (out / SETTINGS).read_text() == (pairs / SETTINGS).read_text()
    assert_same(rows_of(out), rows_of(pairs), tolerance=1e-5)


def test_dtype_solver_and_prompts_from_text(pairs: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{rows_of(pairs)[0].caption}\n")
    # UniPC's own grid at shift 3; its first three levels
    times = tuple((sampler.grid_sigmas(STEPS, 3.0, "unipc")[:3] * 1000).tolist())
    rounded = tuple(round(time, 2) for time in times)
    changes = {"prompts": prompts, "num_pairs": 2, "dtype": "bfloat16", "solver": "unipc", "times": rounded}
    ode_pairs(options(tmp_path / "pairs", **changes))
    first, second = rows_of(tmp_path / "pairs")
    assert first.caption == second.caption and first.vae_latent is not None and second.vae_latent is not None
    assert first.vae_latent.dtype == first.extra["trajectory"].dtype == torch.bfloat16
    assert first.extra["trajectory_timesteps"].dtype == torch.float32
    assert first.extra["trajectory_timesteps"].tolist() == pytest.approx(times, abs=0.006)
    assert (first.vae_latent - second.vae_latent).abs().mean() > 0.05, "a repeated prompt starts from other noise"
    expected = rows_of(pairs)[0]
    assert torch.equal(first.extra["trajectory"][0], expected.extra["trajectory"][0].bfloat16())
    assert not torch.equal(first.vae_latent, expected.vae_latent.bfloat16())  # type: ignore[union-attr]


def test_a_time_off_the_grid_is_refused_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["data", "ode-pairs", str(JOB), "--prompts", str(tmp_path / "none"), "--out", str(tmp_path / "pairs")]
    with pytest.raises(SystemExit) as leaving:
        cli.main([*argv, "--num-steps", "48", "--times", "1000", "910", "500"])
    assert leaving.value.code == 2
    shown = capsys.readouterr().err.strip()
    assert "timestep 910.00 is not on the grid of euler with 48 steps at shift 3" in shown
    assert "whose nearest are 919.35 and 909.84; choose" in shown
    assert "\n" not in shown and not (tmp_path / "pairs").exists()


REFUSED = {
    "other settings": ({"guidance_scale": 4.0}, r"holds pairs made with guidance_scale = 3\.0, not 4\.0"),
    "another seed": ({"seed": 1}, "made with seed = 0, not 1"),
    "another number of steps": ({"num_steps": 8}, "made with num_steps = 4, not 8"),
    "no pairs": ({"num_pairs": 0}, "must be at least 1"),
    "missing prompts": ({"prompts": Path("none.txt")}, r"none\.txt cannot be read"),
    "a job without trajectories": (
        {"config": REPOSITORY / "train_configs" / "tiny_wan_dmd2.toml"},
        "'dmd2' .* says nothing about them; give --times, --solver, --guidance-scale",
    ),
    "a job without teacher": (
        {"config": REPOSITORY / "train_configs" / "tiny_wan_finetune.toml"},
        r"has no \[roles\.teacher\]; add it, or name its folder by --teacher",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str, pairs: Path) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        ode_pairs(options(pairs, **changes))
    assert "\n" not in str(error.value)


def test_a_folder_with_other_data_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", [LatentRow("a", "a cat", torch.ones(1, 64))])
    with pytest.raises(ValueError, match=f"holds parquet files that are no pairs \\({SETTINGS} is missing"):
        ode_pairs(options(tmp_path))


def test_settings_name_what_the_pairs_depend_on(pairs: Path) -> None:
    settings = json.loads((pairs / SETTINGS).read_text())
    assert settings["guidance_scale"] == 3.0 and settings["num_steps"] == STEPS and settings["solver"] == "euler"
    assert settings["pipeline_config.flow_shift"] == 3.0 and settings["teacher"] == "tests/assets/tiny_wan"


# --- the pure part


def test_grid_indices() -> None:
    warped = schedule.few_step_sigmas([1000, 750, 500, 250], 8.0, warp=True).tolist()
    assert grid_indices(warped, num_steps=48, shift=8.0, solver="euler") == [0, 12, 24, 36]
    causvid = schedule.few_step_sigmas([1000, 280, 120], 8.0, warp=True).tolist()
    assert grid_indices(causvid, num_steps=50, shift=8.0, solver="euler") == [0, 36, 44]
    assert grid_indices([1.0, 0.75676, 0.52174], num_steps=50, shift=8.0, solver="euler") == [0, 36, 44]
    assert grid_indices([1.0], num_steps=8, shift=8.0, solver="unipc") == [0]
    for sigma, solver in ((0.757, "euler"), (0.0, "euler"), (warped[1], "unipc")):
        with pytest.raises(ValueError, match="is not on the grid of"):
            grid_indices([sigma], num_steps=50, shift=8.0, solver=solver)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"timestep 757\.00 .* nearest are 774\.19 and 756\.76; choose"):
        grid_indices([0.757], num_steps=50, shift=8.0, solver="euler")


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_trajectory_is_what_the_network_saw(solver: sampler.Solver) -> None:
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    seen = []

    def velocity(x: Tensor, sigma_B: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.sin(3 * x) + sigma_B[:, None, None].to(x.dtype)

    states_BK, x0 = sample_trajectory(velocity, noise, [0, 3, 6], num_steps=7, shift=3.0, solver=solver)
    assert torch.equal(states_BK, torch.stack([seen[0], seen[3], seen[6]], 1)) and torch.equal(states_BK[:, 0], noise)
    assert torch.equal(x0, sampler.sample_ode(velocity, noise, num_steps=7, shift=3.0, solver=solver))
    assert len(sampler.grid_sigmas(7, 3.0, solver)) == 8
