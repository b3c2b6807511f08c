"""Validation of Wan models: sample what the method asks for, decode, score, and show.

Prompts are split over data groups; every rank samples equally many (the last ones may repeat), because with sharded
weights a forward pass is a collective. Rank 0 gathers latents, scores and the few videos that are shown, and writes
mp4s and one contact sheet a validation. Baselines (the teacher, the student before training) are sampled once, before
the first step, and kept in ``baselines/``, so that a resumed run compares with the very same samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from titan_distill.data.prompts import read_prompts
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.methods.base import SampleRequest, ValidationRequest
from titan_distill.models.wan.adapter import WanAdapter
from titan_distill.models.wan.validation_images import FirstFrames, PictureRows
from titan_distill.parallelisms.mesh import Layouts
from titan_distill.roles import RoleHandle, RoleManager
from titan_distill.validation.base import Sampling, Validator
from titan_distill.validation.report import sliced_wasserstein, sliced_wasserstein_excess
from titan_distill.validation.scorers import SCORERS
from titan_distill.validation.video import contact_sheet, write_mp4

if TYPE_CHECKING:
    from titan_distill.config import Config


@dataclass
class SampleSet:
    """Samples of all prompts. Latents are [N, C, F, H, W] fp32; videos are the first few, uint8 [n, T, height, width,
    3]."""

    latents: Tensor
    videos: Tensor
    scores: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"latents": self.latents.contiguous(), "videos": self.videos.contiguous()}
        save_file(tensors, path, {"scores": json.dumps(self.scores)})

    @classmethod
    def load(cls, path: Path) -> SampleSet:
        with safe_open(path, "pt") as file:
            return cls(file.get_tensor("latents"), file.get_tensor("videos"), json.loads(file.metadata()["scores"]))


class WanValidator(Validator):
    """See the module's docstring."""

    def __init__(self, config: Config, adapter: WanAdapter, folder: Path, layouts: Layouts) -> None:
        self.config, self.adapter, self.folder = config.validation, adapter, folder
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.layouts = layouts
        self.prompts = read_prompts(self.config.prompts or config.data.path, self.config.num_prompts)
        self.first_frames: FirstFrames | None = None
        pipeline = config.pipeline_config
        self.pictures = PictureRows(self.config.prompts or config.data.path, adapter.image_tensors)
        if pipeline.validate_from_image:
            adapter.check_takes_images()
            self.first_frames = FirstFrames(self.config.prompts or config.data.path, pipeline.height, pipeline.width)
        self.score = SCORERS[self.config.scorer]
        self._baselines: dict[str, SampleSet] = {}

    def validate(self, step: int, request: ValidationRequest, roles: RoleManager) -> dict[str, float]:
        sets = {}
        baselines = tuple(sample for sample in request.samples if sample.baseline)
        # Before the first step there is nothing to compare with the baselines yet: what is trained still equals one of
        # them.
        for sample in baselines if step == 0 and baselines else request.samples:
            samples = (
                self._baseline(step, sample, roles) if sample.baseline else self._sample(sample, roles[sample.role])
            )
            if samples is not None:
                sets[sample.label] = samples
        if self.rank != 0:
            return {}
        self._show(step, request, sets)
        return self._scores(request, sets)

    def media(self, step: int) -> list[Path]:
        folder = self._step_folder(step)
        return [*sorted(folder.glob("*.png")), *sorted(folder.glob("*.mp4"))]

    def _baseline(self, step: int, request: SampleRequest, roles: RoleManager) -> SampleSet | None:
        """Sampled at step 0; after a resume read back. What was never sampled and has been trained since is left
        out."""
        if request.label in self._baselines:
            return self._baselines[request.label]
        path, role = self.folder / "baselines" / f"{request.label}.safetensors", roles[request.role]
        if step > 0 and path.is_file():
            samples = SampleSet.load(path)
        elif step > 0 and role.trainable:
            return None
        else:
            samples = self._sample(request, role)
            if self.rank == 0:
                samples.save(path)
        self._baselines[request.label] = samples
        return samples

    def _sample(self, request: SampleRequest, role: RoleHandle) -> SampleSet:
        sampling = Sampling(self.adapter, KeyedNoise(self.config.seed), self.adapter.device, self.poll)
        records: dict[int, tuple[Tensor, Tensor | None, dict[str, float]]] = {}
        with role.evaluation():
            for ids in self._batches():
                condition = self.adapter.encode_prompts([self.prompts[index] for index in ids])
                condition = {**condition, **self.pictures.tensors(ids, self.adapter.device)}
                if self.first_frames is not None:
                    frames = self.first_frames.latents(ids, self.adapter)
                    condition = self.adapter.with_first_frame(condition, frames)
                latents = sampling.run(request, role, condition, ids)
                videos = self._decode(request, ids, latents)
                for index, latent in zip(ids, latents.cpu(), strict=True):
                    shown = videos[index] if index < self.config.num_videos else None
                    scores = self.score(videos[index].numpy(), self.prompts[index]) if request.scored else {}
                    records[index] = latent, shown, scores
        return _gather(records, self.rank, self.world_size)

    def _decode(self, request: SampleRequest, ids: list[int], latents: Tensor) -> dict[int, Tensor]:
        """Videos by prompt index, of those prompts that someone will look at: the scorer, or a person."""
        seen = [row for row, index in enumerate(ids) if request.scored or index < self.config.num_videos]
        if not seen:
            return {}
        return dict(zip((ids[row] for row in seen), self.adapter.decode_latents(latents[seen]).cpu(), strict=True))

    def _batches(self) -> Iterator[list[int]]:
        """This data group's prompt indices in batches; as many batches on every rank, and of the same sizes."""
        per_rank = -(-len(self.prompts) // self.layouts.num_data_groups)
        mine = [(self.layouts.data_rank * per_rank + offset) % len(self.prompts) for offset in range(per_rank)]
        for start in range(0, per_rank, self.config.batch_size):
            yield mine[start : start + self.config.batch_size]

    def _scores(self, request: ValidationRequest, sets: dict[str, SampleSet]) -> dict[str, float]:
        values = {f"{label}/{name}": value for label, samples in sets.items() for name, value in samples.scores.items()}
        if request.reference in sets:
            reference = sets[request.reference].latents.flatten(1)
            for label, samples in sets.items():
                if label != request.reference:
                    latents = samples.latents.flatten(1)
                    values[f"{label}/sliced_wasserstein"] = sliced_wasserstein(latents, reference)
                    if len(latents) >= 4:
                        values[f"{label}/sliced_wasserstein_excess"] = sliced_wasserstein_excess(latents, reference)
        return values

    def _step_folder(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _show(self, step: int, request: ValidationRequest, sets: dict[str, SampleSet]) -> None:
        folder = self._step_folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        titles = {
            sample.label: _title(sample, sets[sample.label]) for sample in request.samples if sample.label in sets
        }
        captions = self.prompts[: self.config.num_videos]
        (folder / "captions.txt").write_text("".join(f"{index:03d} {text}\n" for index, text in enumerate(captions)))
        for label, samples in sets.items():
            for index, video in enumerate(samples.videos):
                write_mp4(folder / f"{index:03d}-{label}.mp4", video.numpy(), self.config.fps)
        if self.config.num_videos:
            columns = [(titles[label], list(samples.videos.numpy())) for label, samples in sets.items()]
            contact_sheet(folder / "contact_sheet.png", columns, captions)


def _gather(records: dict, rank: int, world_size: int) -> SampleSet:
    """All ranks' records on rank 0, in the order of the prompts; other ranks get an empty set."""
    if world_size > 1:
        gathered: list = [None] * world_size
        dist.gather_object(records, gathered if rank == 0 else None)
        if rank != 0:
            return SampleSet(torch.empty(0), torch.empty(0))
        records = {index: record for part in gathered for index, record in part.items()}
    ordered = [records[index] for index in sorted(records)]
    names = ordered[0][2]
    scores = {name: sum(score[name] for _, _, score in ordered) / len(ordered) for name in names}
    videos = [video for _, video, _ in ordered if video is not None]
    return SampleSet(
        torch.stack([latents for latents, _, _ in ordered]), torch.stack(videos) if videos else torch.empty(0), scores
    )


def _title(request: SampleRequest, samples: SampleSet) -> str:
    """What was sampled and how; behind the line break, in smaller type, how well."""
    guidance = f", CFG {request.guidance_scale:g}" if request.guidance_scale != 1 else ""
    title = f"{request.label.replace('_', ' ')}, {request.num_steps} steps{guidance}"
    accuracy = samples.scores.get("prompt_accuracy")
    return title if accuracy is None else f"{title}\nprompt accuracy {accuracy:.2f}"
