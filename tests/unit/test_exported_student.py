"""The card of an exported student: its program makes `generate`'s video where this package is not installed."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_i2v
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from exported_students import (
    BOUNDARY,
    KINDS,
    MAX_TEXT_TOKENS,
    NEGATIVE,
    NUM_FRAMES,
    PROMPT,
    SHIFT,
    SIZE,
    TEXT,
    Exported,
    Kind,
    export_student,
    save_student,
)
from safetensors.torch import load_file, save_file

from titan_distill import cli
from titan_distill.commands.export import export
from titan_distill.commands.generate import generate
from titan_distill.diffusion import schedule
from titan_distill.diffusion.requests import SampleRequest
from titan_distill.diffusion.sampler import ode_sigmas
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.exported_scheduler import exported_scheduler
from titan_distill.models.wan.original_names import save_original
from titan_distill.models.wan.snippet import MAX_LINES, Snippet
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.models.wan.vae import decode_latents, load_vae

DRIVER = """
import importlib.util, json
for name in ("titan_distill", "titan_kernels", "tiny_world"):
    assert importlib.util.find_spec(name) is None, name
from safetensors.torch import save_file
for name, program in json.load(open("programs.json", encoding="utf-8")).items():
    made = {}
    exec(compile(program, name, "exec"), made)
    save_file({"latents": made["x"].contiguous(), "video": made["video"].contiguous()}, name + ".safetensors")
"""


def sample_elsewhere(folder: Path, exported: dict[str, Exported]) -> dict[str, dict[str, torch.Tensor]]:
    """Runs the programs of the cards in a Python that has this machine's packages but not this one."""
    programs = {name: student.program(saved=str(student.saved)) for name, student in exported.items()}
    (folder / "programs.json").write_text(json.dumps(programs), encoding="utf-8")
    (folder / "driver.py").write_text(DRIVER, encoding="utf-8")
    # Without `site`, the links of editable installs are not followed.
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "driver.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "video.gif").stat().st_size > 0
    return {name: load_file(folder / f"{name}.safetensors") for name in programs}


def check_elsewhere(folder: Path, names: tuple[str, ...]) -> None:
    exported = {name: export_student(folder / name, KINDS[name]) for name in names}
    for name, made in sample_elsewhere(folder, exported).items():
        assert len(exported[name].snippet.splitlines()) <= MAX_LINES, name
        expected = exported[name].latents
        assert expected.std() > 0.1
        assert torch.allclose(made["latents"], expected, rtol=0, atol=1e-4), name
        frames = decode_latents(load_vae(exported[name].folder, "cpu"), expected)
        shown = (made["video"].clamp(-1, 1) + 1) * 127.5
        assert (shown.permute(0, 2, 3, 4, 1) - frames.float()).abs().max() < 1, name


def test_the_cards_program_makes_the_same_video_elsewhere(tmp_path: Path) -> None:
    check_elsewhere(tmp_path, ("stochastic", "first frame"))


@pytest.mark.nightly
def test_so_do_the_programs_of_all_kinds_of_students(tmp_path: Path) -> None:
    check_elsewhere(tmp_path, tuple(sorted(KINDS.keys() - {"stochastic", "first frame"})))


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["first frame", "picture channels and CLIP"])
def test_a_program_reads_a_picture_itself(name: str, tmp_path: Path) -> None:
    """A picture of the video's size is neither scaled nor cropped, so it gives the tensors that `generate` saved."""
    exported = export_student(tmp_path, KINDS[name])
    saved = load_file(exported.saved)
    noise = {key: tensor for key, tensor in saved.items() if key.startswith("noise.")}
    save_file(noise, tmp_path / "noise.safetensors")
    made = run_here(
        exported, tmp_path, saved=str(tmp_path / "noise.safetensors"), picture=str(tmp_path / "picture.png")
    )
    assert torch.allclose(made, exported.latents, rtol=0, atol=1e-4)


