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

For the doctor a set has a few further samples of the first prompt, each from another noise, which are not decoded, and
each set of a role that another role learns to denoise is given to that one (`health`).

For a family whose samples are not videos only distances are computed; nothing is decoded, scored or shown.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
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
from titan_distill.diffusion.requests import REQUEST_NAME, SampleRequest, ValidationRequest, num_samples
from titan_distill.fault_tolerance.files import atomic, with_umask_mode
from titan_distill.fault_tolerance.ranks import Ranks
from titan_distill.models.base import Adapter
from titan_distill.parallelisms.mesh import Layouts
from titan_distill.roles import RoleHandle, RoleManager
from titan_distill.validation.distances import project, sliced_wasserstein, sliced_wasserstein_excess
from titan_distill.validation.health import START, Reading, Traits, denoising_errors, readings
from titan_distill.validation.looks import Looks, looks
from titan_distill.validation.meter import Meter, SamplingWork
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
    looks: Looks | None = None
    """Looks of the video if it was decoded, else None."""
    errors: dict[str, float] = field(default_factory=dict)
    """Errors of the roles that learn to denoise such samples, by role."""

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"latents": self.latents.contiguous()}
        if self.video is not None:
            tensors["video"] = self.video.contiguous()
        with with_umask_mode(path):
            notes = {"scores": self.scores, "looks": self.looks and asdict(self.looks)}
            save_file(tensors, path, {name: json.dumps(note) for name, note in notes.items()})

    @classmethod
    def load(cls, path: Path) -> Sample:
        with safe_open(path, "pt") as file:
            video = file.get_tensor("video") if "video" in file.keys() else None  # noqa: SIM118
            notes = {name: json.loads(note) for name, note in file.metadata().items()}
            seen = notes.get("looks")
            return cls(file.get_tensor("latents"), notes["scores"], video, looks=seen and Looks(**seen))


Samples = dict[int, Sample]
"""Samples of one request that this rank owns, by prompt."""


