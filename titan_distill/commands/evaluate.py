"""`titan-distill evaluate` measures videos of students beside those of their teacher, and writes JSON and a table.

All sampled subjects start from the same noise: it is keyed by the seed, the prompt's number and the video's number for
that prompt. The first video per prompt therefore equals the validation's. One subject at a time is in memory. The
reference, by default the run's teacher, comes first, because the others are compared with its videos. The results are
written after each subject, so what is done is not lost when a later one fails.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import torch
import tyro

from titan_distill.commands.making import MOST_PROMPTS, Item, Meter, RunSampler, plan_items
from titan_distill.commands.subjects import (
    NO_REFERENCE,
    RecordedSubject,
    SampledSubject,
    Subject,
    frozen_subject,
    open_subject,
)
from titan_distill.config.config import Config
from titan_distill.config.paths import of_key
from titan_distill.data.prompts import read_prompts, repeated
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.diffusion.requests import SampleRequest, check_options
from titan_distill.fault_tolerance.files import atomic
from titan_distill.fault_tolerance.outputs import probe_folder
from titan_distill.methods.base import method_class
from titan_distill.methods.few_step import FewStepTraining
from titan_distill.models.base import model_family
from titan_distill.parallelisms.mesh import default_device
from titan_distill.validation.perceptual import FVD_FRAMES, ClipScore, Fvd, Lpips
from titan_distill.validation.rating import MadeVideo, Rater
from titan_distill.validation.scorers import no_scores, prompts_path, scorer, validation_prompts
from titan_distill.validation.video_folder import VideoWriter, is_nameable

RESULT, TABLE = "evaluation.json", "evaluation.md"
VIDEOS_PER_PROMPT = 2
MOST_VIDEOS = 1000
"""Largest number of videos per prompt."""

T = TypeVar("T")


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `titan-distill evaluate`."""

    subjects: tyro.conf.Positional[tuple[str, ...]]
    """Each a checkpoint (a step folder, checkpoints/latest or a run; #ROLE, #ROLE:ema or #ROLE:raw may follow), an
    exported folder, or a folder of videos named PROMPT-INDEX.mp4."""
    out: Path | None = None
    """Folder for evaluation.json and evaluation.md. Default: evaluation/ in the folder of the first checkpoint's
    run."""
    reference: str | None = None
    """Subject that the others are compared with, or none. Default: the teacher of the first checkpoint's run."""
    prompts: Path | None = None
    """Prompts (.txt, .jsonl, .csv, parquet). The run's scorer then rates nothing. Default: those of the first
    checkpoint's validation, or those of the first folder of videos."""
    num_prompts: int | None = None
    """Number of prompts. Default: all of --prompts, or as many as the validation has."""
    videos_per_prompt: int | None = None
    """Videos per prompt, each from other noise. Diversity needs 2, VBench's standard suite 5. Default: 2, or all of the
    first folder of videos where no subject is sampled."""
    seed: int | None = None
    """Seed of the noise. Default: the validation's."""
    vbench_folder: Path | None = None
    """New folder for the videos: one folder per subject, named as VBench reads them, and beside it a JSON file with
    their prompts. Such a folder can be a subject or the reference of a later evaluation."""
    lpips_weights: Path | None = None
    """Torchvision's weights of AlexNet, for LPIPS."""
    clip: Path | None = None
    """Folder of a CLIP model, for the CLIP score."""
    fvd_weights: Path | None = None
    """Weights of I3D or VideoMAE that the package cd-fvd names, for FVD."""
    trust_imports: tuple[str, ...] = ()
    """Modules of the run's job.imports to import although they are not part of titan_distill. Importing a module runs
    its code. Default: none."""


@dataclass
class Entry:
    """Results of one subject."""

    name: str
    role: str | None = None
    steps: int | None = None
    guidance: float | None = None
    forwards_per_video: float | None = None
    seconds_per_video: float | None = None
    num_videos: int = 0
    scores: dict[str, float] = field(default_factory=dict)


@dataclass
class _Task:
    """All that an evaluation needs, checked."""

    out: Path
    subjects: list[Subject]
    reference: Subject | None
    items: list[Item]
    seed: int
    samplers: _Samplers
    rater: Rater


def evaluate(options: EvaluateOptions) -> None:
    """Evaluate everything, print the table and write the files.

    Raises:
        ValueError: options that contradict each other, subjects that cannot be read or compared, and missing weights or
            packages, all before anything is sampled.
    """
    task = _prepare(options)
    results, noise = Results(task.out, options, [item.key[0] for item in task.items]), KeyedNoise(task.seed)
    for subject in [*([] if task.reference is None else [task.reference]), *task.subjects]:
        is_reference = subject is task.reference
        for entry, videos, fps in _entries(subject, task.items, task.samplers, noise):
            entry.name = results.unused(entry.name)
            if options.vbench_folder is not None and fps is not None:
                videos = _written(videos, options.vbench_folder / entry.name, fps)
            entry.scores = task.rater.rate_reference(videos) if is_reference else task.rater.rate(videos)
            results.add(entry)
            is_reference = False  # other ways to sample the same role are compared with the first
    print(results.table())
    print(f"\n{task.out / RESULT}")