def run_here(exported: Exported, folder: Path, **values: str | None) -> torch.Tensor:
    made: dict[str, torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        try:
            exec(exported.program(**values), made)
        finally:
            torch.set_grad_enabled(True)
    return made["x"]


# Diffusers' own call


def own_call(exported: Exported, **more: object) -> torch.Tensor:
    """Latents of diffusers' call, whose draws come from PyTorch's global generator, here of seed 7."""
    pipe = WanPipeline.from_pretrained(exported.folder)
    torch.manual_seed(7)  # after loading, which draws too
    pipe.set_progress_bar_config(disable=True)
    size = {"height": SIZE, "width": SIZE, "num_frames": NUM_FRAMES, "max_sequence_length": MAX_TEXT_TOKENS}
    saved = load_file(exported.saved)
    return pipe(PROMPT, latents=saved["noise.0"], output_type="latent", **size, **more).frames


def test_diffusers_own_call_samples_an_euler_student(tmp_path: Path) -> None:
    exported = export_student(tmp_path, KINDS["euler"])
    made = own_call(exported, num_inference_steps=4, guidance_scale=1.0)
    assert torch.allclose(made, exported.latents, rtol=0, atol=1e-4)
    scheduler = WanPipeline.from_pretrained(exported.folder).scheduler
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["many steps", "many steps of Euler", "many steps of two experts"])
def test_diffusers_own_call_samples_a_finetuned_model(name: str, tmp_path: Path) -> None:
    exported = export_student(tmp_path, KINDS[name])
    second = {"guidance_scale_2": 2.0} if KINDS[name].has_two_experts else {}
    made = own_call(exported, num_inference_steps=5, guidance_scale=3.0, negative_prompt=NEGATIVE, **second)
    assert torch.allclose(made, exported.latents, rtol=0, atol=1e-4)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["stochastic", "unevenly spaced", "two experts"])
