"""Footage to a training set: a folder of videos and a file of captions in, latents and text embeddings out.

The shortest honest path: one process, one pass, one parquet file. Each video is resampled and cut into clips of equal
size; each clip goes through the VAE's posterior *mean* (training adds noise of its own, and the mean makes the file
reproducible) and is normalised to ``(z - latents_mean) / latents_std``, the space in which Wan's transformer works. A
fault in any video stops the whole job before a file appears: a data set that silently lacks clips is worse than none.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from titan_distill.config.dtypes import DTYPES
from titan_distill.data.footage import SUFFIXES, read_clips
from titan_distill.data.parquet import LatentRow, write_rows
from titan_distill.data.summary import DatasetSummary, inspect
from titan_distill.data.tables import non_empty, read_csv, read_text
from titan_distill.models.wan.image_channels import EMBEDDING, LATENT, encode_pictures
from titan_distill.models.wan.image_encoder import ImageEncoder
from titan_distill.models.wan.text_encoder import TextEncoder
from titan_distill.models.wan.vae import encode_video, load_vae
from titan_distill.parallelisms.mesh import default_device

logger = logging.getLogger(__name__)

OUTPUT_NAME = "clips.parquet"

# The transformer takes patches of 1 × 2 × 2 latents.
_PATCH_SIZE = 2


@dataclass(frozen=True)
class PreprocessConfig:
    """What `titan-distill data preprocess` reads and writes."""

    folder: tyro.conf.Positional[Path]
    """Folder of videos, subfolders included."""
    captions: Path
    """Captions: .csv with the columns file_name and caption, or .jsonl with these keys; names below the folder."""
    vae: Path
    """AutoencoderKLWan: its diffusers folder, or the pipeline folder that has it as vae/."""
    text_encoder: Path
    """UMT5 encoder: its folder, or the pipeline folder that has it as text_encoder/."""
    out: Path
    """Folder for the parquet file; data.path of the training job."""
    tokenizer: Path | None = None
    """Tokenizer folder; tokenizer/ beside the text encoder if not given."""
    height: int = 96
    """Pixels, a multiple of twice the VAE's compression; videos are scaled to cover height × width and cropped."""
    width: int = 96
    """Pixels, likewise."""
    num_frames: int = 17
    """Frames a clip, 4 n + 1 for a VAE that compresses time by 4."""
    fps: float | None = 8.0
    """Frames a second after resampling (a rate above the video's repeats frames); None keeps every frame."""
    stride: int | None = None
    """Frames between the starts of two clips of a video; num_frames, so no overlap, if not given."""
    clips_per_video: int | None = None
    """The first so many clips of each video; all if not given."""
    max_text_tokens: int = 64
    """Captions are cut to so many tokens, with a warning; Wan's own limit is 512."""
    images: bool = False
    """Also encode the first frame of each clip as the picture that image-to-video models with channels for it take."""
    image_encoder: Path | None = None
    """With --images: pipeline folder with image_encoder/ and image_processor/ (CLIP), for models that attend to it."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """How latents and text embeddings are stored; both are computed in float32."""
    device: str | None = None
    """Where the VAE and the text encoder run, such as cpu or cuda:1. Default: the GPU, or the CPU where there is
    none."""


def preprocess(config: PreprocessConfig) -> DatasetSummary:
    """Encode a folder of footage into ``out/clips.parquet`` and return what the file holds.

    Raises:
        ValueError: a missing folder, a video without caption or caption without video, sizes that the VAE can't take,
            a video that is damaged or too short, output that already exists.
    """
    output = config.out / OUTPUT_NAME
    if output.exists():
        raise ValueError(f"{output} exists: remove it or choose another folder for --out")
    captions = read_captions(config.captions)
    videos = find_videos(config.folder, captions, config.captions)
    if config.image_encoder and not config.images:
        raise ValueError(f"--image-encoder {config.image_encoder} has no effect without --images; add it")
    device = default_device() if config.device is None else torch.device(config.device)
    text_encoder = TextEncoder(config.text_encoder, config.tokenizer, device=device)
    vae = load_vae(config.vae, device)
    check_size(config, vae.config.scale_factor_spatial, vae.config.scale_factor_temporal)
    write_rows(output, _rows(config, videos, captions, vae, text_encoder, device))
    return inspect(output)


def read_captions(path: Path) -> dict[str, str]:
    """Captions by file name from a .csv or .jsonl file; raises `ValueError` with the line that is wrong."""
    readers = {".csv": _csv_entries, ".jsonl": _jsonl_entries}
    if path.suffix not in readers:
        raise ValueError(f"captions file {path} ends in {path.suffix!r}: expected {' or '.join(readers)}")
    if not path.is_file():
        raise ValueError(f"no captions file {path}")
    captions: dict[str, str] = {}
    for where, entry in readers[path.suffix](path):
        name, caption = non_empty(where, entry, ("file_name", "caption"))
        if name in captions:
            raise ValueError(f"{where}: {name} has a caption already: keep one")
        captions[name] = caption
    return captions


def _csv_entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return read_csv(path, ("file_name", "caption"))


def _jsonl_entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = read_text(path).split("\n")
    for where, line in ((f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected an object with file_name and caption, found {line:.60}")
        yield where, entry


def find_videos(folder: Path, captions: Iterable[str], captions_file: Path) -> dict[str, Path]:
    """Videos below `folder` by relative name, sorted; raises `ValueError` unless they match `captions` one to one."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: expected a folder of videos")
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    videos = {path.relative_to(folder).as_posix(): path for path in sorted(paths)}
    without_video = sorted(set(captions) - set(videos))
    if without_video:
        raise ValueError(f"{captions_file} names {_listed(without_video)}: no such video in {folder}")
    without_caption = sorted(set(videos) - set(captions))
    if without_caption:
        raise ValueError(f"{folder} holds {_listed(without_caption)}: no caption in {captions_file}")
    if not videos:
        raise ValueError(f"no video in {folder}: expected files ending in {', '.join(SUFFIXES)}")
    return videos


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def check_size(config: PreprocessConfig, spatial: int, temporal: int) -> None:
    """Raise `ValueError` unless clips fit a VAE that compresses space by `spatial` and time by `temporal`."""
    multiple = spatial * _PATCH_SIZE
    for name, size in (("height", config.height), ("width", config.width)):
        if size < multiple or size % multiple:
            nearest = max(1, round(size / multiple)) * multiple
            raise ValueError(f"--{name} {size} is not a multiple of {multiple} pixels (VAE × patch): try {nearest}")
    if config.num_frames < 1 or (config.num_frames - 1) % temporal:
        nearest = max(0, round((config.num_frames - 1) / temporal)) * temporal + 1
        raise ValueError(f"--num-frames {config.num_frames} is not {temporal} n + 1: try {nearest}")
    limits = {"fps": config.fps, "stride": config.stride, "clips-per-video": config.clips_per_video}
    for name, value in limits.items():
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value:g} is not positive: leave it out for the default")


