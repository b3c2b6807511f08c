"""Four hundred wrong inputs: weights, rows, prompts, configurations, resumes, outputs, environments and commands.

Each case starts from an input that works and makes one thing wrong, so that no case can succeed. `wrong_tables` has
command lines, `wrong_files` has damage to files. A line names its files by placeholders, which are made only for lines
that name them: `{run}` is a copy of a run of one step, `{net}` of the small network that it trained, `{pipe}` of the
small pipeline, `{data}` of rows that fit; `{new}` is the case's own folder.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import wrong_files as files
import wrong_tables as tables
from runs import REPOSITORY, TINY_SHAPES, TINY_WAN
from tiny_media import write_video
from wrong_files import Damage

from titan_distill.fault_tolerance import run_lock

NUM_CASES = 400
VERSION_0_1 = REPOSITORY / "tests" / "assets" / "version_0_1"
JOB, NETWORK = VERSION_0_1 / "job.toml", VERSION_0_1 / "network"
TRAIN, COMMAND, SHELL = "train", "titan-distill", "run_train.sh"
JSON_FILES = ("tokenizer_config.json", "model_index.json")
LARGEST_COPY = 150_000
"""Bytes; larger files of networks and pipelines are links."""


@dataclass(frozen=True)
class Case:
    """One wrong input.

    Attributes:
        name: kind and content, unique.
        program: what is started: the training, the command line, or run_train.sh.
        line: its arguments, with placeholders.
        damage: what is done to the case's folder first, when its copies are there.
        environment: variables that are set.
    """

    name: str
    program: str
    line: str = ""
    damage: Damage = lambda folder: None
    environment: dict[str, str] = field(default_factory=dict)

    def prepare(self, folder: Path, trained: Path) -> list[str]:
        """Makes the files of the case in an empty folder, and returns the arguments. `trained` is the run of one step
        that `{run}` copies."""
        for name, make in _COPIES.items():
            if f"{{{name}}}" in self.line:
                make(folder / name, trained)
        self.damage(folder)
        places = {name: folder / name for name in _COPIES}
        words = shlex.split(self.line.format(**places, new=folder, job=JOB, assets=REPOSITORY / "tests/assets"))
        if self.program == COMMAND:
            return words
        defaults = {"--job.config_file": str(JOB), "--job.output_dir": str(folder / "out")}
        return [word for name, value in defaults.items() if name not in words for word in (name, value)] + words


def linked(source: Path, target: Path) -> Path:
    """A copy of a folder in which large files are links."""

    def copy(file: str, to: str) -> None:
        os.symlink(file, to) if os.path.getsize(file) > LARGEST_COPY else shutil.copyfile(file, to)

    return Path(shutil.copytree(source, target, copy_function=copy))


def _rows(folder: Path) -> None:
    folder.mkdir()
    pq.write_table(pq.read_table(TINY_SHAPES / "latents.parquet").slice(0, 6), folder / files.ROWS, row_group_size=2)


_COPIES: dict[str, Callable[[Path, Path], object]] = {
    "run": lambda folder, trained: shutil.copytree(trained, folder),
    "net": lambda folder, trained: linked(NETWORK, folder),
    "pipe": lambda folder, trained: linked(TINY_WAN, folder),
    "data": lambda folder, trained: _rows(folder),
}


def _surroundings(folder: Path) -> None:
    """What lines name beside the copies: a text file, prompts that no scorer knows, and videos with their captions."""
    (folder / "file").write_text("x")
    (folder / "foreign.txt").write_text("A dog runs over a meadow in the rain.\n")
    (folder / "captions.csv").write_text("file_name,caption\na.mp4,x\n")
    write_video(folder / "videos/a.mp4", 20)
    (folder / "cut.mp4").write_bytes((folder / "videos/a.mp4").read_bytes()[:600])
    write_video(folder / "short.mp4", 3)


def _beside_videos(content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        _surroundings(folder)
        (folder / "table.csv").write_bytes(content)

    return damage


def _lock(folder: Path) -> None:
    """Locks a run folder for this process, which lives."""
    (folder / "used").mkdir()
    (folder / "used" / run_lock.NAME).write_text(json.dumps(asdict(run_lock.Owner.current())))


def _damaged(kind: str, program: str, line: str, place: str, damages: dict[str, Damage]) -> Iterator[Case]:
    for what, damage in damages.items():
        yield Case(f"{kind}: {what}", program, line, lambda folder, damage=damage: damage(folder / place))


def _lines(kind: str, program: str, table: str) -> Iterator[Case]:
    for line in table.replace("{long}", "x" * 300).strip().splitlines():
        damage = _surroundings if "{new}" in line else Case.damage
        yield Case(f"{kind}: {line[:200]}", program, line, damage)


def _weights() -> Iterator[Case]:
    network = files.WEIGHTS | files.CONFIG | files.FOLDERS
    half, rest = (dict(list(network.items())[first::2]) for first in (0, 1))
    some, others = (dict(list(files.damaged_json(name).items())[first::2]) for first, name in enumerate(JSON_FILES))
    pipeline, sampled = "--pipeline_config.path {pipe}", tables.SAMPLED
    yield from _damaged("transformer", TRAIN, "--roles.student.path {net}", "net", network | files.TRANSFORMER)
    yield from _damaged("text encoder", TRAIN, pipeline, "pipe/text_encoder", half | files.ENCODER)
    yield from _damaged("VAE", TRAIN, f"{pipeline} {sampled}", "pipe/vae", rest | files.VAE)
    yield from _damaged("tokenizer", TRAIN, pipeline, "pipe/tokenizer", some | files.TOKENIZER | files.FOLDERS)
    export = "checkpoint export --checkpoint {run}/checkpoints/latest --out {new}/x --pipeline {pipe}"
    yield from _damaged("model index", COMMAND, export, "pipe", others)


def _data() -> Iterator[Case]:
    yield from _damaged("rows", TRAIN, "--data.path {data} --method_config.rollout data", "data", files.DATA)
    for what, (name, content) in tables.PROMPTS.items():
        line = f"{tables.SAMPLED} --validation.prompts {{new}}/{name.partition('/')[0]}"
        yield Case(f"prompts: {what}", TRAIN, line, files.written(name, content))
    clips = "--data.path {new}/table.csv --method_config.rollout data"
    for what, content in tables.VIDEOS.items():
        yield Case(f"videos: {what}", TRAIN, clips, _beside_videos(content))
    preprocess = tables.PREPROCESS.replace("captions.csv", "table.csv")
    for what, content in tables.CAPTIONS.items():
        yield Case(f"captions: {what}", COMMAND, preprocess, _beside_videos(content))


def cases() -> list[Case]:
    """All cases, in the same order each time, by kind."""
    resume = "--job.output_dir {run} --checkpoint.resume_from latest --training.steps 2"
    variables = ((TRAIN, tables.ENVIRONMENT), (SHELL, tables.SHELL_ENVIRONMENT))
    found = [
        *_weights(),
        *_data(),
        *_damaged("checkpoint", TRAIN, resume, "", files.CHECKPOINT),
        *(
            Case(f"TOML: {what}", TRAIN, "--job.config_file {new}/job.toml", files.written("job.toml", content))
            for what, content in tables.TOML.items()
        ),
        *_lines("configuration", TRAIN, tables.CONFIGURATION),
        *_lines("scorer", TRAIN, tables.SCORERS),
        *_lines("resume", TRAIN, tables.RESUME),
        *_lines("output", TRAIN, tables.OUTPUT),
        Case("output: a folder in use", TRAIN, "--job.output_dir {new}/used", _lock),
        *_lines("command", COMMAND, tables.COMMANDS),
        *(
            Case(f"environment: {program} with {name}={value!r}", program, environment={name: value})
            for program, of_program in variables
            for name, values in of_program.items()
            for value in values
        ),
    ]
    assert len(found) == len({case.name for case in found}) == NUM_CASES
    return found
