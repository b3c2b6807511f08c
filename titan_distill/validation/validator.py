"""Validation draws the samples that the method asks for, decodes, scores and shows them, and measures distances.

A *data group* is a set of ranks that load the same samples. Prompt k belongs to data group k modulo their number. All
groups sample equally many prompts (the last ones may be repetitions), because with sharded weights a forward pass is a
collective. Each prompt has one owner among the ranks of its group, which decodes, scores, projects and writes its
samples. Only projections, scores and thumbnails are sent to rank 0, which compares the sets and draws one contact sheet
per validation.

Baselines (the teacher, the student before training) are sampled once, before the first step, and stored in
`baselines/`, one file per prompt, beside a note of the settings that made them. A resumed run with the same settings
compares with the same samples, on any number of ranks. With other settings a frozen role is sampled again, and one that
has been trained since has no baseline.

For a family whose samples are not videos only distances are computed; nothing is decoded, scored or shown.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from titan_distill.config.config import Config
from titan_distill.config.resume import FREE, on_resume
from titan_distill.config.text import to_dict
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.diffusion.requests import REQUEST_NAME, SampleRequest, ValidationRequest
from titan_distill.fault_tolerance.files import atomic, with_umask_mode
from titan_distill.fault_tolerance.ranks import Ranks
from titan_distill.models.base import Adapter
from titan_distill.parallelisms.mesh import Layouts
from titan_distill.roles import RoleHandle, RoleManager
from titan_distill.validation.distances import project, sliced_wasserstein, sliced_wasserstein_excess
from titan_distill.validation.sampling import Sampling, go_on
from titan_distill.validation.scorers import prompts_path, scorer, validation_prompts
from titan_distill.validation.video import Video, contact_sheet, thumbnails, write_mp4

logger = logging.getLogger(__name__)


@dataclass
class Sample:
    """One sample of a prompt, on the CPU of its owner."""

    latents: Tensor
    """Latents in the adapter's `latent_shape`, fp32."""
    scores: dict[str, float]
    video: Tensor | None
    """Video as uint8 [T, height, width, 3] if the prompt is shown, else None."""
    projections_P: Tensor | None = None

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"latents": self.latents.contiguous()}
        if self.video is not None:
            tensors["video"] = self.video.contiguous()
        with with_umask_mode(path):
            save_file(tensors, path, {"scores": json.dumps(self.scores)})

    @classmethod
    def load(cls, path: Path) -> Sample:
        with safe_open(path, "pt") as file:
            video = file.get_tensor("video") if "video" in file.keys() else None  # noqa: SIM118
            return cls(file.get_tensor("latents"), json.loads(file.metadata()["scores"]), video)


Samples = dict[int, Sample]
"""Samples of one request that this rank owns, by prompt."""


@dataclass(frozen=True)
class Row:
    """The part of a sample that goes to rank 0."""

    scores: dict[str, float]
    projections_P: Tensor | None
    thumbnails: Video | None


Rows = dict[int, Row]
"""Rows of one request for all prompts, by prompt and in their order."""