@dataclass(frozen=True)
class Row:
    """The part of a sample that goes to rank 0."""

    scores: dict[str, float]
    traits: Traits
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
        self._is_watched = config.doctor.enabled
        self._pretrained = {name for name, role in config.roles.items() if role.is_pretrained}
        ids = {self._prompt(position % self._num_samples) for batch in self._batches() for position in batch}
        self.condition = adapter.prompt_conditions(prompts_path(config), self.prompts, sorted(ids))
        self.score = scorer(self.config.scorer)
        self._settings = {
            "prompts": self.prompts,
            "seed": self.config.seed,
            "scorer": self.config.scorer,
            "pipeline_config": _effective(config.pipeline_config),
        }
        self._baselines: dict[str, Samples] = {}
        self.meter = Meter(layouts.device)
        self.readings: list[Reading] = []
        """Readings of the last validation for the doctor, on rank 0."""

    def validate(self, step: int, request: ValidationRequest, roles: RoleManager) -> dict[str, float]:
        """Samples, scores and writes videos below the validation folder. Returns metrics as `<sample label>/<metric>`
        on rank 0, and nothing on other ranks."""
        self._denoisers = self._choose_denoisers(step, request, roles) if self._is_watched else {}
        baselines = tuple(sample for sample in request.samples if sample.baseline)
        # Before the first step the trained role still equals one of the baselines, so it is not sampled.
        wanted = baselines if step == 0 and baselines else request.samples
        for sample in baselines if step else ():
            if sample.label not in self._baselines:
                self._recall(sample)
        drawn = [x for x in wanted if not x.baseline or self._is_due(step, x, roles[x.role])]
        work = {x.label: self.work(x, roles) for x in drawn}
        with self.meter.validation(work, is_shown=self.ranks.rank == 0):
            return self._validate(step, request, wanted, roles)

    def of_first_prompts(self, number: int) -> Validator:
        """Returns a validator of at most `number` prompts, with a meter and baselines of its own."""
        other = copy.copy(self)
        other.prompts, other.meter, other._baselines = self.prompts[:number], Meter(self.layouts.device), {}
        return other

    def seconds(self, request: ValidationRequest, roles: RoleManager) -> float | None:
        """Returns the seconds that a validation after the first will take, judged by those so far; None before the
        roles that it samples have been sampled once."""
        return self.meter.seconds({x.label: self.work(x, roles) for x in request.samples if not x.baseline})

    def work(self, request: SampleRequest, roles: RoleManager) -> SamplingWork:
        """Returns the forward passes and videos of a sample set on this rank."""
        lengths = self.adapter.segment_lengths(roles[request.role])
        num_passes = request.num_passes(None if lengths is None else len(lengths)) * request.num_conditions
        batches = list(self._batches())
        owned = filter(self._owns, chain(*batches))
        num_videos = sum(index < len(self.prompts) for index in owned) if self.makes_videos else 0
        of_samples = num_passes * sum(map(len, batches))
        return SamplingWork(request.role, num_passes * len(batches), of_samples, num_videos)

    def _validate(
        self, step: int, request: ValidationRequest, wanted: Iterable[SampleRequest], roles: RoleManager
    ) -> dict[str, float]:
        sets: dict[str, Samples] = {}
        for sample in wanted:
            samples = (
                self._baseline(step, sample, roles[sample.role])
                if sample.baseline
                else self._sample(sample, roles[sample.role])
            )
            if samples is not None:
                sets[sample.label] = samples
        compares = request.reference in sets and len(sets) > 1
        reports = self.ranks.gather(partial(self._report, step, sets, compares))
        if self.ranks.rank != 0:
            return {}
        rows = {label: dict(sorted(chain(*(report[label].items() for report in reports)))) for label in sets}
        traits = {label: {index: row.traits for index, row in named.items()} for label, named in rows.items()}
        self.readings = readings(request, traits, len(self.prompts)) if self._is_watched else []
        rows = {label: {i: row for i, row in named.items() if i < len(self.prompts)} for label, named in rows.items()}
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

    def _choose_denoisers(
        self, step: int, request: ValidationRequest, roles: RoleManager
    ) -> dict[str, dict[str, RoleHandle]]:
        """Returns the roles whose errors on a set's samples are measured, by label and name."""
        chosen: dict[str, dict[str, RoleHandle]] = {sample.label: {} for sample in request.samples}
        known = [role for role in roles.trainable if role.name in self._pretrained]
        whole = [role for role in known if self.adapter.segment_lengths(role) is None]
        for sample in request.samples:
            if step == 0 and request.reference is not None and whole:
                chosen[sample.label][START] = whole[0]
            learners = (name for name, made_by in request.denoisers if made_by == sample.role)
            chosen[sample.label] |= {name: roles[name] for name in learners}
        return chosen

    def _baseline(self, step: int, request: SampleRequest, role: RoleHandle) -> Samples | None:
        """Returns the samples of a baseline, which are drawn if they are due. None if the role was not sampled so
        before its training began."""
        if self._is_due(step, request, role):
            samples = self._sample(request, role)
            note, files = self._stored(request)
            self.ranks.on_rank_zero(partial(_start_baseline, note.with_suffix(""), note, self._settings_of(request)))
            self.ranks.together(partial(_save, samples, files))
            self._baselines[request.label] = samples
        return self._baselines.get(request.label)

    def _is_due(self, step: int, request: SampleRequest, role: RoleHandle) -> bool:
        """Returns whether a baseline is to be drawn: before training, and that of a frozen role at any time."""
        return request.label not in self._baselines and (step == 0 or not role.trainable)

    def _recall(self, request: SampleRequest) -> None:
        """Reads the samples of a baseline from the files of an earlier start, if they were made with its settings."""
        note, files = self._stored(request)
        is_same = self.ranks.on_rank_zero(partial(_is_made_with, note, self._settings_of(request)))
        found = {index: file for index, file in files.items() if file.is_file()}
        # A run without a doctor, or of a version without one, has stored none of its further samples.
        if is_same and self.ranks.all(all(i in found or i >= len(self.prompts) for i in files)):
            self._baselines[request.label] = {index: Sample.load(file) for index, file in found.items()}

    def _stored(self, request: SampleRequest) -> tuple[Path, dict[int, Path]]:
        """Returns the note of a baseline's settings, and the files of this rank's samples."""
        folder = self.folder / "baselines" / request.label
        owned = filter(self._owns, chain(*self._batches()))
        return folder.with_name(f"{request.label}.json"), {i: folder / f"{i:05d}.safetensors" for i in owned}

    def _settings_of(self, request: SampleRequest) -> dict[str, Any]:
        return _as_stored({"request": asdict(request), **self._settings})

    def _sample(self, request: SampleRequest, role: RoleHandle) -> Samples:
        def before_each_pass() -> None:
            self.poll()
            self.meter.advance(role.name, request.num_conditions)

        sampling = Sampling(self.adapter, KeyedNoise(self.config.seed), self.layouts.device, before_each_pass)
        samples: Samples = {}
        denoisers = self._denoisers.get(request.label, {})
        with role.evaluation():
            for positions in self._batches():
                ids = [position % self._num_samples for position in positions]
                condition = self.condition([self._prompt(index) for index in ids])
                with self.meter.sampling(role.name, len(ids)):
                    latents = sampling.run(request, role, condition, ids)
                errors = denoising_errors(self.adapter, denoisers, latents, condition, ids, self.config.seed)
                own = [row for row, position in enumerate(positions) if self._owns(position)]
                samples |= self._finish([ids[row] for row in own], latents[own], [errors[row] for row in own])
        return samples

    def _finish(self, ids: list[int], latents: Tensor, errors: Sequence[dict[str, float]]) -> Samples:
        """Decodes and scores the samples of the prompts; those for the doctor are neither scored nor shown."""
        seen = [row for row, index in enumerate(ids) if self.makes_videos and index < len(self.prompts)]
        decoded = self.adapter.decode_latents(latents[seen]).cpu() if seen else ()
        videos = dict(zip(seen, decoded, strict=True))
        samples = {}
        for row, (index, latent) in enumerate(zip(ids, latents.cpu(), strict=True)):
            video = videos.get(row)
            samples[index] = Sample(
                latent,
                {} if video is None else self.score(video.numpy(), self.prompts[index]),
                video if index < self.config.num_videos else None,
                looks=None if video is None else looks(video.numpy()),
                errors=errors[row],
            )
        return samples

    @property
    def _num_samples(self) -> int:
        """Returns the number of samples of a set; the indices of further ones of the first prompt follow the others."""
        return num_samples(len(self.prompts), is_watched=self._is_watched)

    def _prompt(self, index: int) -> int:
        """Returns the prompt of a sample."""
        return index if index < len(self.prompts) else 0

    def _is_of_noises(self, index: int) -> bool:
        """Returns whether a sample is one of those that show the diversity over noise."""
        return self._is_watched and self._prompt(index) == 0

    def _batches(self) -> Iterator[list[int]]:
        """Returns this data group's samples in batches, equal in number and size on every rank.

        A batch lists positions. A position is the index of a sample, or a larger number that repeats a sample and has
        no owner.
        """
        num_groups = self.layouts.num_data_groups
        num_rounds = -(-self._num_samples // num_groups)
        positions = [self.layouts.data_rank + round_ * num_groups for round_ in range(num_rounds)]
        for start in range(0, num_rounds, self.config.batch_size):
            yield positions[start : start + self.config.batch_size]

    def _owns(self, position: int) -> bool:
        """Returns whether this rank is the one in its data group that decodes, scores and shows the sample."""
        round_, own = position // self.layouts.num_data_groups, self.ranks.rank % self.layouts.data_group
        return position < self._num_samples and round_ % self.layouts.data_group == own

    def _step_folder(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _report(self, step: int, sets: dict[str, Samples], compares: bool) -> dict[str, Rows]:
        """Writes this rank's videos, and projects what has not been projected yet."""
        folder = self._step_folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        projected = [
            sample
            for samples in sets.values()
            for index, sample in samples.items()
            if sample.projections_P is None and (compares or self._is_of_noises(index))
        ]
        for sample, projections_P in zip(projected, project([each.latents for each in projected]), strict=True):
            sample.projections_P = projections_P
        rows: dict[str, Rows] = {label: {} for label in sets}
        for label, samples in sets.items():
            for index, sample in samples.items():
                shown = None
                if sample.video is not None:
                    write_mp4(folder / f"{index:03d}-{label}.mp4", sample.video.numpy(), self.config.fps)
                    shown = thumbnails(sample.video.numpy())
                traits = Traits(sample.looks, sample.projections_P, sample.errors)
                rows[label][index] = Row(sample.scores, traits, shown)
        return rows

    def _show(
        self, step: int, request: ValidationRequest, rows: dict[str, Rows], scores: dict[str, dict[str, float]]
    ) -> None:
        folder, captions = self._step_folder(step), self.prompts[: self.config.num_videos]
        lines = [f"{index:03d} {' '.join(text.split())}\n" for index, text in enumerate(captions)]
        (folder / "captions.txt").write_text("".join(lines), encoding="utf-8")
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
        label: torch.stack([projected for row in named.values() if (projected := row.traits.projections_P) is not None])
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
    now = "" if request.baseline else " now"
    steps = "1 step" if request.num_steps == 1 else f"{request.num_steps} steps"
    title = f"{request.label.removesuffix('_few_steps').replace('_', ' ')}{now}, {steps}{guidance}"
    return "\n".join([title, *(f"{name.replace('_', ' ')} {value:.2f}" for name, value in [*scores.items()][:1])])