def _rows(
    config: PreprocessConfig,
    videos: dict[str, Path],
    captions: dict[str, str],
    vae: Any,
    text_encoder: TextEncoder,
    device: torch.device,
) -> Iterator[LatentRow]:
    dtype = DTYPES[config.dtype]
    image_encoder = ImageEncoder(config.image_encoder, device=device) if config.image_encoder else None
    names = (*[LATENT] * config.images, *[EMBEDDING] * (image_encoder is not None))
    for name, path in tqdm(videos.items(), unit="video", disable=None):
        embedding = text_encoder.embed(captions[name], config.max_text_tokens).to(dtype)
        clips = read_clips(
            path,
            num_frames=config.num_frames,
            stride=config.stride or config.num_frames,
            height=config.height,
            width=config.width,
            fps=config.fps,
        )
        for index, clip in enumerate(itertools.islice(clips, config.clips_per_video)):
            frames = clip.pixels.permute(0, 2, 3, 1)
            pictures = encode_pictures(names, frames[:1], config.num_frames, vae, image_encoder)
            yield LatentRow(
                id=f"{name}-{index:04d}",
                caption=captions[name],
                text_embedding=embedding,
                vae_latent=encode_video(vae, frames[None])[0].to("cpu", dtype),
                extra={name: tensor[0].to("cpu", dtype) for name, tensor in pictures.items()},
                file_name=name,
                width=config.width,
                height=config.height,
                num_frames=config.num_frames,
                duration_sec=clip.duration_seconds,
                fps=config.num_frames / clip.duration_seconds,
            )
