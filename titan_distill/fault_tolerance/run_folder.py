"""The identity of a run: which folder is whose.

A folder that two runs have written to is worse than none: the older run's checkpoints have higher step numbers, so they
are what `latest` finds. A run therefore has an id. It stands in `run.json` in the run's folder, in the manifest of
every checkpoint and in every tracker, and whoever lists, prunes or resumes checkpoints looks at one id only.

The id says nothing about the experiment: it is no key of the configuration. A fresh start makes a new one, and so does
a run that begins at a checkpoint of another folder, whose run becomes its parent.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from titan_distill.fault_tolerance.files import atomic, parse_json
from titan_distill.fault_tolerance.run_lock import NAME as LOCK

NAME = "run.json"
CHECKPOINTS = "checkpoints"
RESTART_VARIABLES = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
"""Environment variables that count how often this very start was repeated."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The content of `run.json`."""

    id: str
    created: str
    """ISO 8601, UTC."""
    command: list[str]
    """Command line, without secrets."""
    versions: dict[str, str]
    parent: str = ""
    """Id of the run whose checkpoint this one began at; empty for a fresh start."""
    parent_step: int = 0


def read_run(folder: Path) -> Run | None:
    """The run that owns a folder; None where no `run.json` is.

    Raises ValueError for a file that is damaged.
    """
    path = folder / NAME
    try:
        return Run(**parse_json(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or choose another folder for the run") from error


def new_run(command: Sequence[str] = (), parent: str = "", parent_step: int = 0) -> Run:
    """A run that begins now, in this process."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Run(uuid.uuid4().hex, now, list(command), versions(), parent, parent_step)


def versions() -> dict[str, str]:
    """Versions of this package, torch and Python."""
    return {name: version(name) for name in ("titan_distill", "torch")} | {"python": platform.python_version()}


def write_run(folder: Path, run: Run) -> None:
    """Writes `run.json`, complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / NAME) as temporary:
        temporary.write_text(json.dumps(asdict(run), indent=2) + "\n", encoding="utf-8")


def has_checkpoints(folder: Path) -> bool:
    """Whether a folder holds checkpoints of any run, damaged ones among them, but not what a killed save left."""
    return any(".tmp-" not in path.name for path in (folder / CHECKPOINTS).glob("step-*"))


def is_restart() -> bool:
    """Whether this start repeats an earlier one: after a requeue, or by an elastic launcher."""
    return any(int(os.environ.get(name) or 0) > 0 for name in RESTART_VARIABLES)


def check_folder(folder: Path, resume_from: str, *, overwrite: bool) -> None:
    """Checks that a start in `folder` would not mix two runs.

    Args:
        folder: The run's folder, `job.output_folder`.
        resume_from: `checkpoint.resume_from`.
        overwrite: `job.overwrite`.

    Raises:
        ValueError: a start that is no resume of this folder's run, in a folder that has checkpoints.
    """
    if overwrite and resume_from:
        raise ValueError(
            f"job.overwrite moves {folder} away, which contradicts checkpoint.resume_from = {resume_from!r}; remove "
            "one of the two"
        )
    if overwrite and not is_restart():
        return
    if has_checkpoints(folder) and not resumes(folder, resume_from):
        raise ValueError(
            f"{folder} has checkpoints of another start; resume it with --checkpoint.resume_from latest, choose "
            "another --job.name, or move it away with --job.overwrite"
        )


def resumes(folder: Path, resume_from: str) -> bool:
    """Whether `resume_from` names a checkpoint of the run in `folder`, rather than of another folder."""
    return resume_from == "latest" or (
        bool(resume_from) and Path(resume_from).resolve().is_relative_to(folder.resolve())
    )


def open_run(
    folder: Path,
    resume_from: str,
    *,
    overwrite: bool,
    command: Sequence[str] = (),
    parent: Run | None = None,
    parent_step: int = 0,
    adopted: str = "",
) -> Run:
    """Makes `folder` that of this start and returns the run it belongs to. For one process, which holds its lock.

    A resume of the run in the folder keeps its id; a folder without `run.json` is adopted. Else the id is a new one.

    Args:
        command: Command line, without secrets.
        parent: With a `resume_from` in another folder: the run there.
        parent_step: With it: the step at which the new run begins.
        adopted: For a folder without `run.json`: the id of the run that saved its checkpoints; empty if they have none.

    Raises ValueError as `check_folder` does.
    """
    check_folder(folder, resume_from, overwrite=overwrite)
    if overwrite and is_restart():
        logger.warning("job.overwrite is ignored: this start repeats an earlier one, whose folder %s stays", folder)
    elif overwrite and folder.exists():
        move_away(folder)
    run = read_run(folder) if resumes(folder, resume_from) else None
    if resume_from == "latest" and not any((folder / "checkpoints").glob("step-*")):
        logger.info("checkpoint.resume_from = latest: %s has no checkpoint yet, the run starts at step 0", folder)
    if run is None:
        run = new_run(command, parent.id if parent else "", parent_step)
        run = replace(run, id=adopted or run.id)
        write_run(folder, run)
    return run


def move_away(folder: Path) -> Path:
    """Moves the content of a folder, but for its lock, to `NAME.old-TIME` beside it, and returns the new path."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    target, number = folder.with_name(f"{folder.name}.old-{now}"), 1
    while target.exists():
        target, number = folder.with_name(f"{folder.name}.old-{now}-{number}"), number + 1
    target.mkdir()
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith(LOCK):
            os.rename(entry, target / entry.name)
    logger.warning("job.overwrite: what was in %s is in %s now", folder, target)
    return target
