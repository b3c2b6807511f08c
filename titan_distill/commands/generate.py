"""`titan-distill generate` makes one video from a checkpoint, sampled exactly as validation samples it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tyro.conf import Positional

from titan_distill.attention.dense import order_backends
from titan_distill.checkpoint.discovery import resolve
from titan_distill.checkpoint.initial_weights import trained_role
from titan_distill.checkpoint.manifest import read_manifest
from titan_distill.checkpoint.tools.contents import role_tensors
from titan_distill.config.config import Config
from titan_distill.config.loading import load_config
from titan_distill.config.paths import of_key
from titan_distill.data.footage import read_picture
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.diffusion.requests import SampleRequest, check_options
from titan_distill.fault_tolerance.files import atomic, with_umask_mode
from titan_distill.fault_tolerance.outputs import probe_file
from titan_distill.methods.base import method_class
from titan_distill.models.base import Adapter, model_family
from titan_distill.observability.timing import PhaseTimer
from titan_distill.parallelisms.mesh import Layouts, default_device
from titan_distill.roles import RoleHandle, RoleManager
from titan_distill.validation.sampling import Sampling
from titan_distill.validation.video import write_mp4


def generate(
    checkpoint: Positional[Path],
    prompt: str,
    out: Path,
    role: str = "student",
    seed: int = 0,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    num_frames: int | None = None,
    cache_window_frames: int | None = None,
    sink_frames: int | None = None,
    raw_weights: bool = False,
    image: Path | None = None,
    save_noise: Path | None = None,
    trust_imports: tuple[str, ...] = (),
) -> None:
    """Make a video from a prompt, or from a prompt and a first picture, with a trained role.

    Args:
        checkpoint: Folder of a step, or of a run, which means its latest.
        prompt: What the video should show.
        out: mp4 file to write.
        role: Trained role to sample from.
        seed: Seed of the noise.
        num_steps: Sampling steps. Default: the method's. A few-step student has a fixed schedule.
        guidance_scale: Classifier-free guidance, standard form. Default: the method's.
        num_frames: Length of the video. Only a causal role can make it longer or shorter than it was trained.
        cache_window_frames: Size of a causal role's KV cache in latent frames. Default: the run's.
        sink_frames: Attention sink in latent frames: the first frames, never evicted from the KV cache. Default: the
            run's.
        raw_weights: Sample from the trained weights even where there is an average of them.
        image: Picture (or video, of which the first frame) that the video starts from, scaled to cover its size and
            cropped; for models that take one.
        save_noise: safetensors file to write with the noise of every step, all that the picture gives, and the latents
            of the video. The snippet in an exported folder's README.md makes the same video from it.
        trust_imports: Modules of the run's job.imports to import although they are not part of titan_distill. Importing
            a module runs its code. Default: none.
    """
    if not prompt.strip():
        raise ValueError("--prompt is empty; say what the video should show")
    check_options(num_steps, guidance_scale, seed)
    probe_file(out, "--out", (".mp4",))
    if save_noise is not None:
        probe_file(save_noise, "--save-noise", (".safetensors",))
    device = default_device()
    pipeline = {"cache_window_frames": cache_window_frames, "sink_frames": sink_frames}
    with of_key("CHECKPOINT", checkpoint):
        step = resolve(checkpoint)
    config, adapter, handle, request = load_role(
        step, role, device, pipeline, raw_weights=raw_weights, trusted=trust_imports
    )
    if num_steps is not None and request.sigmas is not None:
        raise ValueError(
            f"--num-steps {num_steps} contradicts the {role}'s own {len(request.sigmas)} steps; leave it out"
        )
    if num_steps is not None:
        request = dataclasses.replace(request, num_steps=num_steps)
    if guidance_scale is not None:
        request = dataclasses.replace(request, guidance_scale=guidance_scale)
    if save_noise is not None and adapter.segment_lengths(handle) is not None:
        raise ValueError(
            f"--save-noise {save_noise}: the {role} is causal, and diffusers, for which the file is, runs no causal "
            "model; leave it out"
        )
    length = None if num_frames is None else adapter.num_latents(handle, num_frames)
    text = condition = adapter.encode_prompts([prompt])
    if image is not None:
        condition = adapter.with_image(text, _picture(config, image)[None])
    noise = KeyedNoise(seed) if save_noise is None else (recorded := RecordedNoise(seed))
    latents = Sampling(adapter, noise, device).run(request, handle, condition, [0], length)
    if save_noise is not None:
        of_picture = {name: condition[name] for name in condition.keys() - text.keys()}
        _save_noise(save_noise, {**recorded.tensors(), **of_picture, "latents": latents}, prompt, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(out, adapter.decode_latents(latents)[0].cpu().numpy(), config.validation.fps)
    print(f"{out}: {prompt!r}, {request.solver}, {request.num_steps} steps, seed {seed}")


class RecordedNoise(KeyedNoise):
    """Keyed noise that keeps its draws."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._draws: list[Tensor] = []

    def normal(self, *args: Any, **kwargs: Any) -> Tensor:
        self._draws.append(super().normal(*args, **kwargs))
        return self._draws[-1]

    def tensors(self) -> dict[str, Tensor]:
        """Returns all draws in their order: `noise.0` is the sampler's start, later ones its fresh noise."""
        return {f"noise.{index}": draw for index, draw in enumerate(self._draws)}


