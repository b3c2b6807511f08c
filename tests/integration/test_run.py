"""The default job through its launcher, shortened, with every tracker on; then what users do with its result."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import REPOSITORY, TINY_WAN, read_metrics
from torch.distributed.checkpoint import FileSystemReader

from titan_distill.cli import main as cli
from titan_distill.commands.generate import load_role
from titan_distill.data.footage import read_mp4
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.fault_tolerance.starts import read_starts
from titan_distill.models.base import Guidance

PROMPT = "a red circle moving left slowly"
SHORT = (
    "--training.steps", "2",
    "--validation.num_prompts", "2",
    "--validation.num_videos", "2",
    "--metrics.tensorboard", "true",
    "--metrics.wandb", "true",
    "--ema.start_step", "0",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder of a two-step default job, and what it printed."""
    output = tmp_path_factory.mktemp("run")
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567"}
    environment["PYTHON"] = sys.executable
    done = subprocess.run(
        ["./run_train.sh", "--job.output_dir", str(output), *SHORT],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "torchao" not in done.stderr and "\r" not in done.stderr  # neither a library's warning nor a bar in a log
    return output, done.stdout


def test_output_folder_holds_what_is_promised(run: tuple[Path, str]) -> None:
    output, _ = run
    shown = output / "validation" / "step-00000002"
    labels = ("teacher", "teacher_few_steps", "student_before", "student")
    assert {f"{index:03d}-{label}.mp4" for index in (0, 1) for label in labels} <= {p.name for p in shown.iterdir()}
    assert (shown / "contact_sheet.png").stat().st_size > 10_000
    video, fps = read_mp4(shown / "000-student.mp4")
    assert video.shape == (17, 96, 96, 3)
    assert fps == 8
    assert list((output / "checkpoints").iterdir()) == [output / "checkpoints" / "step-00000002"]
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("data:video/") == 2 and 'http-equiv="refresh"' not in page
    (start,) = read_starts(output)
    assert (start.step, start.num_ranks, start.config_file) == (0, 1, "train_configs/tiny_wan_dmd2.toml")
    assert ("training.steps", "800", "2") in {tuple(change) for change in start.changes or ()}
    assert list((output / "tensorboard").glob("events.*"))
    _, first, last = read_metrics(output)
    times = ("data", "rollout", "teacher", "critic", "backward", "optimizer")
    by_role = {f"{kind}/{role}" for kind in ("loss", "grad_norm", "lr") for role in ("student", "critic")}
    assert {"step", "samples_seen", "tokens_per_second", "memory_gib", *by_role} <= first.keys()
    assert {f"time/{phase}" for phase in times} <= first.keys()
    assert all(math.isfinite(value) for value in first.values())
    assert {f"validation/{label}/prompt_accuracy" for label in ("teacher", "student")} <= last.keys()
    assert {f"validation/{label}/sliced_wasserstein" for label in labels[1:]} <= last.keys()


def test_wandb_run_carries_the_resolved_file_and_no_secret(run: tuple[Path, str]) -> None:
    output, _ = run
    (folder,) = output.glob("wandb/offline-run-*")
    attached = [path for path in folder.rglob("*.toml") if path.read_text() == (output / "config.toml").read_text()]
    assert attached
    assert not any(b"0123456789abcdef0123456789abcdef" in p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_log_says_what_runs_and_ends_with_where_to_look(run: tuple[Path, str]) -> None:
    output, printed = run
    for fact in ("teacher", "frozen", "dense attention", "float32", "EMA", "memory after the first step: "):
        assert fact in printed
    facts = json.loads((output / "plan.json").read_text(encoding="utf-8"))
    assert f"  planned   peak memory {facts['memory_gib']:.2f} GiB per rank · checkpoints of " in printed
    assert facts["hours"] is facts["gpu_hours"] is facts["step_seconds"] is None  # nobody assumes rates of a CPU
    saved = output / "checkpoints/step-00000002"
    num_tensors = len(FileSystemReader(saved).read_metadata().state_dict_metadata)
    size, planned = sum(file.stat().st_size for file in saved.iterdir()), facts["checkpoint_gib"] * 2**30
    assert planned < size < planned + 2048 * num_tensors  # DCP writes a header of 1 to 2 KB for each tensor
    assert printed.strip().splitlines()[-1].endswith(str(output / "validation/step-00000002/contact_sheet.png"))


def test_generate_repeats_the_validation_video(run: tuple[Path, str], tmp_path: Path) -> None:
    """Same prompt, same noise, same weights: the frames of the mp4 are those of the validation."""
    output, _ = run
    prompt = (output / "validation/step-00000002/captions.txt").read_text().splitlines()[0].split(" ", 1)[1]
    out = tmp_path / "video.mp4"
    cli(["generate", "--checkpoint", str(output / "checkpoints/latest"), "--prompt", prompt, "--out", str(out)])
    made, _ = read_mp4(out)
    expected, _ = read_mp4(output / "validation/step-00000002/000-student.mp4")
    assert np.abs(made.astype(int) - expected.astype(int)).mean() < 1.0


def test_exported_folder_gives_the_same_video_in_diffusers(run: tuple[Path, str], tmp_path: Path) -> None:
    """UniPC with guidance through WanPipeline and through our sampler, from the same noise: equal latents."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    from titan_distill.diffusion.sampler import sample_ode

    output, _ = run
    exported = tmp_path / "exported"
    checkpoint = output / "checkpoints" / "step-00000002"
    cli(["checkpoint", "export", "--checkpoint", str(checkpoint), "--out", str(exported)])
    pipeline = WanPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    _, adapter, role, _ = load_role(checkpoint, "student", torch.device("cpu"), raw_weights=False)
    # The exported scheduler has the student's few levels; here the networks are compared in many steps.
    pipeline.scheduler = UniPCMultistepScheduler.from_pretrained(TINY_WAN / "scheduler", flow_shift=adapter.flow_shift)
    noise = KeyedNoise(3).normal("test", 0, [0], adapter.latent_shape, device="cpu")
    theirs = pipeline(
        PROMPT, negative_prompt="", height=96, width=96, num_frames=17, num_inference_steps=5, guidance_scale=4.0,
        latents=noise, max_sequence_length=64, output_type="latent",
    ).frames  # fmt: skip
    condition = adapter.encode_prompts([PROMPT])
    ours = sample_ode(
        lambda x, sigma_B: adapter.guided_velocity(role, x, sigma_B, condition, Guidance(4.0)),
        noise, num_steps=5, shift=adapter.flow_shift, solver="unipc",
    )  # fmt: skip
    assert noise.std() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        pixels = pipeline.vae.decode(theirs * _statistic(pipeline, "std") + _statistic(pipeline, "mean")).sample
    frames = pipeline.video_processor.postprocess_video(pixels, "np")
    decoded = adapter.decode_latents(ours).numpy() / 255
    assert np.abs(decoded - frames).max() < 1.5 / 255


def _statistic(pipeline: object, name: str) -> torch.Tensor:
    return torch.tensor(getattr(pipeline.vae.config, f"latents_{name}")).view(1, -1, 1, 1, 1)  # type: ignore[attr-defined]


def test_export_says_what_is_wrong(run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(run[0] / "checkpoints" / "latest")
    for arguments, expected in (
        (["--checkpoint", checkpoint, "--out", str(tmp_path)], "exists"),
        (["--checkpoint", checkpoint, "--out", str(tmp_path / "x"), "--role", "teacher"], "frozen"),
        (["--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "x")], "none"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            cli(["checkpoint", "export", *arguments])
        assert exit_info.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert expected in message
    assert not (tmp_path / "x").exists()


def test_the_pipeline_folder_is_small_and_whole() -> None:
    names = json.loads((TINY_WAN / "model_index.json").read_text())
    assert {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"} <= names.keys()
    size = sum(path.stat().st_size for path in (REPOSITORY / "tests" / "assets").rglob("*") if path.is_file())
    assert size < 15e6
