"""The Python program in an exported folder's `README.md` that samples the role with diffusers and safetensors alone.

Only a role with two experts chooses between them, and only one that starts from a picture reads one, so the program is
put together from lines. It stays within 25, so that a reader can check it at a glance and copy its loop elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from titan_distill.diffusion.requests import SampleRequest
from titan_distill.models.wan.image_channels import MASK_CHANNELS

MAX_LINES = 25
PROMPT = "a red circle moving left slowly"
CHOICE = "t >= 1000 * pipe.config.boundary_ratio"


@dataclass(frozen=True)
class Snippet:
    """A role's sampling, as far as the program depends on it.

    Attributes:
        latent_shape: (C, F, H, W) of a sample.
        size: (frames, height, width) of a video, in pixels.
        takes_first_frame: whether the first latent frame may be given, as in TI2V.
        takes_channels: whether the network has input channels for a picture.
        takes_clip: whether the network attends to CLIP's tokens of the picture.
        second_scale: guidance scale of the low-noise expert.
    """

    request: SampleRequest
    latent_shape: tuple[int, int, int, int]
    size: tuple[int, int, int]
    fps: int
    dtype: str
    max_text_tokens: int
    negative_prompt: str
    takes_first_frame: bool
    takes_channels: bool
    takes_clip: bool
    has_two_experts: bool
    second_scale: float | None

    def text(self) -> str:
        """Returns the program."""
        imports = ["import diffusers", "import torch", "from safetensors.torch import load_file"]
        body = [*self._inputs(), *self._conditions(), *self._loop(), *self._output()]
        space = [""] if len(imports) + len(body) < MAX_LINES else []
        return "\n".join([*imports, *space, *body])

    @property
    def _is_guided(self) -> bool:
        return self.request.guidance_scale != 1

    def _inputs(self) -> list[str]:
        names, values = "folder, device, prompt, seed, saved", f'".", "cuda", "{PROMPT}", 0, None'
        if self.takes_first_frame or self.takes_channels:
            names, values = f"{names}, picture", f"{values}, None"
        shape = ", ".join(map(str, (1, *self.latent_shape)))
        draw = f"torch.randn({shape}, generator=generator).to(device)"
        noise = [f'x = file["noise.0"] if saved else {draw}']
        sigmas = self.request.sigmas
        if sigmas is not None and self.request.solver == "sde":
            noise = [f'x, *noise = [file[f"noise.{{i}}"] if saved else {draw} for i in range({len(sigmas)})]']
        return [
            f"{names} = {values}",
            *([] if sigmas is None else [f"sigmas = {list(sigmas)}"]),
            f"pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.{self.dtype}).to(device)",
            "file, generator = load_file(saved, device) if saved else {}, torch.Generator().manual_seed(seed)",
            *noise,
        ]

    def _conditions(self) -> list[str]:
        options = f"max_sequence_length={self.max_text_tokens}, device=device"
        guided = f"text, negative = pipe.encode_prompt(prompt, {self.negative_prompt!r}, {options})"
        plain = f"text, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, {options})"
        statistics = '[pipe.vae.config[name] for name in ("latents_mean", "latents_std")]'
        return [
            "torch.set_grad_enabled(False)",
            guided if self._is_guided else plain,
            f"mean, std = torch.tensor({statistics}, device=device).view(2, 1, -1, 1, 1, 1)",
            *self._picture(),
        ]

    def _picture(self) -> list[str]:
        (channels, frames, height, width), (num_frames, *pixels) = self.latent_shape, self.size
        size = ", ".join(map(str, pixels))
        load = f'(diffusers.utils.load_image(picture), {size}, "crop")'
        if self.takes_first_frame:
            return [
                'frame = file.get("first_frame", 0.0)',
                "if picture:",
                f"    image = pipe.video_processor.preprocess{load}[:, :, None]",
                "    frame = (pipe.vae.encode(image.to(device, pipe.vae.dtype)).latent_dist.mode().float() - mean)"
                " / std",
                f"mask = torch.tensor([float(not torch.is_tensor(frame))] + {frames - 1} * [1.0], device=device)"
                ".view(1, 1, -1, 1, 1)",
            ]
        if not self.takes_channels:
            return []
        clip = f"1, {channels}, {size}, {num_frames}, device=device)[1][:, {MASK_CHANNELS}:]"
        first = f"torch.eye({frames}, device=device)[0].view(1, 1, {frames}, 1, 1)"
        names, of_file, tokens = "clip", 'file.get("image_latent")', []
        if self.takes_clip:
            names, of_file = f"{names}, tokens", f'{of_file}, file.get("image_embedding")'
            tokens = ["    tokens = pipe.encode_image(image, device)"]
        return [
            f"{names} = {of_file}",
            "if picture:",
            f"    image = pipe.video_processor.resize{load}",
            *tokens,
            f"    clip = pipe.prepare_latents(pipe.video_processor.preprocess(image), {clip}",
            f"given = torch.cat([{first}.expand(1, {MASK_CHANNELS}, {frames}, {height}, {width}), clip], 1)",
        ]

    def _loop(self) -> list[str]:
        """Returns the loop over the steps, which leaves the clean latents in `x`."""
        sigmas, guided = self.request.sigmas, f"u + {self._scale()} * (v - u)"
        if sigmas is None:
            return [
                f"pipe.scheduler.set_timesteps({self.request.num_steps}, device=device)",
                "pipe.scheduler.set_begin_index(0)",
                "for t in pipe.scheduler.timesteps:",
                *self._velocity(),
                f"    x = pipe.scheduler.step({guided if self._is_guided else 'v'}, t, x)[0]",
            ]
        steps = "for sigma, lower in zip(sigmas, [*sigmas[1:], 0.0]):"
        step = "    x = x + (lower - sigma) * v"
        if self.request.solver == "sde":
            steps = "for sigma, lower, fresh in zip(sigmas, [*sigmas[1:], 0.0], [*noise, 0.0]):"
            step = "    x = (1 - lower) * (x - sigma * v) + lower * fresh"
        time = "    t = torch.tensor(1000 * sigma, device=device)"
        return [steps, time, *self._velocity(), *([f"    v = {guided}"] if self._is_guided else []), step]

    def _velocity(self) -> list[str]:
        """Returns the lines that predict `v` from `x` at the timestep `t`, and `u` for the negative prompt."""
        lines, network = [], "pipe.transformer"
        if self.has_two_experts:
            lines, network = [f"    network = pipe.transformer if {CHOICE} else pipe.transformer_2"], "network"
        shown, time, after, masked = "x", "t[None]", "", ""
        if self.takes_first_frame:
            tokens = self.latent_shape[2] * self.latent_shape[3] // 4
            times = f"(t * mask.flatten()).repeat_interleave({tokens})[None]"
            lines.append(f"    x, times = mask * x + (1 - mask) * frame, {times}")
            time, masked = "times", "mask * "
        if self.takes_channels:
            shown, after = "torch.cat([x, given], 1)", ", tokens.to(text.dtype)" if self.takes_clip else ""
        call = f"{masked}{network}({shown}.to(text.dtype), {time}, %s{after})[0].float()"
        if self._is_guided:
            return [*lines, f"    v, u = ({call % 'y'} for y in (text, negative))"]
        return [*lines, f"    v = {call % 'text'}"]

    def _scale(self) -> str:
        scale = f"{self.request.guidance_scale:g}"
        if self.second_scale is None:
            return scale
        return f"({scale} if {CHOICE} else {self.second_scale:g})"

    def _output(self) -> list[str]:
        # A scheduler changes the given frame, although its velocity is 0.
        is_changed = self.takes_first_frame and self.request.sigmas is None
        frames = "pipe.video_processor.postprocess_video(video, 'pil')[0]"
        return [
            *(["x = mask * x + (1 - mask) * frame"] if is_changed else []),
            "video = pipe.vae.decode((x * std + mean).to(pipe.vae.dtype)).sample.float()",
            f"diffusers.utils.export_to_gif({frames}, 'video.gif', fps={self.fps})".replace("'", '"'),
        ]
