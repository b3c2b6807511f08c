"""From a Self-Forcing run to a video longer than any in it, through the real commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import REPOSITORY, tiny_argv

from titan_distill import cli
from titan_distill.train import main

# Three latent frames, blocks of one and two.
SHORT = (
    "--roles.student.init_from", "tests/assets/tiny_wan/transformer",
    "--pipeline_config.num_frames", "9",
    "--method_config.denoising_steps", "[1000.0, 500.0]",
    "--training.steps", "1",
    "--checkpoint.interval", "1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        assert main(tiny_argv("self_forcing", output, *SHORT)) == 0
    return output / "checkpoints" / "latest"


def generate(checkpoint: Path, out: Path, *options: str) -> None:
    prompt = ("--prompt", "a red circle moving left")
    cli.main(["generate", "--checkpoint", str(checkpoint), "--out", str(out), *prompt, *options])


def num_frames(video: Path) -> int:
    import av

    with av.open(str(video)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_video_longer_than_in_training(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "long.mp4"
    window = ("--cache-window-frames", "3", "--sink-frames", "1")
    generate(checkpoint, out, "--num-frames", "33", *window)
    assert num_frames(out) == 33


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--num-frames", "13"), "num_frames = 13 makes 4 latent frames"),
        (("--num-frames", "12"), "num_frames = 12 must be 4 n + 1 for the VAE; the nearest is 13"),
        (("--role", "critic"), "'self_forcing' does not say how to sample from its critic"),
        (("--guidance-scale", "3"), "sample the role 'student' with 1"),
        (("--sink-frames", "2"), "sink_frames = 2 must be less than cache_window_frames = 0"),
    ],
)
def test_wrong_options(
    options: tuple[str, ...], sentence: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        generate(checkpoint, tmp_path / "video.mp4", *options)
    assert leaving.value.code == 2
    assert sentence in capsys.readouterr().err
