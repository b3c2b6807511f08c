"""The documents as a stranger follows them: every command, page by page, in one folder, on what earlier ones made
(nightly), and the site that is built from them.

Only sizes differ, by the rules in `tests/helpers/documents.py`. The folder has the repository's content and what the
reader brings: FOLDER, footage with captions; PIPELINE, an image-to-video pipeline of random weights; and for
`docs/start_to_finish.md` prompts, videos, and the weights that it downloads, for which the small Wan stands in.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import DOCS, IN_ORDER, PLACEHOLDERS, Command
from runs import REPOSITORY, TINY_SHAPES, TINY_WAN, read_metrics
from tiny_i2v import write_i2v_pipeline
from tiny_media import write_film

from titan_distill.cli import EXIT_DIFFERENT

BROUGHT = {"run_train.sh", "train_configs", "tests", "titan_distill", "kernels", "examples", "docs", "benchmarks"}
NOT_RUN = {
    "pip install": "changes the environment",
    "python3 -m pip": "changes the environment",
    "-m venv": "makes one",
    ". .venv": "there is none",
    "git clone": "needs the network",
    "hf download": "needs the network",
    "make ": "`.ci/run` runs the two of the README",
    "sbatch ": "test_slurm.py and test_real_slurm.py",
    "tensorboard --logdir": "does not end",
    "pytest": "a test of its own",
    "benchmarks.gpu_suite": "test_gpu_suite.py",
    "benchmarks.compiled_cache": "test_compiled_cache.py",
    "benchmarks.fetch_wheels": "needs the network",
    "scripts/gpu_versions": "makes an environment of 5 GB",
}
"""Words of commands that the test leaves out, with the reason."""
KEPT = [command for command in IN_ORDER if not any(words in command.text for words in NOT_RUN)]
RUN = list({command.text: command for command in reversed(KEPT)}.values())
RUN.sort(key=KEPT.index)
"""The others in order, each at its first place: what an earlier page has made is there."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stranger")
    for name in BROUGHT:
        (folder / name).symlink_to(REPOSITORY / name)
    bring(folder)
    return folder


def bring(folder: Path) -> None:
    """Makes what the reader's words stand for."""
    for footage in (folder / PLACEHOLDERS[0], folder / "videos"):
        for seed, name in enumerate(("clouds.mp4", "meadow.mp4")):
            write_film(footage / name, seed)
        captions = "file_name,caption\nclouds.mp4,clouds at dusk\nmeadow.mp4,a meadow\n"
        (footage / "captions.csv").write_text(captions)
    write_i2v_pipeline(folder / PLACEHOLDERS[1])
    (folder / "data").mkdir()
    for prompts in ("prompts.txt", "data/validation_prompts.txt"):
        shutil.copy(TINY_SHAPES / "held_out_prompts.txt", folder / prompts)
    for download in {*re.findall(r"--local-dir (\S+)", " ".join(command.text for command in IN_ORDER))}:
        (folder / download).parent.mkdir(exist_ok=True)
        (folder / download).symlink_to(TINY_WAN)


def run(command: Command, folder: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(folder / name) for name in (".", "kernels", "examples")]
    python = f'"{sys.executable}" "$@"'
    programs = (
        f'titan-distill() {{ "{sys.executable}" -m titan_distill.cli "$@"; }}\npython() {{ {python}; }}\n'
        f'torchrun() {{ "{sys.executable}" -m torch.distributed.run "$@"; }}\n'
    )
    # Plans are of real sizes, and the folder has the small Wan in the place of the weights.
    is_plan = "--job.dry_run" in command.text or "titan-distill plan" in command.text
    return subprocess.run(
        ["bash", "-c", programs + command.small],
        cwd=REPOSITORY if is_plan else folder,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("index", range(len(RUN)), ids=lambda index: f"{index:02d}-{RUN[index].page.stem}")
def test_command(index: int, folder: Path) -> None:
    command = RUN[index]
    done = run(command, folder)
    expected = EXIT_DIFFERENT if "checkpoint diff" in command.text else 0
    assert done.returncode == expected, f"{command.small}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr


@pytest.mark.nightly
def test_the_commands_left_what_the_text_promises(folder: Path) -> None:
    outputs = folder / "outputs"
    for name in ("circle.mp4", "from_picture.mp4", "long.mp4", "exported/model_index.json", "exported/vae/config.json"):
        assert (folder / name).is_file(), name
    assert (outputs / "tiny_wan_dmd2/validation/step-00000002/contact_sheet.png").is_file()
    runs = ("tiny_wan_dmd2", "short", "four_ranks", "stage_two", "tiny_wan_finetune", "i2v", "tiny_wan_self_forcing")
    for name in (*runs, "wan14b_to_1.3b_8gpu", "wan1.3b_finetune", "mine"):
        assert read_metrics(outputs / name)[-1]["step"] == 2
        assert (outputs / name / "checkpoints/step-00000002/manifest.json").is_file()
    assert len(list((outputs / "tiny_wan_pairs").glob("*.parquet"))) == 1  # the second request found it
    for name in ("storm.mp4", "wan1.3b_4steps/transformer/diffusion_pytorch_model.safetensors", "data/mine"):
        assert (folder / name).exists(), name
    assert list((outputs / "profiled/profile").glob("*.json.gz"))


def test_what_is_not_run_is_named_for_a_reason() -> None:
    """Each entry leaves something out, and no training job is left out."""
    texts = [command.text for command in IN_ORDER]
    assert all(any(words in text for text in texts) for words in NOT_RUN)
    assert not [t for t in texts if "run_train.sh" in t and any(words in t for words in NOT_RUN)]


def test_the_site_builds_without_a_warning_and_without_the_network(tmp_path: Path) -> None:
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("needs the extra `docs`")
    proxy = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # where nothing listens
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", str(DOCS), str(tmp_path / "site")]
    done = subprocess.run(build, env={**os.environ, **proxy}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {page.relative_to(DOCS).with_suffix(".html").as_posix() for page in DOCS.rglob("*.md")}
    site = {page.relative_to(tmp_path / "site").as_posix() for page in (tmp_path / "site").rglob("*.html")}
    assert pages <= site
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert all(f'href="{page}"' in home for page in pages - {"index.html"}), "a page is in no list of contents"
    # Nothing is loaded from elsewhere: links are, of course, allowed.
    loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="(https?:[^"]*)"|<link[^>]* href="(https?:[^"]*)"', home)
    assert not loaded


@pytest.mark.parametrize("fault", ["[a](nothing.md)", "[a](install.md#nothing)"])
def test_a_broken_link_ends_the_build(fault: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("needs the extra `docs`")
    for name in ("conf.py", "install.md"):
        shutil.copy(DOCS / name, tmp_path / name)
    (tmp_path / "install.md").write_text("# Install\n")
    (tmp_path / "index.md").write_text(f"# Home\n\n{fault}\n")
    build = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", str(tmp_path), str(tmp_path / "site")]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "nothing" in done.stderr