def _prepare(options: EvaluateOptions) -> _Task:
    """Opens and checks everything. Raises ValueError."""
    _check_options(options)
    subjects = [open_subject(text, options.trust_imports) for text in options.subjects]
    reference = _reference(options, subjects)
    if options.reference is None:
        subjects = [subject for subject in subjects if not _is_same(subject, reference)]
    out = options.out or _default_folder([*subjects, reference])
    subjects = [subject.with_cache(out) if isinstance(subject, SampledSubject) else subject for subject in subjects]
    reference = reference.with_cache(out) if isinstance(reference, SampledSubject) else reference
    every = [*subjects, *([] if reference is None else [reference])]
    sampled = [subject for subject in every if isinstance(subject, SampledSubject)]
    config = sampled[0].config if sampled else None
    _check_sizes(every, reference, options)
    prompts_file, items = _items(options, config, every)
    for subject in every:
        if isinstance(subject, RecordedSubject):
            _check_videos(subject, items)
    device = default_device()
    rater = Rater(
        device,
        no_scores if config is None or options.prompts is not None else scorer(config.validation.scorer),
        _network("--lpips-weights", Lpips, options.lpips_weights, device),
        _network("--clip", ClipScore, options.clip, device),
        _network("--fvd-weights", Fvd, options.fvd_weights, device),
    )
    _probe_outputs(options, out)
    samplers = _Samplers(prompts_file, items, device)
    for one in sampled:
        if one.config == config:  # others need encoders of their own, so they are checked in their turn
            samplers.of(one.config).requests(one.role)
    _say_what_is_left_out(options, reference, items)
    seed = options.seed if options.seed is not None else 0 if config is None else config.validation.seed
    return _Task(out, subjects, reference, items, seed, samplers, rater)


