"""The pages that users read, their commands in order, and the rule that makes each of them short enough for a test.

A fenced block without a language is commands. All other blocks name their language.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runs import REPOSITORY

DOCS = REPOSITORY / "docs"
FIRST = [REPOSITORY / "README.md", DOCS / "first_run.md", DOCS / "tasks.md"]
"""Pages whose commands make what those of other pages read."""
PAGES = [*FIRST, *(path for path in sorted(DOCS.rglob("*.md")) if path not in FIRST), REPOSITORY / "CONTRIBUTING.md"]
HISTORY = [DOCS / "log.md"]
"""Pages about the past, which may name keys and files of their time."""
RECIPES = DOCS / "recipes"
"""Folder of cards of all shipped jobs. Their commands are parsed as they are; test_train_configs.py runs the jobs."""
SHELL = {"", "bash", "sh", "shell", "console"}
SMALL = {
    "run_train.sh": "--training.steps 2 --checkpoint.interval 1 --validation.num_prompts 2 --validation.num_videos 1",
    "rcm.toml": "--method_config.tangent_warmup 1",
    "data ode-pairs": "--num-pairs 8",
    "data preprocess videos": "--height 96 --width 96 --num-frames 17 --fps 8 --max-text-tokens 64",
}
"""Options that are appended to every command with these words. A later option wins over the same one before it."""
REAL = (
    "--training.global_batch_size 2 --parallelism.dp_shard 2 --compile.enabled false --data.num_workers 0 "
    "--data.max_text_tokens 64 --pipeline_config.height 96 --pipeline_config.width 96 --pipeline_config.num_frames 17"
)
"""Options of the same kind for training jobs of real size, whose weights are then the small Wan's."""
STEPS_PER_SMALL_STEP = 400
"""The default job saves at steps 400 and 800, its small form at steps 1 and 2."""
SMALL_RANKS = 2
PLACEHOLDERS = ("FOLDER", "PIPELINE")
"""Words for what readers bring, as docs/tasks.md says. Tests put folders of these names in place."""


@dataclass(frozen=True)
class Command:
    """One command of a page, on one line."""

    page: Path
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}: {self.text}"

    @property
    def job(self) -> Path | None:
        """The TOML file that the command names."""
        named = re.search(r"train_configs/[\w.]+\.toml", self.text)
        return REPOSITORY / named[0] if named else None

    @property
    def trains_real_size(self) -> bool:
        """Whether the command trains a job that is not of the small Wan."""
        trains = "run_train.sh" in self.text and "--job.dry_run" not in self.text
        return trains and self.job is not None and not self.job.name.startswith("tiny_")

    @property
    def small(self) -> str:
        """The same command at small size."""
        text = re.sub(r"step-(\d{8})", lambda m: f"step-{int(m[1]) // STEPS_PER_SMALL_STEP:08d}", self.text)
        appended = [options for words, options in SMALL.items() if words in text]
        if self.trains_real_size:
            assert self.job is not None
            roles = re.findall(r"^\[roles\.(\w+)\]", self.job.read_text(encoding="utf-8"), re.M)
            appended += [REAL, *(f"--roles.{role}.flavor tiny" for role in roles)]
            text = re.sub(r"NGPU=\d+", f"NGPU={SMALL_RANKS}", text)
        text = re.sub(r"--nproc-per-node \d+", f"--nproc-per-node {SMALL_RANKS}", text)
        return " ".join([text, *appended])


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and content of each fenced block."""
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
        yield match[1].strip(), match[2]


def commands(page: Path) -> list[Command]:
    """The commands of a page in order, without comments."""
    found = []
    for language, content in blocks(page):
        if language in SHELL:
            lines = content.replace("\\\n", " ").splitlines()
            texts = (re.sub(r"(^|\s)# .*", "", line).strip() for line in lines)
            parts = (part for text in texts for part in text.split(" && "))
            found += [Command(page, " ".join(part.split())) for part in parts if part]
    return found


COMMANDS = [command for page in PAGES if page not in HISTORY for command in commands(page)]
TRAINING = [command for command in COMMANDS if "run_train.sh" in command.text]
TOOLS = [command for command in COMMANDS if re.search(r"\btitan-distill |-m titan_distill\.cli ", command.text)]
IN_ORDER = [command for command in COMMANDS if command.page.parent != RECIPES]
"""Commands that also have a small form, in which they run one after the other."""
OTHERS = [command for command in COMMANDS if command not in TRAINING and command not in TOOLS]


def words(text: str) -> tuple[int, list[str]]:
    """The number of ranks and the arguments of a command that trains or of a tool."""
    program = r"(?:\./run_train\.sh|\btitan-distill|-m titan_distill\.cli)(?: |$)"
    environment, arguments = re.split(program, text, maxsplit=1)
    ranks = re.search(r"NGPU=(\d+)", environment)
    return int(ranks[1]) if ranks else 1, shlex.split(arguments)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def spans(page: Path) -> list[str]:
    """What stands between single back-ticks, on one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