def test_diffusers_own_call_renoises_between_the_students_levels(name: str, tmp_path: Path) -> None:
    """With the noise of PyTorch's global generator, which the program can be given as a file."""
    exported = export_student(tmp_path, KINDS[name])
    saved = load_file(exported.saved)
    count = sum(key.startswith("noise.") for key in saved)
    made = own_call(exported, num_inference_steps=count, guidance_scale=1.0)
    torch.manual_seed(7)
    fresh = {f"noise.{i}": torch.randn(saved["noise.0"].shape) for i in range(1, count)}
    save_file({"noise.0": saved["noise.0"], **fresh}, tmp_path / "fresh.safetensors")
    expected = run_here(exported, tmp_path, saved=str(tmp_path / "fresh.safetensors"))
    assert torch.allclose(made, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(made, exported.latents, rtol=0, atol=1e-2)


@pytest.mark.nightly
def test_an_image_to_video_student_has_the_pipeline_for_pictures(tmp_path: Path) -> None:
    exported = export_student(tmp_path, KINDS["picture channels"])
    pipe = WanImageToVideoPipeline.from_pretrained(exported.folder)
    assert pipe.config.boundary_ratio == BOUNDARY and pipe.transformer_2 is not None
    assert "image=image" in exported.card


SCHEDULES = {
    "warped": schedule.few_step_sigmas((1000, 750, 500, 250), 5.0, warp=True).tolist(),
    "as listed": schedule.few_step_sigmas((1000, 757, 522), 8.0, warp=False).tolist(),
    "eight": schedule.few_step_sigmas([125 * k for k in range(8, 0, -1)], 3.0, warp=True).tolist(),
    "two": [1.0, 0.625],
    "one": [1.0],
    "many": ode_sigmas(48, 12.0).tolist()[:-1],
    "without a shift": ode_sigmas(10, 1.0).tolist()[:-1],
}


@pytest.mark.parametrize("solver", ["sde", "euler"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_exported_scheduler_has_the_students_levels(name: str, solver: str) -> None:
    levels = SCHEDULES[name]
    config = exported_scheduler(SampleRequest("student", "student", solver, len(levels), tuple(levels)), SHIFT)
    assert config["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(len(levels))
    expected = torch.tensor([*levels, 0.0])
    assert torch.allclose(scheduler.sigmas, expected, rtol=0, atol=1e-6)
    assert torch.allclose(scheduler.timesteps, 1000 * expected[:-1], rtol=0, atol=1e-3)
    assert scheduler.config.stochastic_sampling == (solver == "sde")


@pytest.mark.parametrize("levels", [(0.9, 0.5), (1.0, 0.9, 0.2, 0.1)])
def test_levels_that_no_scheduler_has_leave_the_pipelines_own(levels: tuple[float, ...]) -> None:
    assert exported_scheduler(SampleRequest("student", "student", "sde", len(levels), levels), SHIFT) == {}


def test_a_program_of_many_steps_without_a_scheduler_has_their_levels(tmp_path: Path) -> None:
    """No scheduler of diffusers has 50 levels at a shift of 30."""
    options = ("--method_config.validation_steps", "50", "--pipeline_config.flow_shift", "30.0")
    checkpoint = save_student(tmp_path, KINDS["many steps of Euler"], *options)
    export(checkpoint, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert "sigmas = [1.0, 0.99" in card and "pipe.scheduler.step" not in card
    assert "none of its schedulers has these noise levels" in card


# Original names


@pytest.mark.parametrize("architecture", [TEXT, tiny_i2v.CONFIG], ids=["text", "picture"])
def test_original_names_are_those_that_diffusers_converts(architecture: WanConfig, tmp_path: Path) -> None:
    weights = WanTransformer(architecture).state_dict()
    save_original(weights.items(), tmp_path / "x.safetensors", None)
    original = load_file(tmp_path / "x.safetensors")
    assert {"head.modulation", "blocks.0.self_attn.norm_q.weight", "blocks.0.norm3.bias"} <= original.keys()
    converted = convert_wan_transformer_to_diffusers(original)
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[name], weight) for name, weight in weights.items())


def test_an_export_with_original_names_is_one_file_per_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_student(tmp_path, KINDS["two experts"])

    def call(*words: str) -> int:
        command = ["checkpoint", "export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
        try:
            cli.main([*command, "--original", *words])
        except SystemExit as leaving:
            return int(leaving.code or 0)
        return 0

    assert call("--pipeline", str(tmp_path / "pipeline")) == 2
    assert "has no effect with --original" in capsys.readouterr().err
    assert call("--dtype", "bfloat16") == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "transformer.safetensors", "transformer_2.safetensors"]
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "transformer_2.safetensors").values()} == {
        torch.bfloat16
    }
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "shift 3, 4 steps, cfg 1, sampler `lcm`, scheduler `simple`." in card and "```python" not in card


# Cards


def test_every_program_has_at_most_25_lines() -> None:
    few, many = (1.0, 0.9, 0.75, 0.5), SampleRequest("student", "student", "unipc", 24, None, 3.0)
    requests = [SampleRequest("student", "student", solver, 4, few) for solver in ("sde", "euler")] + [many]
    requests.append(replace(many, solver="euler", guidance_scale=1.0))
    pictures = [(False, False, False), (True, False, False), (False, True, False), (False, True, True)]
    for request, (frame, channels, clip), is_double in itertools.product(requests, pictures, (False, True)):
        program = Snippet(
            request, (16, 21, 60, 104), (81, 480, 832), 16, "bfloat16", 512, "", takes_first_frame=frame,
            takes_channels=channels, takes_clip=clip, has_two_experts=is_double,
            second_scale=2.5 if is_double else None,
        ).text()  # fmt: skip
        compile(program, "program", "exec")
        assert len(program.splitlines()) <= 25, program


@pytest.mark.parametrize("attention", ["sparse", "causal"])
def test_a_student_that_diffusers_cannot_run_says_so(attention: str, tmp_path: Path) -> None:
    kind = Kind(replace(TEXT, num_layers=1), method="self_forcing" if attention == "causal" else "dmd2")
    options = ["--roles.student.attention", attention]
    options += ["--pipeline_config.frames_per_block", "1"] if attention == "causal" else []
    checkpoint = save_student(tmp_path, kind, *options)
    export(checkpoint, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert "**Neither diffusers nor ComfyUI can run this role**" in card and "```python" not in card
    if attention == "sparse":
        assert "to_gate_compress" in card
        with pytest.raises(ValueError, match=r"--original: the network has sparse attention"):
            export(checkpoint, tmp_path / "original", original=True)
        return
    with pytest.raises(ValueError, match=r"--save-noise .*the student is causal"):
        generate(checkpoint, PROMPT, tmp_path / "video.mp4", save_noise=tmp_path / "noise.safetensors")
    assert not (tmp_path / "video.mp4").exists()


def test_a_card_without_a_program_gives_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save_student(tmp_path, Kind())

    def card(name: str, role: str = "student") -> str:
        export(checkpoint, tmp_path / name, role)
        return (tmp_path / name / "README.md").read_text(encoding="utf-8")

    assert "The method `dmd2` does not say how to sample from its critic." in card("critic", "critic")
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace('method = "dmd2"', 'method = "dmd3"'))
    assert "does not load" in card("other") and "dmd3" in card("again")
    config.unlink()
    assert "`config.toml` is not beside its checkpoints" in card("without")
    with pytest.raises(SystemExit) as leaving:
        words = ["generate", "--checkpoint", str(checkpoint), "--prompt", "x", "--out", str(tmp_path / "x.mp4")]
        cli.main([*words, "--save-noise", str(tmp_path / "noise.bin")])
    assert leaving.value.code == 2 and "--save-noise" in capsys.readouterr().err