class Results:
    """Entries in the order they were made, and the files with them."""

    def __init__(self, folder: Path, options: EvaluateOptions, prompts: Sequence[str]) -> None:
        self._folder, self._entries = folder, list[Entry]()
        self._about = {
            "prompts": list(dict.fromkeys(prompts)),
            "command": _command(options),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def unused(self, name: str) -> str:
        """Returns a name that no entry has: `name`, or with a number behind it."""
        names = {entry.name for entry in self._entries}
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        return name if name not in names else next(x for x in numbered if x not in names)

    def add(self, entry: Entry) -> None:
        """Adds an entry and writes the files. Files of an earlier evaluation get another name first."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if not self._entries:
            _move_earlier(self._folder)
        self._entries.append(entry)
        # JSON has no infinite numbers; equal videos have an infinite PSNR.
        subjects = [
            {**asdict(entry), "scores": {name: x if math.isfinite(x) else None for name, x in entry.scores.items()}}
            for entry in self._entries
        ]
        text = json.dumps({"subjects": subjects, **self._about}, indent=1, ensure_ascii=False, allow_nan=False)
        for name, content in ((RESULT, text), (TABLE, self.table())):
            with atomic(self._folder / name) as temporary:
                temporary.write_text(content + "\n", encoding="utf-8")

    def table(self) -> str:
        """Returns a Markdown table with one column per entry, because there are more measures than entries."""
        scores = list(dict.fromkeys(name for entry in self._entries for name in entry.scores))
        costs = {
            "steps": "steps", "guidance": "guidance", "forwards_per_video": "forwards", "seconds_per_video": "seconds",
            "num_videos": "videos",
        }  # fmt: skip
        columns = [["", *costs.values(), *(name.replace("_", " ") for name in scores)]]
        for entry in self._entries:
            values = [*(getattr(entry, name) for name in costs), *(entry.scores.get(name) for name in scores)]
            columns.append([entry.name, *("" if value is None else f"{value:.4g}" for value in values)])
        widths = [max(map(len, column)) for column in columns]
        lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in zip(*columns)]
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _check_options(options: EvaluateOptions) -> None:
    if not options.subjects:
        raise ValueError("no subject is named; name checkpoints, exported folders or folders of videos")
    check_options(None, None, options.seed or 0)
    if options.videos_per_prompt is not None and not 1 <= options.videos_per_prompt <= MOST_VIDEOS:
        raise ValueError(f"--videos-per-prompt {options.videos_per_prompt} is out of range; choose 1 to {MOST_VIDEOS}")
    if options.num_prompts is not None and not 1 <= options.num_prompts <= MOST_PROMPTS:
        raise ValueError(f"--num-prompts {options.num_prompts} is out of range; choose 1 to {MOST_PROMPTS}")


def _reference(options: EvaluateOptions, subjects: Sequence[Subject]) -> Subject | None:
    """Returns the subject that the others are compared with: the one named, or the frozen role that the first run's
    students learn from, if its method makes few-step students."""
    if options.reference == NO_REFERENCE:
        return None
    if options.reference is not None:
        return open_subject(options.reference, options.trust_imports, "--reference")
    first = next((subject for subject in subjects if isinstance(subject, SampledSubject)), None)
    if first is None or not issubclass(method_class(first.config.recipe.method), FewStepTraining):
        return None
    frozen = [name for name, role in first.config.roles.items() if not role.trainable]
    return frozen_subject(first.config, frozen[0], first.step, first.run_folder) if frozen else None


def _is_same(subject: Subject, reference: Subject | None) -> bool:
    if isinstance(subject, RecordedSubject) or isinstance(reference, RecordedSubject) or reference is None:
        return False
    is_same_run = subject.run_folder is not None and subject.run_folder == reference.run_folder
    return subject.is_frozen and is_same_run and subject.role == reference.role


def _default_folder(subjects: Sequence[Subject | None]) -> Path:
    for subject in subjects:
        if isinstance(subject, SampledSubject) and subject.run_folder is not None:
            return subject.run_folder / "evaluation"
    raise ValueError("no subject is a checkpoint, so there is no run's folder for the results; name one with --out")


def _check_sizes(every: Sequence[Subject], reference: Subject | None, options: EvaluateOptions) -> None:
    """Raises ValueError for samples that are no videos, and for videos that cannot be compared."""
    sizes = {}
    for subject in every:
        if isinstance(subject, RecordedSubject):
            sizes[subject.name] = subject.videos.size
            continue
        family = subject.config.recipe.family
        size = model_family(family)(subject.config).video_size()
        if size is None:
            raise ValueError(f"{subject.name}: family {family!r} makes no videos, and only videos are evaluated")
        sizes[subject.name] = size
    shown = {name: " × ".join(map(str, size)) for name, size in sizes.items()}
    if reference is not None:
        for name, own in shown.items():
            if own != shown[reference.name]:
                raise ValueError(
                    f"the videos of {name} have {own} (frames, height, width), but those of {reference.name} "
                    f"{shown[reference.name]}, so they cannot be compared; set --reference to {NO_REFERENCE}"
                )
    for option, value in (("--lpips-weights", options.lpips_weights), ("--fvd-weights", options.fvd_weights)):
        if value is not None and reference is None:
            raise ValueError(f"{option} compares with a reference, and there is none; name one with --reference")
    short = [name for name, size in sizes.items() if size[0] < FVD_FRAMES]
    if options.fvd_weights is not None and short:
        raise ValueError(
            f"FVD reads {FVD_FRAMES} frames, but the videos of {short[0]} have {sizes[short[0]][0]}; leave "
            "--fvd-weights out"
        )


def _items(options: EvaluateOptions, config: Config | None, every: Sequence[Subject]) -> tuple[str, list[Item]]:
    """Returns the file of the prompts, and the videos to make or to read."""
    per_prompt = options.videos_per_prompt or VIDEOS_PER_PROMPT
    if options.prompts is not None:
        with of_key("--prompts", options.prompts):
            prompts = repeated(read_prompts(options.prompts, options.num_prompts), options.num_prompts)
        return str(options.prompts), plan_items(prompts, per_prompt)
    if config is not None:
        number = options.num_prompts or config.validation.num_prompts
        config = replace(config, validation=replace(config.validation, num_prompts=number, num_videos=0))
        return prompts_path(config), plan_items(validation_prompts(config), per_prompt)
    keys = [key for subject in every[:1] if isinstance(subject, RecordedSubject) for key in subject.videos.files]
    texts = [*dict.fromkeys(text for text, _ in keys)][: options.num_prompts]
    numbers = {text: number for number, text in enumerate(texts)}
    kept = [key for key in keys if key[0] in numbers and key[1] < (options.videos_per_prompt or math.inf)]
    return "", [Item(key, numbers[key[0]], 0) for key in sorted(kept, key=lambda key: (numbers[key[0]], key[1]))]


def _network(option: str, kind: Callable[[Path, torch.device], T], path: Path | None, device: torch.device) -> T | None:
    if path is None:
        return None
    with of_key(option, path):
        return kind(path, device)


def _probe_outputs(options: EvaluateOptions, out: Path) -> None:
    probe_folder(out, "--out")
    if (folder := options.vbench_folder) is None:
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--vbench-folder = {str(folder)!r} has files already; name a new folder, so that none mix")
    probe_folder(folder, "--vbench-folder")


def _say_what_is_left_out(options: EvaluateOptions, reference: Subject | None, items: Sequence[Item]) -> None:
    compares = {} if reference is None else {"LPIPS": "--lpips-weights", "FVD": "--fvd-weights"}
    known = compares | {"CLIP score": "--clip"}
    without = [name for name, option in known.items() if getattr(options, option[2:].replace("-", "_")) is None]
    if without:
        named = ", ".join(f"{name} ({known[name]})" for name in without)
        print(f"not measured without local weights: {named}; docs/evaluation.md says where they come from")
    if reference is None:
        print("not measured without a reference: PSNR, SSIM, LPIPS, FVD; --reference names one")
    unnameable = {item.key[0] for item in items if not is_nameable(*item.key)}
    if options.vbench_folder is not None and unnameable:
        print(f"{len(unnameable)} prompts are too long for a file name or have a slash: give VBench the --prompt_file")


class _Samplers:
    """Sampler of the run that a subject belongs to; of one run at a time, because encoders are large."""

    def __init__(self, prompts_file: str, items: Sequence[Item], device: torch.device) -> None:
        prompts = {item.prompt: item.key[0] for item in items}
        self._prompts_file, self._prompts, self._device = prompts_file, [*prompts.values()], device
        self._last: RunSampler | None = None

    def of(self, config: Config) -> RunSampler:
        if self._last is None or self._last.config != config:
            self._last = None  # frees it before the next is built
            self._last = RunSampler(config, self._prompts_file, self._prompts, self._device)
        return self._last


def _entries(
    subject: Subject, items: Sequence[Item], samplers: _Samplers, noise: KeyedNoise
) -> Iterator[tuple[Entry, Iterator[MadeVideo], int | None]]:
    """Yields each way to sample a subject: its entry without scores, its videos and, if these are made here, their
    frames per second. The costs are in the entry once all videos are taken."""
    if isinstance(subject, RecordedSubject):
        kept = _kept(subject, items)
        yield Entry(subject.name, num_videos=len(kept)), _recorded(subject, kept), None
        return
    run = samplers.of(subject.config)
    handle = run.build(subject)
    for request in run.requests(subject.role):
        name, meter = request.label if subject.is_frozen else subject.name, Meter()
        entry = Entry(name, subject.role, request.num_steps, request.guidance_scale, num_videos=len(items))

        def made(entry: Entry = entry, request: SampleRequest = request, meter: Meter = meter) -> Iterator[MadeVideo]:
            yield from run.make(request, handle, items, noise, meter)
            entry.forwards_per_video, entry.seconds_per_video = meter.forwards_per_video, meter.seconds_per_video

        yield entry, made(), run.config.validation.fps


def _kept(subject: RecordedSubject, items: Sequence[Item]) -> list[Item]:
    """Returns the items of which a folder has videos."""
    return [item for item in items if item.key in subject.videos.files]


def _check_videos(subject: RecordedSubject, items: Sequence[Item]) -> None:
    """Raises ValueError if a folder has no video of the evaluation's, and says if it has others or lacks some."""
    num_kept, num_videos = len(_kept(subject, items)), len(subject.videos.files)
    if not num_kept:
        raise ValueError(
            f"{subject.videos.path} has no video of the evaluated prompts (the first is {items[0].key[0]!r}); name the "
            "videos PROMPT-INDEX.mp4, or give --prompts"
        )
    if num_kept < max(num_videos, len(items)):
        print(f"{subject.name}: {num_kept} of its {num_videos} videos are among the {len(items)} of this evaluation")


def _recorded(subject: RecordedSubject, kept: Sequence[Item]) -> Iterator[MadeVideo]:
    return (MadeVideo(item.key, subject.videos.read(item.key)) for item in kept)


def _written(videos: Iterator[MadeVideo], folder: Path, fps: int) -> Iterator[MadeVideo]:
    """Yields videos, each after it is written."""
    writer = VideoWriter(folder, fps)
    for one in videos:
        writer.write(one.key, one.video)
        yield one


def _move_earlier(folder: Path) -> None:
    for name in (RESULT, TABLE):
        if (file := folder / name).is_file():
            made = datetime.fromtimestamp(file.stat().st_mtime, timezone.utc)
            file.replace(file.with_stem(f"{file.stem}-{made:%Y%m%d-%H%M%S}"))


def _command(options: EvaluateOptions) -> str:
    words = ["titan-distill", "evaluate", *options.subjects]
    for option in fields(options)[1:]:
        if (value := getattr(options, option.name)) != option.default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{option.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)
