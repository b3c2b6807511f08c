"""Subjects of `titan-distill evaluate`: a role of a checkpoint, an exported folder, or a folder of videos.

An exported folder is sampled as its run samples the role: its card (README.md) holds the run's configuration. Nothing
is built here; a sampled subject knows how to build its networks.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from titan_distill.checkpoint.diffusers_folder import PIPELINE_INDEX, TRANSFORMER, TRANSFORMER_2, open_folder
from titan_distill.checkpoint.discovery import LATEST, resolve
from titan_distill.checkpoint.initial_weights import trained_role
from titan_distill.checkpoint.manifest import MANIFEST_NAME, read_manifest
from titan_distill.checkpoint.tools.contents import role_tensors
from titan_distill.commands.generate import run_config
from titan_distill.config.config import Config
from titan_distill.config.loading import load_config
from titan_distill.config.paths import is_reference, of_key, seen_from
from titan_distill.data.footage import SUFFIXES
from titan_distill.models.base import ModelFamily
from titan_distill.validation.video_folder import VideoFolder

STUDENT = "student"
NO_REFERENCE = "none"

_CARD_CONFIG = re.compile(r"^## Configuration of the run\n+`{2,3}toml\n(.*?)\n`{2,3}$", re.S | re.M)
_CARD_ROLE = re.compile(r"^\| role \| (.+?) \|$", re.M)
_CARD_STEP = re.compile(r"^\| step \| (\d+) \|$", re.M)
_PIPELINE = "path"
"""Key of [pipeline_config] with the pipeline's folder."""


@dataclass(frozen=True)
class SampledSubject:
    """A role whose videos are made here."""

    name: str
    role: str
    config: Config
    step: int
    """Steps that the role was trained, for schedules such as that of sparsity."""
    build: Callable[[ModelFamily, torch.device], dict[str, nn.Module]]
    """Builds the role's networks."""
    run_folder: Path | None = None
    """Folder of the run; None for an exported folder."""

    def with_cache(self, folder: Path) -> SampledSubject:
        """Returns the subject with a folder for text embeddings, which an exported folder lacks; a run has its own."""
        if self.run_folder is not None:
            return self
        job = replace(self.config.job, output_dir=str(folder))
        return replace(self, config=replace(self.config, job=job))

    @property
    def is_frozen(self) -> bool:
        """Whether the role is one that the run does not train."""
        return not self.config.roles[self.role].trainable


@dataclass(frozen=True)
class RecordedSubject:
    """A folder of videos that were made elsewhere."""

    name: str
    videos: VideoFolder


Subject = SampledSubject | RecordedSubject


class _Named(NamedTuple):
    """The parts of `PATH#ROLE:WEIGHTS`."""

    path: Path
    role: str
    weights: str


def open_subject(text: str, trusted: Collection[str], key: str = "SUBJECT") -> Subject:
    """Finds a subject and reads its configuration.

    Args:
        text: path of a step, of checkpoints/latest, of a run, of an exported folder or of a folder of videos. For the
            first three, `#ROLE`, `#ROLE:ema` or `#ROLE:raw` may follow.
        trusted: modules of job.imports to import, see `load_role`.
        key: option that names the subject, for messages.

    Raises:
        ValueError: a path to nothing of this kind, a damaged checkpoint, or an exported folder without its card.
    """
    with of_key(key, text):
        named = _parsed(text)
        path = named.path
        if (path / "checkpoints").is_dir():
            path = path / "checkpoints" / LATEST
        if path.name == LATEST or (path / MANIFEST_NAME).is_file():
            return _of_checkpoint(named._replace(path=resolve(path)), trusted)
        if not path.is_dir():
            raise ValueError("there is no such folder; correct the path")
        if named.role:
            raise ValueError(f"#{named.role} names a role of a checkpoint, and this is none; leave it out")
        if (path / TRANSFORMER).is_dir():
            return _of_export(path, trusted)
        if any(file.suffix.lower() in SUFFIXES for file in path.iterdir()):
            return RecordedSubject(path.resolve().name, VideoFolder.scan(path))
        raise ValueError(
            f"the folder is neither a checkpoint ({MANIFEST_NAME}), nor an exported student ({TRANSFORMER}/), nor does "
            f"it hold videos ({', '.join(SUFFIXES)})"
        )


