"""Videos of a run's roles for `titan-distill evaluate`, sampled as validation samples them, with their costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from titan_distill.attention.dense import order_backends
from titan_distill.commands.subjects import SampledSubject
from titan_distill.config.config import Config
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.diffusion.requests import SampleRequest
from titan_distill.methods.base import method_class
from titan_distill.models.base import model_family
from titan_distill.observability.timing import PhaseTimer
from titan_distill.parallelisms.mesh import Layouts
from titan_distill.roles import RoleHandle, RoleManager
from titan_distill.validation.rating import MadeVideo
from titan_distill.validation.sampling import Sampling
from titan_distill.validation.video_folder import Key

MOST_PROMPTS = 2**20
"""Largest number of prompts. Noise of a prompt's second video has the prompt's number plus this as its key, whatever
the number of prompts is, and that of the first video has the same key as in a validation."""
_SAMPLING = "sampling"


class Item(NamedTuple):
    """One video to make: its key, the number of its prompt, and the sample id that its noise is keyed by."""

    key: Key
    prompt: int
    noise_id: int


def plan_items(prompts: Sequence[str], videos_per_prompt: int) -> list[Item]:
    """Returns the videos to make, those of one prompt together. A repeated prompt goes on with the index."""
    items, seen = [], Counter[str]()
    for number, text in enumerate(prompts):
        for repetition in range(videos_per_prompt):
            items.append(Item((text, seen[text]), number, number + repetition * MOST_PROMPTS))
            seen[text] += 1
    return items


@dataclass
class Meter:
    """Costs of one subject's videos."""

    num_forwards: int = 0
    """Samples that went through the role's networks, so a forward with guidance counts twice."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of sampling per batch, without encoding of prompts and without decoding."""
    sizes: list[int] = field(default_factory=list)
    """Videos per batch."""

    @property
    def forwards_per_video(self) -> float:
        return self.num_forwards / sum(self.sizes)

    @property
    def seconds_per_video(self) -> float:
        """Seconds per video. The first batch warms up, so it counts only if it is alone."""
        first = 1 if len(self.sizes) > 1 else 0
        return sum(self.seconds[first:]) / sum(self.sizes[first:])

    @contextmanager
    def counting(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Counts the forwards of networks within the block."""

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.num_forwards += len(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))

        hooks = [module.register_forward_pre_hook(count, with_kwargs=True) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class RunSampler:
    """All that the roles of one run share: adapter, encoded prompts, and the method's requests."""

    def __init__(self, config: Config, prompts_file: str, prompts: Sequence[str], device: torch.device) -> None:
        self.config, self.device = config, device
        self.family = model_family(config.recipe.family)(config)
        order_backends(device)
        self.adapter = self.family.build_adapter(device, Layouts.alone(device))
        self.condition = self.adapter.prompt_conditions(prompts_file, prompts, range(len(prompts)))
        self.adapter.release_text_encoder()
        method, noise = method_class(config.recipe.method), KeyedNoise(config.job.seed)
        timer = PhaseTimer(device)
        self.request = method(config.method_config, RoleManager([]), self.adapter, noise, timer).validation_request()

    def requests(self, role: str) -> list[SampleRequest]:
        """Returns the role's sampling, the validation's reference first. A trained role is sampled as it is now; a
        frozen one in all ways that a validation samples it. Raises ValueError if a validation does not sample the
        role."""
        is_frozen = not self.config.roles[role].trainable
        found = [x for x in self.request.samples if x.role == role and (is_frozen or not x.baseline)]
        if not found:
            raise ValueError(
                f"recipe.method = {self.config.recipe.method!r} does not say how to sample from its {role}; name "
                "another role"
            )
        return sorted(found, key=lambda x: x.label != self.request.reference)

    def build(self, subject: SampledSubject) -> RoleHandle:
        """Returns the role with its networks."""
        handle = RoleHandle(subject.role, subject.build(self.family, self.device), trainable=False)
        self.adapter.start_step(RoleManager([handle]), max(0, subject.step - 1))  # the last one trained
        return handle

    def make(
        self, request: SampleRequest, handle: RoleHandle, items: Sequence[Item], noise: KeyedNoise, meter: Meter
    ) -> Iterator[MadeVideo]:
        """Yields the videos of `items` in their order, as they are finished."""
        sampling, timer = Sampling(self.adapter, noise, self.device), PhaseTimer(self.device)
        size = self.config.validation.batch_size
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        for batch in tqdm(batches, desc=request.label, unit="batch", mininterval=1.0):
            condition = self.condition([item.prompt for item in batch])
            with timer(_SAMPLING), meter.counting(list(handle.modules.values())):
                latents = sampling.run(request, handle, condition, [item.noise_id for item in batch])
            meter.seconds.append(timer.drain()[f"time/{_SAMPLING}"])
            meter.sizes.append(len(batch))
            videos = self.adapter.decode_latents(latents).cpu()
            for item, video, latent in zip(batch, videos, latents.cpu(), strict=True):
                yield MadeVideo(item.key, video, latent)
