"""A new stage starts from a role of an older run: `init_from = ".../latest#student:ema"`, through the real command."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomllib
import torch
from runs import REPOSITORY, TINY_WAN, read_metrics, tiny_argv
from small_checkpoints import write_weights_only

from titan_distill.checkpoint.diffusers_folder import open_folder
from titan_distill.checkpoint.tools.contents import role_tensors
from titan_distill.config.loading import load_config
from titan_distill.parallelisms.mesh import World
from titan_distill.resolve import resolve
from titan_distill.train import assemble, main


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finetuned sparse student, raw and averaged."""
    output = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        assert main(tiny_argv("sparse", output, "--training.steps", "2", "--checkpoint.interval", "2")) == 0
    return output


def next_stage(first: Path, output: Path, weights: str, *overrides: str) -> list[str]:
    reference = f"{first / 'checkpoints' / 'latest'}#student{weights}"
    return tiny_argv(
        "dmd2_sparse", output, "--training.steps", "2", "--roles.student.path", "",
        "--roles.student.init_from", reference, *overrides,
    )  # fmt: skip


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_next_stage_starts_from_what_was_named(weights: str, first_stage: Path, tmp_path: Path) -> None:
    run = resolve(load_config(next_stage(first_stage, tmp_path, f":{weights}")), 1)
    step = first_stage / "checkpoints" / "step-00000002"
    assert run.config.roles["student"].init_from == f"{step}#student:{weights}"
    trainer = assemble(run, World(rank=0, size=1, device=torch.device("cpu")))
    expected = dict(role_tensors(step, "student", use_ema=weights == "ema"))
    found = dict(trainer.roles["student"].transformer.named_parameters())
    assert found.keys() == expected.keys() and any("to_gate_compress" in name for name in found)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_run_says_which_step_it_came_from(first_stage: Path, tmp_path: Path) -> None:
    assert main(next_stage(first_stage, tmp_path, ":ema")) == 0
    written = tomllib.loads((tmp_path / "config.toml").read_text())
    assert written["roles"]["student"]["init_from"].endswith("step-00000002#student:ema")
    assert [line["vsa_sparsity"] for line in read_metrics(tmp_path)] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("weights", "overrides", "sentence"),
    [
        ("", (), "has two sets of weights of 'student'; write #student:ema or #student:raw"),
        (":mean", (), "names no weights of a checkpoint; write PATH#ROLE"),
        ("s:ema", (), "has no role 'students'; it has student"),
        (":ema", ("--roles.student.attention", "dense", "--roles.critic.attention", "sparse"), "set roles.student"),
        (":ema", ("--roles.student.flavor", "1.3B"), "num_layers is 6 instead of 30"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    weights: str,
    overrides: tuple[str, ...],
    sentence: str,
    first_stage: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(next_stage(first_stage, tmp_path, weights, *overrides)) == 2
    assert sentence in capsys.readouterr().err


def test_weights_that_were_imported_before_are_a_start_too(first_stage: Path, tmp_path: Path) -> None:
    source = open_folder(TINY_WAN)
    tensors = {name: source.read(name) for name in source.shapes}
    imported = write_weights_only(tmp_path / "imported", {"transformer": tensors}, source.architecture)
    overrides = ("--roles.teacher.path", "", "--roles.teacher.init_from", f"{imported}#student")
    argv = next_stage(first_stage, tmp_path / "run", ":raw", *overrides, "--training.steps", "1")
    assert main(argv) == 0
