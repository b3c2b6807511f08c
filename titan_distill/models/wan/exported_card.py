"""The section of an exported folder's `README.md` that says how to sample the role without this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from titan_distill.config.config import Config
from titan_distill.diffusion.requests import SampleRequest
from titan_distill.diffusion.sampler import ode_sigmas
from titan_distill.diffusion.schedule import NUM_TRAIN_TIMESTEPS
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.exported_scheduler import TOLERANCE, exported_scheduler, levels_of
from titan_distill.models.wan.image_channels import takes_channels
from titan_distill.models.wan.pipeline_index import EXPAND_TIMESTEPS
from titan_distill.models.wan.snippet import Snippet

FENCE = "`" * 3
MAX_LISTED = 8
"""Most noise levels that the section lists."""
SOLVERS = {
    "sde": ("fresh noise between them", "lcm"),
    "euler": ("Euler's method", "euler"),
    "unipc": ("UniPC", "uni_pc"),
}
"""Each solver's description, and its name in ComfyUI."""
SPARSE = """\
**Neither diffusers nor ComfyUI can run this role**: it has sparse attention. Diffusers ignores the gates
(`to_gate_compress`) with a warning and attends densely, which is another network than the trained one. Sample it with
`titan-distill generate`."""
CAUSAL = """\
**Neither diffusers nor ComfyUI can run this role**: its attention is causal, and it generates a video in blocks of
frames with a KV cache. Diffusers attends to all frames at once, which is another network than the trained one. Sample
it with `titan-distill generate`."""
NO_PIPELINE = """\
This folder has no VAE, text encoder and tokenizer. Export again with `--pipeline FOLDER`, a diffusers pipeline of the
same family: this section then holds a program that samples the role."""


def sampling_section(
    request: SampleRequest,
    config: Config,
    architecture: WanConfig,
    modules: Sequence[str],
    index: Mapping[str, Any] | None,
    latent_shape: tuple[int, int, int, int],
) -> str:
    """Returns the section's text.

    Args:
        request: sampling of the role.
        config: of the run.
        architecture: of the role's networks.
        modules: names of the role's networks.
        index: `model_index.json` of the exported folder; empty if it has none, None for files in the original format.
        latent_shape: (C, F, H, W) of a sample.
    """
    if architecture.sparse_attention or architecture.causal_attention:
        return SPARSE if architecture.sparse_attention else CAUSAL
    if index is None:
        return f"{_summary(request, config.pipeline_config.flow_shift)} {_elsewhere(request, config)}"
    if not index:
        return NO_PIPELINE
    pipeline, has_two_experts = config.pipeline_config, len(modules) > 1
    if request.sigmas is None and not exported_scheduler(request, pipeline.flow_shift):
        request = replace(request, sigmas=tuple(levels_of(request, pipeline.flow_shift)))  # no scheduler to walk along
    snippet = Snippet(
        request,
        latent_shape,
        (pipeline.num_frames, pipeline.height, pipeline.width),
        config.validation.fps,
        config.training.dtype,
        config.data.max_text_tokens,
        pipeline.negative_prompt,
        takes_first_frame=bool(index.get(EXPAND_TIMESTEPS)) and not takes_channels(architecture),
        takes_channels=takes_channels(architecture),
        takes_clip=architecture.image_dim is not None,
        has_two_experts=has_two_experts,
        second_scale=pipeline.guidance_scale_2 if has_two_experts else None,
    )
    program = f"{FENCE}python\n{snippet.text()}\n{FENCE}"
    picture = ""
    if snippet.takes_first_frame:
        picture = "`picture` may name the file of a picture that the video starts from. "
    if snippet.takes_channels:
        picture = "`picture` names the file of the picture that the video starts from. "
    summary = (
        f"{_summary(request, pipeline.flow_shift)} The program needs diffusers and safetensors alone. {picture}`saved` "
        "may name the file of `titan-distill generate --save-noise FILE`: for the same prompt, the video is then that "
        "of `generate`."
    )
    return "\n\n".join((summary, program, _own_call(snippet, pipeline.flow_shift), _elsewhere(request, config)))


def _summary(request: SampleRequest, flow_shift: float) -> str:
    levels = ""
    if request.solver != "unipc" and request.num_steps <= MAX_LISTED:
        timesteps = (NUM_TRAIN_TIMESTEPS * level for level in levels_of(request, flow_shift))
        levels = f", at the timesteps {', '.join(f'{t:.5g}' for t in timesteps)}"
    return (
        f"The role makes a video in {_steps(request)}{levels}, with {SOLVERS[request.solver][0]} and "
        f"{_guidance(request)}."
    )


def _own_call(snippet: Snippet, flow_shift: float) -> str:
    request, (frames, height, width) = snippet.request, snippet.size
    is_guided = request.guidance_scale != 1
    scale = f"guidance_scale={request.guidance_scale:g}"
    if is_guided and snippet.second_scale is not None:
        scale += f", guidance_scale_2={snippet.second_scale:g}"
    arguments = [
        "prompt=prompt",
        *(["image=image"] if snippet.takes_channels else []),
        *([f"negative_prompt={snippet.negative_prompt!r}"] if is_guided else []),
        f"height={height}, width={width}, num_frames={frames}, num_inference_steps={request.num_steps}, {scale}",
        f"max_sequence_length={snippet.max_text_tokens}",
    ]
    if not exported_scheduler(request, flow_shift):
        return "Diffusers' own call cannot sample the role: none of its schedulers has these noise levels."
    seed = ", with noise from PyTorch's global generator (`torch.manual_seed`)" if request.solver == "sde" else ""
    call = f"{FENCE}python\npipe({', '.join(arguments)})\n{FENCE}"
    return (
        f"`scheduler/` has the noise levels of {_steps(request)}, so diffusers' own call does the same{seed}:\n\n{call}"
    )


def _elsewhere(request: SampleRequest, config: Config) -> str:
    flow_shift = config.pipeline_config.flow_shift
    scheduler, even = "scheduler `simple`", ode_sigmas(request.num_steps, flow_shift).tolist()
    if request.sigmas is not None and max(abs(a - b) for a, b in zip(request.sigmas, even, strict=False)) > TOLERANCE:
        scheduler = f"sigmas {', '.join(f'{sigma:.6g}' for sigma in request.sigmas)}, 0"
    return (
        f"In ComfyUI (weights from `titan-distill checkpoint export --original`): shift {flow_shift:g}, "
        f"{_steps(request)}, cfg {request.guidance_scale:g}, sampler `{SOLVERS[request.solver][1]}`, {scheduler}."
    )


def _steps(request: SampleRequest) -> str:
    return f"{request.num_steps} step{'s' if request.num_steps > 1 else ''}"


def _guidance(request: SampleRequest) -> str:
    return f"guidance {request.guidance_scale:g}" if request.guidance_scale != 1 else "no guidance"
