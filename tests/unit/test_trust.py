"""What others send runs no code, writes nothing outside of its folder, and fetches nothing from outside of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomllib
from runs import REPOSITORY, TINY_WAN

from titan_distill import cli, registry
from titan_distill.checkpoint.manifest import MANIFEST_NAME, CheckpointDamaged, read_manifest
from titan_distill.config.loading import load_config
from titan_distill.models.wan.text_encoder import TextEncoder

RUN = REPOSITORY / "tests" / "assets" / "version_0_1" / "run"
PAYLOAD = """
from pathlib import Path
Path(__file__).with_name("it_ran").touch()
from titan_distill.registry import register_scorer
@register_scorer("payload")
def score(video, prompt):
    return {}
"""


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run from elsewhere: its configuration imports a module that lies beside it and that Python finds."""
    folder = tmp_path / "foreign"
    shutil.copytree(RUN, folder)
    (folder / "payload.py").write_text(PAYLOAD)
    edit_config(folder, "imports = []", 'imports = ["payload"]')
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("payload", None)
    registry.SCORERS.entries.pop("payload", None)


def edit_config(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.toml").read_text()
    assert old in text
    (folder / "config.toml").write_text(text.replace(old, new))


def edit_manifest(checkpoint: Path, old: str, new: str) -> None:
    """Edits the manifest and makes its digest right, as an attacker would."""
    content = json.loads((checkpoint / MANIFEST_NAME).read_text().replace(old, new))
    del content["digest"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (checkpoint / MANIFEST_NAME).write_text(json.dumps({**content, "digest": digest}))


def call(*words: str | Path) -> int:
    try:
        cli.main([str(word) for word in words])
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def generate(folder: Path, out: Path, *more: str) -> int:
    return call(
        "generate", "--checkpoint", folder / "checkpoints/latest", "--prompt", "a red circle", "--out", out, *more
    )


def export(folder: Path, out: Path, *more: str | Path) -> int:
    return call("checkpoint", "export", "--checkpoint", folder / "checkpoints/latest", "--out", out, *more)


# --- job.imports


def test_a_video_is_made_and_the_payload_does_not_run(
    foreign: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert generate(foreign, tmp_path / "video.mp4") == 0
    assert (tmp_path / "video.mp4").is_file() and not (foreign / "it_ran").exists()
    # Its configuration names the folder in which it was trained: nothing is written there.
    assert list((foreign / "cache").iterdir()) and not (RUN / "cache").exists()
    assert "Not imported, because nothing here needs it: payload of job.imports" in caplog.text
    assert export(foreign, tmp_path / "exported") == 0
    assert not (foreign / "it_ran").exists()


FOREIGN = {
    "method": ('method = "dmd2"', 'method = "payload"', "recipe.method = 'payload'"),
    "family": ('family = "wan"', 'family = "payload"', "recipe.family = 'payload'"),
    "scorer": ('scorer = "shapes"', 'scorer = "payload"', "validation.scorer = 'payload'"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_name_from_elsewhere_needs_trust(
    kind: str, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, named = FOREIGN[kind]
    edit_config(foreign, old, new)
    assert generate(foreign, tmp_path / "video.mp4") == 2
    shown = capsys.readouterr().err
    assert f"{named} is not part of titan_distill" in shown and "add --trust-imports payload" in shown
    assert shown.count("\n") == 1 and not (foreign / "it_ran").exists() and not (tmp_path / "video.mp4").exists()


def test_export_of_a_family_from_elsewhere_needs_trust(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_manifest(foreign / "checkpoints/step-00000002", '"family": "wan"', '"family": "payload"')
    assert export(foreign, tmp_path / "out") == 2
    assert "recipe.family = 'payload' is not part of titan_distill" in capsys.readouterr().err
    assert not (foreign / "it_ran").exists() and not (tmp_path / "out").exists()
    assert export(foreign, tmp_path / "out", "--trust-imports", "payload") == 2  # trusted, but it registers no family
    assert (foreign / "it_ran").exists()
    assert re.search(r"must be one of .*\bwan\b", capsys.readouterr().err)  # and families of other tests


def test_a_trusted_module_is_imported(foreign: Path, tmp_path: Path) -> None:
    edit_config(foreign, 'scorer = "shapes"', 'scorer = "payload"')
    assert generate(foreign, tmp_path / "video.mp4", "--trust-imports", "payload") == 0
    assert (tmp_path / "video.mp4").is_file() and (foreign / "it_ran").exists()


def test_trust_in_another_module_has_no_effect_and_says_so(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(foreign, tmp_path / "video.mp4", "--trust-imports", "paylaod") == 2
    assert "paylaod: the module is not in job.imports, which names payload" in capsys.readouterr().err
    assert not (foreign / "it_ran").exists()


def test_modules_of_this_distribution_need_no_trust(foreign: Path) -> None:
    edit_config(foreign, 'imports = ["payload"]', 'imports = ["tiny_world"]')
    config = load_config(["--job.config_file", str(foreign / "config.toml")], trusted=())
    assert config.validation.scorer == "shapes" and "tiny_world" in sys.modules
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    shipped = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert [f"{name}*" for name in registry.SHIPPED] == shipped


def test_ones_own_file_imports_as_before(foreign: Path) -> None:
    load_config(["--job.config_file", str(foreign / "config.toml")])
    assert (foreign / "it_ran").exists()


# --- names in files


@pytest.mark.parametrize("name", ["../config.toml", "/etc/passwd", "..", "a\\b"])
def test_a_manifest_names_only_files_in_its_folder(name: str, foreign: Path, tmp_path: Path) -> None:
    checkpoint = foreign / "checkpoints" / "step-00000002"
    edit_manifest(checkpoint, '"__0_0.distcp"', json.dumps(name))
    with pytest.raises(CheckpointDamaged, match="which is outside of its folder; do not trust this checkpoint"):
        read_manifest(checkpoint)
    for command in (["checkpoint", "verify", checkpoint], ["checkpoint", "diff", checkpoint, checkpoint]):
        assert call(*command) == 2
    assert call("checkpoint", "reshard", checkpoint, "--out", tmp_path / "other", "--num-files", "1") == 2
    assert export(foreign, tmp_path / "out") == 2 and generate(foreign, tmp_path / "video.mp4") == 2


def test_a_module_of_a_manifest_is_no_path(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_manifest(foreign / "checkpoints/step-00000002", '"transformer"', '"../stolen"')
    assert (
        call("checkpoint", "export", "--checkpoint", foreign / "checkpoints/step-00000002", "--out", tmp_path / "out")
        == 2
    )
    assert "names '../stolen', which is outside of its folder" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["foreign"]


# --- pipelines to copy from


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY_WAN, tmp_path / "pipeline"))


def test_links_out_of_a_pipeline_are_left_out_and_named(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret").write_text("private")
    (pipeline / "vae" / "notes").symlink_to(tmp_path / "home" / "secret")
    (pipeline / "vae" / "nothing").symlink_to("nowhere")
    os.mkfifo(pipeline / "vae" / "pipe")
    (pipeline / "vae" / "copy.json").symlink_to("config.json")  # within the pipeline: followed
    (pipeline / "tokenizer" / "more").symlink_to(tmp_path / "home")
    shutil.move(pipeline / "scheduler", tmp_path / "scheduler")
    (pipeline / "scheduler").symlink_to(tmp_path / "scheduler")  # the student's own takes its place
    assert export(RUN, tmp_path / "out", "--pipeline", pipeline) == 0
    shown = capsys.readouterr().out
    assert "left out, because these are no files in" in shown
    left_out = ("vae/notes", "vae/nothing", "vae/pipe", "tokenizer/more")
    assert all(str(pipeline / name) in shown for name in left_out)
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert {"vae/config.json", "vae/copy.json", "scheduler/scheduler_config.json"} <= found
    assert not found & {*left_out, "tokenizer/more/secret"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_snapshot_in_a_cache_is_made_of_links_to_its_blobs(pipeline: Path, tmp_path: Path) -> None:
    """As `huggingface_hub` downloads a repository."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "123"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in pipeline.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(pipeline)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert export(RUN, tmp_path / "out", "--pipeline", snapshot) == 0
    for name in ("vae/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (TINY_WAN / name).read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_tokenizer_brings_no_code(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word from us, transformers would ask at the terminal whether to run it."""
    folder = pipeline / "tokenizer"
    config = {"tokenizer_class": "PayloadTokenizer", "auto_map": {"AutoTokenizer": ["payload.PayloadTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "payload.py").write_text(PAYLOAD)
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    with pytest.raises(ValueError, match="code"):
        TextEncoder(pipeline).embed("a red circle", 64)
    assert not (folder / "it_ran").exists()


def test_an_index_does_not_lead_out(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps({**index, "../home": ["a", "b"]}))
    assert export(RUN, tmp_path / "out", "--pipeline", pipeline) == 2
    assert "names '../home', which is outside of the pipeline" in capsys.readouterr().err
    (tmp_path / "elsewhere.json").write_text(json.dumps(index))
    (pipeline / "model_index.json").unlink()
    (pipeline / "model_index.json").symlink_to(tmp_path / "elsewhere.json")
    assert export(RUN, tmp_path / "out", "--pipeline", pipeline) == 2
    assert "is a link to a file outside of the pipeline" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
