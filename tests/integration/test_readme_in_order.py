"""The README as a stranger follows it: every command, in order, in one folder, on what earlier ones made (nightly).

Only sizes differ, by the rule in `tests/helpers/readme.py`. The folder has the repository's content and the reader's
own: FOLDER, footage with captions, and PIPELINE, an image-to-video pipeline of random weights.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from readme import COMMANDS, INSTALLATION, PLACEHOLDERS, small
from runs import REPOSITORY, read_metrics
from tiny_i2v import write_i2v_pipeline
from tiny_media import write_film

from titan_distill.cli import EXIT_DIFFERENT

BROUGHT = {"run_train.sh", "train_configs", "tests", "titan_distill", "kernels", "examples", "docs"}
RUN = [command for command in COMMANDS if not command.startswith(INSTALLATION)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stranger")
    for name in BROUGHT:
        (folder / name).symlink_to(REPOSITORY / name)
    bring(folder)
    return folder


def bring(folder: Path) -> None:
    """Makes what the reader's words stand for."""
    footage, pipeline = (folder / name for name in PLACEHOLDERS)
    for seed, name in enumerate(("clouds.mp4", "meadow.mp4")):
        write_film(footage / name, seed)
    (footage / "captions.csv").write_text("file_name,caption\nclouds.mp4,clouds at dusk\nmeadow.mp4,a meadow\n")
    write_i2v_pipeline(pipeline)


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(folder / name) for name in (".", "kernels", "examples")]
    program = f'titan-distill() {{ "{sys.executable}" -m titan_distill.cli "$@"; }}'
    return subprocess.run(
        ["bash", "-c", f"{program}\n{small(command)}"],
        cwd=folder, env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("index", range(len(RUN)), ids=lambda index: f"{index:02d}")
def test_command(index: int, folder: Path) -> None:
    command = RUN[index]
    done = run(command, folder)
    expected = EXIT_DIFFERENT if "checkpoint diff" in command else 0
    assert done.returncode == expected, f"{small(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr


@pytest.mark.nightly
def test_the_commands_left_what_the_text_promises(folder: Path) -> None:
    outputs = folder / "outputs"
    for name in ("circle.mp4", "from_picture.mp4", "long.mp4", "exported/model_index.json", "exported/vae/config.json"):
        assert (folder / name).is_file(), name
    assert (outputs / "tiny_wan_dmd2/validation/step-00000002/contact_sheet.png").is_file()
    runs = ("tiny_wan_dmd2", "short", "four_ranks", "stage_two", "tiny_wan_finetune", "i2v", "tiny_wan_self_forcing")
    for name in runs:
        assert read_metrics(outputs / name)[-1]["step"] == 2
        assert (outputs / name / "checkpoints/step-00000002/manifest.json").is_file()
    assert len(list((outputs / "tiny_wan_pairs").glob("*.parquet"))) == 1  # the second request found it