def _save_noise(path: Path, tensors: Mapping[str, Tensor], prompt: str, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary, with_umask_mode(temporary):
        save_file(on_host, temporary, metadata={"prompt": prompt, "seed": str(seed)})


def _picture(config: Config, image: Path) -> Tensor:
    size = model_family(config.recipe.family)(config).video_size()
    if size is None:
        raise ValueError(f"--image {image}: family {config.recipe.family!r} makes no videos; leave it out")
    with of_key("--image", image):
        return read_picture(image, *size[1:])


def load_role(
    checkpoint: Path,
    role: str,
    device: torch.device,
    pipeline: Mapping[str, object] = MappingProxyType({}),
    *,
    raw_weights: bool,
    trusted: Collection[str] = (),
) -> tuple[Config, Adapter, RoleHandle, SampleRequest]:
    """A trained role of a checkpoint as one module, its run's configuration, and how its method samples from it.
    `pipeline` replaces values of the run's [pipeline_config], except where it has None. Modules of the run's
    job.imports from outside of this package are imported only if they are in `trusted`.

    Raises ValueError when the run's `config.toml` is not beside the checkpoints, or for what `role_tensors`
    refuses.
    """
    config = run_config(checkpoint, pipeline, trusted)
    manifest = read_manifest(checkpoint)
    trained = trained_role(checkpoint, manifest, role)
    use_ema = trained.has_ema and not raw_weights
    family = model_family(config.recipe.family)(config)
    order_backends(device)
    modules = {}
    for name in trained.modules:
        tensors = role_tensors(checkpoint, role, use_ema=use_ema, module=name)
        modules[name] = family.restore_module(trained.architecture, tensors, device)
    handle = RoleHandle(role, modules, trainable=False)
    roles, adapter = RoleManager([handle]), family.build_adapter(device, Layouts.alone(device))
    adapter.start_step(roles, max(0, manifest.step - 1))  # the last one trained, as validation finds the models
    method = method_class(config.recipe.method)(
        config.method_config, roles, adapter, KeyedNoise(config.job.seed), PhaseTimer(device)
    )
    request = method.validation_request().of_role(role)
    if request is None:
        raise ValueError(f"recipe.method = {config.recipe.method!r} does not say how to sample from its {role}")
    return config, adapter, handle, request


def run_config(checkpoint: Path, pipeline: Mapping[str, object], trusted: Collection[str]) -> Config:
    """Returns the configuration of a checkpoint's run, see `load_role`."""
    config_file = checkpoint.parent.parent / "config.toml"
    if not config_file.is_file():
        raise ValueError(
            f"{checkpoint} lies in no run folder: {config_file} is missing; keep checkpoints below their run"
        )
    overrides = [f"--pipeline_config.{name}={value}" for name, value in pipeline.items() if value is not None]
    overrides.append(f"--job.output_dir={config_file.parent}")  # the run may have moved, or be somebody else's
    return load_config(["--job.config_file", str(config_file), *overrides], trusted)