class Validator:
    """Runs validations. All ranks must call its methods.

    Attributes:
        ranks: all ranks, with a longer timeout than collectives during training, because one rank may score or write
            videos for a long time while the others wait.
        makes_videos: whether latents are decoded to videos, which are scored and shown.
        poll: function called before every forward pass, on all ranks. It raises StopRequested on all ranks if one of
            them was asked to stop. The trainer sets it.
    """

    def __init__(
        self, config: Config, adapter: Adapter, folder: Path, layouts: Layouts, ranks: Ranks, *, makes_videos: bool
    ) -> None:
        self.config, self.adapter, self.folder = config.validation, adapter, folder
        self.layouts, self.ranks, self.makes_videos = layouts, ranks, makes_videos
        self.poll: Callable[[], None] = go_on
        self.prompts = validation_prompts(config)
        ids = sorted({position % len(self.prompts) for batch in self._batches() for position in batch})
        self.condition = adapter.prompt_conditions(prompts_path(config), self.prompts, ids)
        self.score = scorer(self.config.scorer)
        self._settings = {
            "prompts": self.prompts,
            "seed": self.config.seed,
            "scorer": self.config.scorer,
            "pipeline_config": _effective(config.pipeline_config),
        }
        self._baselines: dict[str, Samples] = {}

    def validate(self, step: int, request: ValidationRequest, roles: RoleManager) -> dict[str, float]:
        """Samples, scores and writes videos below the validation folder. Returns metrics as `<sample label>/<metric>`
        on rank 0, and nothing on other ranks."""
        sets: dict[str, Samples] = {}
        baselines = tuple(sample for sample in request.samples if sample.baseline)
        # Before the first step the trained role still equals one of the baselines, so it is not sampled.
        for sample in baselines if step == 0 and baselines else request.samples:
            samples = (
                self._baseline(step, sample, roles) if sample.baseline else self._sample(sample, roles[sample.role])
            )
            if samples is not None:
                sets[sample.label] = samples
        compares = request.reference in sets and len(sets) > 1
        reports = self.ranks.gather(partial(self._report, step, sets, compares))
        if self.ranks.rank != 0:
            return {}
        rows = {label: dict(sorted(chain(*(report[label].items() for report in reports)))) for label in sets}
        values = {label: _mean_scores(rows[label]) for label in sets}
        self._show(step, request, rows, values)
        if compares:
            assert request.reference is not None
            for label, distances in _distances(rows, request.reference).items():
                values[label] |= distances
        return {f"{label}/{name}": value for label, named in values.items() for name, value in named.items()}

    def media(self, step: int) -> list[Path]:
        """Returns the pictures and videos that the last `validate(step, …)` wrote, for the trackers."""
        folder = self._step_folder(step)
        return [*sorted(folder.glob("*.png")), *sorted(folder.glob("*.mp4"))]

    def _baseline(self, step: int, request: SampleRequest, roles: RoleManager) -> Samples | None:
        """Returns the samples of a baseline, drawn at step 0 or read from the file after a resume. None if the role was
        not sampled so before its training began."""
        if request.label in self._baselines:
            return self._baselines[request.label]
        folder, role = self.folder / "baselines" / request.label, roles[request.role]
        owned = (index for batch in self._batches() for index in batch if self._owns(index))
        files = {index: folder / f"{index:05d}.safetensors" for index in owned}
        note = folder.with_name(f"{request.label}.json")
        settings = _as_stored({"request": asdict(request), **self._settings})
        is_same = step > 0 and self.ranks.on_rank_zero(partial(_is_made_with, note, settings))
        if is_same and self.ranks.all(all(file.is_file() for file in files.values())):
            samples = {index: Sample.load(file) for index, file in files.items()}
        elif step > 0 and role.trainable:
            return None
        else:
            samples = self._sample(request, role)
            self.ranks.on_rank_zero(partial(_start_baseline, folder, note, settings))
            self.ranks.together(partial(_save, samples, files))
        self._baselines[request.label] = samples
        return samples

    def _sample(self, request: SampleRequest, role: RoleHandle) -> Samples:
        sampling = Sampling(self.adapter, KeyedNoise(self.config.seed), self.layouts.device, self.poll)
        samples: Samples = {}
        with role.evaluation():
            for positions in self._batches():
                ids = [position % len(self.prompts) for position in positions]
                latents = sampling.run(request, role, self.condition(ids), ids)
                own = [row for row, position in enumerate(positions) if self._owns(position)]
                samples |= self._finish(request, [ids[row] for row in own], latents[own])
        return samples

    def _finish(self, request: SampleRequest, ids: list[int], latents: Tensor) -> Samples:
        """Decodes and scores the samples whose videos are scored or shown."""
        shown = [index < self.config.num_videos for index in ids]
        seen = [row for row in range(len(ids)) if self.makes_videos and (request.scored or shown[row])]
        decoded = self.adapter.decode_latents(latents[seen]).cpu() if seen else ()
        videos = dict(zip(seen, decoded, strict=True))
        samples = {}
        for row, (index, latent) in enumerate(zip(ids, latents.cpu(), strict=True)):
            video = videos.get(row)
            scores = {} if video is None or not request.scored else self.score(video.numpy(), self.prompts[index])
            samples[index] = Sample(latent, scores, video if shown[row] else None)
        return samples

    def _batches(self) -> Iterator[list[int]]:
        """Returns this data group's prompts in batches, equal in number and size on every rank.

        A batch lists positions. A position is the index of a prompt, or a larger number that repeats a prompt and has
        no owner.
        """
        num_groups = self.layouts.num_data_groups
        num_rounds = -(-len(self.prompts) // num_groups)
        positions = [self.layouts.data_rank + round_ * num_groups for round_ in range(num_rounds)]
        for start in range(0, num_rounds, self.config.batch_size):
            yield positions[start : start + self.config.batch_size]

    def _owns(self, position: int) -> bool:
        """Returns whether this rank is the one in its data group that decodes, scores and shows the sample."""
        round_, own = position // self.layouts.num_data_groups, self.ranks.rank % self.layouts.data_group
        return position < len(self.prompts) and round_ % self.layouts.data_group == own

    def _step_folder(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _report(self, step: int, sets: dict[str, Samples], compares: bool) -> dict[str, Rows]:
        """Writes this rank's videos, and projects what has not been projected yet."""
        folder = self._step_folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        if compares:
            new = [s for samples in sets.values() for s in samples.values() if s.projections_P is None]
            for sample, projections_P in zip(new, project([sample.latents for sample in new]), strict=True):
                sample.projections_P = projections_P
        rows: dict[str, Rows] = {label: {} for label in sets}
        for label, samples in sets.items():
            for index, sample in samples.items():
                shown = None
                if sample.video is not None:
                    write_mp4(folder / f"{index:03d}-{label}.mp4", sample.video.numpy(), self.config.fps)
                    shown = thumbnails(sample.video.numpy())
                rows[label][index] = Row(sample.scores, sample.projections_P, shown)
        return rows

    def _show(
        self, step: int, request: ValidationRequest, rows: dict[str, Rows], scores: dict[str, dict[str, float]]
    ) -> None:
        folder, captions = self._step_folder(step), self.prompts[: self.config.num_videos]
        (folder / "captions.txt").write_text(
            "".join(f"{index:03d} {text}\n" for index, text in enumerate(captions)), encoding="utf-8"
        )
        (folder / REQUEST_NAME).write_text(json.dumps(asdict(request), indent=1), encoding="utf-8")
        if self.config.num_videos and self.makes_videos:
            titles = {sample.label: _title(sample, scores.get(sample.label, {})) for sample in request.samples}
            columns = [
                (titles[label], [row.thumbnails for row in named.values() if row.thumbnails is not None])
                for label, named in rows.items()
            ]
            contact_sheet(folder / "contact_sheet.png", columns, captions)


def _effective(pipeline_config: Any) -> dict[str, Any]:
    """Returns the keys of [pipeline_config] that may change samples."""
    steering = {field.name for field in fields(pipeline_config) if on_resume(field) == FREE}
    return {name: value for name, value in to_dict(pipeline_config).items() if name not in steering}


def _as_stored(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings as they are read from a file."""
    stored: dict[str, Any] = json.loads(json.dumps(settings))
    return stored


def _is_made_with(note: Path, settings: dict[str, Any]) -> bool:
    """Returns whether a stored baseline was made with these settings, and logs which ones differ. Baselines of earlier
    versions have no note; they count as made with the same."""
    if not note.is_file():
        return True
    stored = json.loads(note.read_text(encoding="utf-8"))
    others = [name for name, value in settings.items() if stored.get(name) != value]
    if others:
        logger.warning(
            "the stored samples of the validation baseline %r were made with other settings (%s): they are not used",
            note.stem,
            ", ".join(others),
        )
    return not others


def _start_baseline(folder: Path, note: Path, settings: dict[str, Any]) -> None:
    """Removes the samples of other settings, and only then writes the note of these: samples that an interruption left
    incomplete are never taken for those of either."""
    if folder.is_dir():
        shutil.rmtree(folder)
    note.parent.mkdir(parents=True, exist_ok=True)
    with atomic(note) as temporary:
        temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _save(samples: Samples, files: dict[int, Path]) -> None:
    for index, file in files.items():
        samples[index].save(file)


def _mean_scores(rows: Rows) -> dict[str, float]:
    names = next(iter(rows.values())).scores
    return {name: sum(row.scores[name] for row in rows.values()) / len(rows) for name in names}


def _distances(rows: dict[str, Rows], reference: str) -> dict[str, dict[str, float]]:
    """Returns the distances of each sample set from the reference set."""
    projected = {
        label: torch.stack([row.projections_P for row in named.values() if row.projections_P is not None])
        for label, named in rows.items()
    }
    other_NP, found = projected.pop(reference), {}
    for label, own_NP in projected.items():
        found[label] = {"sliced_wasserstein": sliced_wasserstein(own_NP, other_NP)}
        if len(own_NP) >= 4:
            found[label]["sliced_wasserstein_excess"] = sliced_wasserstein_excess(own_NP, other_NP)
    return found


def _title(request: SampleRequest, scores: dict[str, float]) -> str:
    """Returns the title of a column: sampler and settings and, after a line break, the first score, which is set in
    smaller type."""
    guidance = f", CFG {request.guidance_scale:g}" if request.guidance_scale != 1 else ""
    title = f"{request.label.replace('_', ' ')}, {request.num_steps} steps{guidance}"
    return "\n".join([title, *(f"{name.replace('_', ' ')} {value:.2f}" for name, value in [*scores.items()][:1])])
