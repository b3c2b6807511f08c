"""Text files are UTF-8 whatever the locale: every place names the encoding, and a run works where the locale is C."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import REPOSITORY, TINY_SHAPES, TINY_WAN, read_metrics, tiny_argv

SOURCES = [
    path
    for folder in ("titan_distill", "kernels", "examples", "scripts", "benchmarks")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
]
NO_TEXT = {"av", "os", "tarfile", "Image"}
"""Modules whose `open` opens no text file."""


def depends_on_locale(source: str) -> Iterator[str]:
    """Calls that read or write text in the locale's encoding, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(node.func.value, "id", "") if isinstance(node.func, ast.Attribute) else ""
        words = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        mode = given["mode"].value if isinstance(given.get("mode"), ast.Constant) else "".join(map(str, words[-1:]))
        is_text = name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute)
        is_text |= name == "open" and owner not in NO_TEXT and "b" not in mode
        is_text |= name in ("run", "Popen", "check_output") and {"text", "universal_newlines"} & given.keys() != set()
        if is_text and "encoding" not in given:
            yield f"line {node.lineno}: {ast.unparse(node)[:80]}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_text_file_names_its_encoding(path: Path) -> None:
    assert not list(depends_on_locale(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "source", ["open(path)", "path.open('w')", "path.read_text()", "p.write_text(t)", "subprocess.run(c, text=True)"]
)
def test_such_places_are_found(source: str) -> None:
    assert list(depends_on_locale(source))


@pytest.mark.parametrize("source", ["open(path, 'rb')", "av.open(path)", "p.read_text(encoding='utf-8')", "run(c)"])
def test_other_places_are_not(source: str) -> None:
    assert not list(depends_on_locale(source))


PLAIN_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""The locale C without what Python does against it."""


def in_c_locale(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
    return subprocess.run(command, env={**environment, **PLAIN_C}, cwd=cwd, capture_output=True, encoding="utf-8")


def test_a_program_starts_again_in_utf8(tmp_path: Path) -> None:
    """Arguments, names of files, their text and the output."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from titan_distill.fault_tolerance.utf8 import restart_in_utf8\n"
        "restart_in_utf8()\nprint('ключ ·', Path(sys.argv[1]).read_text())\n",
        encoding="utf-8",
    )
    (tmp_path / "größe.txt").write_text("σ = 0,5", encoding="utf-8")
    done = in_c_locale(sys.executable, script, "größe.txt", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ключ · σ = 0,5\n", "")


@pytest.mark.nightly
def test_a_run_in_the_c_locale(tmp_path: Path) -> None:
    """Data, weights, prompts, configuration and output below names that are not ASCII."""
    folder = tmp_path / "größe"
    shutil.copytree(TINY_WAN, folder / "modèle")
    shutil.copy(TINY_SHAPES / "latents.parquet", folder / "данные.parquet")
    (folder / "prompts.txt").write_text("ein größerer Kreis\n赤い四角\n", encoding="utf-8")
    job = folder / "задание.toml"
    text = (REPOSITORY / "train_configs" / "tiny_wan_finetune.toml").read_text(encoding="utf-8")
    job.write_text(f"# größer\n{text}", encoding="utf-8")
    argv = tiny_argv("finetune", folder / "выход")[4:]
    done = in_c_locale(
        REPOSITORY / "run_train.sh", "--job.config_file", job, "--job.output_dir", folder / "выход", *argv,
        "--training.steps", "1", "--data.path", folder / "данные.parquet", "--roles.student.path", folder / "modèle",
        "--pipeline_config.path", folder / "modèle", "--pipeline_config.negative_prompt", "кровь",
        "--validation.enabled", "true", "--validation.prompts", folder / "prompts.txt",
        "--validation.num_prompts", "2", "--validation.num_videos", "1", "--validation.scorer", "none",
        cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(folder / "выход")) == 2
    captions = (folder / "выход" / "validation" / "step-00000001" / "captions.txt").read_text(encoding="utf-8")
    assert "ein größerer Kreis" in captions
    assert "кровь" in (folder / "выход" / "config.toml").read_text(encoding="utf-8")