def frozen_subject(config: Config, role: str, step: int, run_folder: Path | None) -> SampledSubject:
    """Returns a frozen role of a run. Raises ValueError if its weights are not where the run found them."""
    section = config.roles[role]
    weights = section.path or section.init_from
    if not weights or not (is_reference(weights) or Path(weights).is_dir()):
        raise ValueError(
            f"roles.{role}.path = {weights!r}{seen_from(weights)} is no existing folder, so the {role} cannot make "
            "videos; start from the folder in which the run was started, or set --reference to a folder of its videos "
            f"or to {NO_REFERENCE}"
        )

    def build(family: ModelFamily, device: torch.device) -> dict[str, nn.Module]:
        with of_key(f"roles.{role}.path", weights):
            return family.build_modules(role, section, None, device)

    return SampledSubject(role, role, config, step, build, run_folder)


def _parsed(text: str) -> _Named:
    if not is_reference(text):
        return _Named(Path(text), "", "")
    path, _, rest = text.rpartition("#")
    role, colon, weights = rest.partition(":")
    if not path or not role or (colon and weights not in ("ema", "raw")):
        raise ValueError("write PATH, PATH#ROLE, PATH#ROLE:ema or PATH#ROLE:raw")
    return _Named(Path(path), role, weights)


def _of_checkpoint(named: _Named, trusted: Collection[str]) -> SampledSubject:
    step, role = named.path, named.role or STUDENT
    manifest, config = read_manifest(step), run_config(step, {}, trusted)
    folder = step.parent.parent
    if role in manifest.frozen:
        return frozen_subject(config, role, manifest.step, folder)
    trained = trained_role(step, manifest, role, use_ema=named.weights == "ema")
    use_ema = trained.has_ema and named.weights != "raw"

    def build(family: ModelFamily, device: torch.device) -> dict[str, nn.Module]:
        tensors = {name: role_tensors(step, role, use_ema=use_ema, module=name) for name in trained.modules}
        return {name: family.restore_module(trained.architecture, tensors[name], device) for name in trained.modules}

    parts = [folder.resolve().name, step.name, *[role] * (role != STUDENT), *[named.weights] * bool(named.weights)]
    return SampledSubject("-".join(parts), role, config, manifest.step, build, folder)


def _of_export(path: Path, trusted: Collection[str]) -> SampledSubject:
    card = path / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found, role, step = (part.search(text) for part in (_CARD_CONFIG, _CARD_ROLE, _CARD_STEP))
    if found is None or role is None or step is None or "[recipe]" not in found[1]:
        raise ValueError(
            f"{card} does not tell the run's configuration, role and step, which an export writes into it, so it is "
            "unknown how to sample; name the checkpoint instead"
        )
    overrides = [f"--pipeline_config.{_PIPELINE}={path}"] if (path / PIPELINE_INDEX).is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "config.toml").write_text(found[1], encoding="utf-8")
        config = load_config(["--job.config_file", str(file), *overrides], trusted)
    if role[1] not in config.roles:
        raise ValueError(f"{card} names the role {role[1]!r}, which its configuration does not have; export again")

    def build(family: ModelFamily, device: torch.device) -> dict[str, nn.Module]:
        modules = {}
        for module in (TRANSFORMER, TRANSFORMER_2):
            if (path / module).is_dir():
                stored = open_folder(path, module)
                tensors = ((name, stored.read(name)) for name in sorted(stored.shapes))
                modules[module] = family.restore_module(stored.architecture, tensors, device)
        return modules

    return SampledSubject(path.resolve().name, role[1], config, int(step[1]), build)
