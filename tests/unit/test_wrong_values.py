"""Well-formed files with values of the wrong kind are one sentence: manifests, configurations of networks, options."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wrong_files
from runs import REPOSITORY, TINY_WAN, tiny_argv
from tiny_media import write_video

from titan_distill import cli
from titan_distill.checkpoint.diffusers_folder import read_json
from titan_distill.checkpoint.manifest import CheckpointDamaged, read_manifest
from titan_distill.fault_tolerance.files import parse_json
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.text_encoder import TextEncoder
from titan_distill.models.wan.vae import load_vae

RUN = REPOSITORY / "tests" / "assets" / "version_0_1" / "run"
TOO_DEEP = "[" * 100_000


def test_json_without_end(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(TOO_DEEP)
    (tmp_path / "config.json").write_text(TOO_DEEP)
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON: its values are nested too deeply; copy it"):
        read_json(tmp_path / "config.json")


MANIFESTS = {
    "manifest with a step of words": "step = 'one', which must be a whole number of at least 0",
    "manifest with a negative step": "step = -1, which must be a whole number of at least 0",
    "manifest without roles": "trained is empty",
    "manifest with roles of numbers": "its values are not those of a checkpoint",
    "manifest without files": "files is empty",
    "manifest with files of words": "its values are not those of a checkpoint",
    "manifest nested without end": "it is not the JSON object that was written",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest(name: str, tmp_path: Path) -> None:
    """Also of one whose digest is right: whoever makes a manifest makes its digest, too."""
    shutil.copytree(RUN / "checkpoints", tmp_path / "run/checkpoints")
    wrong_files.CHECKPOINT[name](tmp_path)
    with pytest.raises(CheckpointDamaged) as raised:
        read_manifest(tmp_path / "run/checkpoints/step-00000002")
    assert MANIFESTS[name] in str(raised.value) and "manifest.json is damaged" in str(raised.value)


NETWORKS: dict[str, tuple[Any, str]] = {
    "num_layers": ("two", "num_layers 'two' must be int"),
    "ffn_dim": (32.5, "ffn_dim 32.5 must be int"),
    "eps": ("small", "eps 'small' must be float"),
    "cross_attn_norm": (1, "cross_attn_norm 1 must be bool"),
    "image_dim": ("none", "image_dim 'none' must be int or null"),
    "patch_size": (3, r"patch_size \(3,\) must have three entries"),
    "num_attention_heads": (True, "num_attention_heads True must be int"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str) -> None:
    value, expected = NETWORKS[name]
    with pytest.raises(ValueError, match=expected):
        WanConfig.from_diffusers({name: value})


@pytest.mark.parametrize(
    "content",
    ["", TOO_DEEP, '{"tokenizer_class": "MyTokenizer"}', '{"tokenizer_class": "T5Tokenizer"}'],
    ids=["empty", "deep", "unknown", "without vocabulary"],
)
def test_tokenizer(content: str, tmp_path: Path) -> None:
    """The last one loads, knows no words, and would make the same embedding of every prompt."""
    (tmp_path / "tokenizer_config.json").write_text(content)
    encoder = TextEncoder(TINY_WAN, tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded .*; copy it again") as raised:
        encoder.embed("a red circle", 8)
    assert "\n" not in str(raised.value)


WRONG_ARGUMENTS = {
    ("genrate",): "titan-distill --help",
    ("generate", "--checkpont", "x"): "titan-distill generate --help",
    ("checkpoint", "lst"): "titan-distill checkpoint --help",
    ("plan", "x.toml", "--gpu", "RTX"): "titan-distill plan --help",
}


@pytest.mark.parametrize("words", WRONG_ARGUMENTS, ids=" ".join)
def test_arguments(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """The table of what is right ends in a line that scripts find, as every other wrong input does."""
    with pytest.raises(SystemExit) as leaving:
        cli.main(words)
    assert leaving.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: wrong arguments, as shown above; {WRONG_ARGUMENTS[words]} lists the right ones"]


STATISTICS: dict[str, dict[str, Any]] = {
    "fewer than channels": {"latents_mean": [0.0]},
    "null": {"latents_mean": None},
    "a number": {"latents_std": 3},
    "words": {"latents_mean": ["0"] * 16},
    "zero deviation": {"latents_std": [1.0] * 15 + [0.0]},
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_of_a_vae(name: str, tmp_path: Path) -> None:
    """Zeros made every decoded video the same."""
    folder = Path(shutil.copytree(TINY_WAN / "vae", tmp_path / "vae"))
    config = json.loads((folder / "config.json").read_text()) | STATISTICS[name]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json has latents_\w+ = .*, which must be 16 finite numbers"):
        load_vae(tmp_path, "cpu")


PREPROCESS = {
    ("--max-text-tokens", "0"): "--max-text-tokens 0 leaves no text; choose 1 or more",
    ("--device", "gpu"): "--device 'gpu' is none of this machine's, which has cpu and ",
    ("--device", "cuda:99"): "--device 'cuda:99' is none of this machine's, which has cpu and ",
}


@pytest.mark.parametrize("words", PREPROCESS, ids=" ".join)
def test_preprocess(words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "videos/a.mp4", 20)
    (tmp_path / "captions.csv").write_text("file_name,caption\na.mp4,x\n")
    folders = ["--out", str(tmp_path / "out"), "--vae", str(TINY_WAN), "--text-encoder", str(TINY_WAN)]
    captions = ["--captions", str(tmp_path / "captions.csv")]
    with pytest.raises(SystemExit) as leaving:
        cli.main(["data", "preprocess", str(tmp_path / "videos"), *captions, *folders, *words])
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {PREPROCESS[words]}")
    assert not (tmp_path / "out").exists()


def test_negative_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(RUN / "checkpoints/latest")
    with pytest.raises(SystemExit):
        cli.main(
            ["generate", "--checkpoint", checkpoint, "--prompt", "x", "--out", str(tmp_path / "x.mp4"), "--seed", "-1"]
        )
    assert capsys.readouterr().err == "error: --seed -1 is negative; choose 0 or more\n"


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_the_check_of_the_input_refuses_a_tracker_that_cannot_start(tracker: str, tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['tensorboard'] = None; from titan_distill.train import main; sys.exit(main())"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", hidden, *tiny_argv("dmd2", tmp_path / "run", f"--metrics.{tracker}", "true"), "--check"],
        env={**inherited, "NETRC": str(tmp_path / "netrc"), "WANDB_MODE": "online"},
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and f"metrics.{tracker} = true, but" in done.stderr
    assert not (tmp_path / "run").exists()
