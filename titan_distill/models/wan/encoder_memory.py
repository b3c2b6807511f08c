"""Memory of Wan's VAE and text encoder, and of decoding one clip with the VAE, in bytes.

diffusers' decoder turns one latent frame at a time into four pictures. It holds

- *caches*: for every convolution over time in every stage, the last two frames of its input;
- *a working set*: the input of the current stage, and the tensors of the residual block, upsampling or shortcut that
  runs. A convolution holds its input four times (the original, its last frames for the cache, a padded copy, and a copy
  in the kernel's memory order). An upsampling enlarges its input in fp32;
- *pictures*: all pictures decoded so far. Every four new ones are concatenated to them, which makes a copy; at the end
  they are converted to uint8 by way of fp32.

The formula adds up these copies stage by stage. On a CPU, decoding two clips at once with small VAEs peaked at 101 to
102 % of the result (`tests/unit/test_decoding.py` allows 98 to 104 %). A single small fp32 clip takes about three times
as much on a CPU, where PyTorch uses another algorithm. cuDNN's workspaces are not counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from safetensors import safe_open

from titan_distill.models.wan.pipeline_config import WanPipelineConfig

_FP32 = 4
CACHED_FRAMES = 2


@dataclass(frozen=True)
class Decoder:
    """Shape of an AutoencoderKLWan's decoder. Fields are named as in its config; the defaults are those of Wan 2.1.

    `upsamples_time` has one flag per upsampling, in the order they run: whether it also doubles the frames.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    upsamples_time: tuple[bool, ...] = (True, True, False)
    is_residual: bool = False
    out_channels: int = 3

    @classmethod
    def read(cls, file: Path) -> Decoder:
        """Reads a VAE's `config.json`. A key that the file lacks has diffusers' default."""
        config = json.loads(file.read_text(encoding="utf-8"))
        return cls(
            base_dim=config.get("decoder_base_dim") or config.get("base_dim", cls.base_dim),
            z_dim=config.get("z_dim", cls.z_dim),
            dim_mult=tuple(config.get("dim_mult", cls.dim_mult)),
            num_res_blocks=config.get("num_res_blocks", cls.num_res_blocks),
            upsamples_time=tuple(reversed(config.get("temperal_downsample", (False, True, True)))),
            is_residual=config.get("is_residual", cls.is_residual),
            out_channels=config.get("out_channels", cls.out_channels),
        )

    def stages(self) -> Iterator[tuple[int, int, int]]:
        """Yields the channels of each stage: (of its input, inside it, of its output)."""
        widths = [self.base_dim * multiple for multiple in (self.dim_mult[-1], *reversed(self.dim_mult))]
        for index, (entering, within) in enumerate(pairwise(widths)):
            leaving = within
            if not self.is_residual:  # an upsampling halves the channels
                entering = entering // 2 if index else entering
                leaving = within // 2 if index < len(self.dim_mult) - 1 else within
            yield entering, within, leaving


PUBLISHED = {16: Decoder(), 48: Decoder(base_dim=256, z_dim=48, is_residual=True, out_channels=12)}
"""Published decoders by number of latent channels: 16 for Wan 2.1 and the A14B, 48 for Wan 2.2 TI2V-5B."""

# Parameters of the published encoders (the VAE's by latent channels), for a pipeline folder without weights.
VAE_NUMBERS, TEXT_ENCODER_NUMBERS = {16: 126_892_531, 48: 704_688_668}, 5_680_910_336


def encoder_bytes(pipeline: WanPipelineConfig, channels: int, element_bytes: int) -> tuple[float, float]:
    """Returns the bytes of the weights of VAE and text encoder on the device. 0 without a pipeline folder."""
    if not pipeline.path:
        return 0.0, 0.0
    vae = _numbers_in(Path(pipeline.path) / "vae") or VAE_NUMBERS.get(channels, max(VAE_NUMBERS.values()))
    text = _numbers_in(Path(pipeline.path) / "text_encoder") or TEXT_ENCODER_NUMBERS
    return element_bytes * vae, 0.0 if pipeline.offload_text_encoder else element_bytes * text


def find_decoder(pipeline: str, channels: int) -> Decoder:
    """Returns the decoder of a pipeline folder, or else the published one with the same number of latent channels."""
    file = Path(pipeline) / "vae" / "config.json"
    return Decoder.read(file) if file.is_file() else PUBLISHED[channels]


def decoding_bytes(decoder: Decoder, latents: tuple[int, int, int], element_bytes: int) -> float:
    """Returns the peak memory, in bytes, of decoding one clip of `latents` (frames, height, width), without the
    weights."""
    num_frames, height, width = latents
    area, frames = height * width, 1
    caches = CACHED_FRAMES * area * (decoder.z_dim + 4 * decoder.base_dim * decoder.dim_mult[-1])
    most = 0.0
    for index, (entering, within, leaving) in enumerate(decoder.stages()):
        # Until the stage ends, its caller holds the stage's input, and its shortcut a copy of that input.
        entered = area * frames * entering
        held = entered * (1 + decoder.is_residual)
        for block in range(decoder.num_res_blocks + 1):
            own = within if block else entering
            caches += CACHED_FRAMES * area * (own + within)
            beside = held if block else held - entered
            most = max(most, beside + area * _residual_block(own, within, frames, element_bytes))
        if index == len(decoder.dim_mult) - 1:
            break
        held += area * within * frames
        if decoder.upsamples_time[index]:
            caches += CACHED_FRAMES * area * within
            most = max(most, held + area * _convolution(within, 2 * within, frames))
            frames *= 2
        most = max(most, held + area * frames * _upsampling(within, leaving, element_bytes))
        area *= 4
        if decoder.is_residual:  # before the addition: the stage's result, and its shortcut twice
            most = max(most, held + 3 * area * frames * leaving)
    caches += CACHED_FRAMES * area * within
    pictures = area * decoder.out_channels * (frames * (num_frames - 1) + 1)
    working = max(most + pictures, 2 * pictures)
    return max(element_bytes * (caches + working), (element_bytes + _FP32 + 1) * pictures)


def _residual_block(entering: int, leaving: int, frames: int, element_bytes: int) -> float:
    """Returns the peak number of elements per position of a residual block."""
    kept = frames * (entering + (leaving if entering != leaving else 0))  # its input and shortcut
    norms = 2 * frames * max(entering, leaving) * _FP32 / element_bytes  # computed in fp32: input and output
    return kept + max(_convolution(entering, leaving, frames), _convolution(leaving, leaving, frames), norms)


def _convolution(entering: int, leaving: int, frames: int) -> float:
    """Returns the number of elements per position of a causal convolution over time: its input four times, and its
    output."""
    return entering * (frames + CACHED_FRAMES + 2 * (frames + CACHED_FRAMES)) + leaving * frames


def _upsampling(within: int, leaving: int, element_bytes: int) -> float:
    """Returns the peak number of elements per input position of a 2 × 2 upsampling. It holds the input with its frames
    as a batch, the enlarged copy (in fp32, then in the dtype of the weights), and the convolution's output."""
    found = 4 * within
    if element_bytes == _FP32:
        return within + found + 4 * leaving
    return within + max(found * _FP32 / element_bytes + found, found + 4 * leaving)


def _numbers_in(folder: Path) -> int:
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total
