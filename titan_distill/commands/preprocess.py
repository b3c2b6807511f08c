"""Footage to a training set: a folder of videos and a file of captions in, latents and text embeddings out.

One process makes one pass and one parquet file. Each video is resampled and cut into clips of equal size; the encoders
of the model family encode each clip (Wan: the VAE's posterior *mean*, because training adds noise of its own and the
mean is reproducible, normalised to the space in which the transformer works). A fault in any video stops the whole job
before a file appears: a data set that silently lacks clips is worse than none.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from titan_distill.config.dtypes import DTYPES
from titan_distill.config.paths import of_key
from titan_distill.config.sections import MAX_FPS, RecipeConfig
from titan_distill.data import tables
from titan_distill.data.folders import files_below, plain_name
from titan_distill.data.footage import SUFFIXES, VideoSize, read_clips
from titan_distill.data.manifest import DataManifest, write_manifest
from titan_distill.data.parquet import LatentRow, write_rows
from titan_distill.data.summary import DatasetSummary, inspect
from titan_distill.data.tables import listed
from titan_distill.fault_tolerance.outputs import probe_folder
from titan_distill.fault_tolerance.run_lock import RunLock
from titan_distill.models.base import EncoderFolders, FootageEncoder, model_family
from titan_distill.parallelisms.mesh import named_device

logger = logging.getLogger(__name__)

OUTPUT_NAME = "clips.parquet"


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(EncoderFolders):
    """Options of `titan-distill data preprocess`."""

    folder: tyro.conf.Positional[Path]
    """Folder of videos, subfolders included."""
    captions: Path
    """Captions: a table (.csv, .tsv, .jsonl, .json) of names below the folder and captions, or the folder itself, with
    a .txt beside each video or a metadata.csv, metadata.jsonl or videos2caption.json."""
    out: Path
    """Folder for the parquet file; data.path of the training job."""
    family: str = RecipeConfig.family
    """Model family whose encoders make the data; recipe.family of the training job."""
    height: int = 96
    """Height of the clips in pixels, a multiple of twice the VAE's compression; videos are scaled to cover height ×
    width and cropped."""
    width: int = 96
    """Width of the clips in pixels, likewise."""
    num_frames: int = 17
    """Frames per clip, 4 n + 1 for a VAE that compresses time by 4."""
    fps: float | None = 8.0
    """Frames per second after resampling (a rate above the video's repeats frames); None uses every frame."""
    stride: int | None = None
    """Frames between the starts of two clips of a video. Default: num_frames, so no overlap."""
    clips_per_video: int | None = None
    """Clips per video, the first ones. Default: all."""
    max_text_tokens: int = 64
    """Longest caption in tokens; longer ones are cut, with a warning. Wan's own limit is 512."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Dtype of the stored latents and text embeddings; both are computed in float32."""
    device: str | None = None
    """Device of the encoders, such as cpu or cuda:1. Default: the GPU, or the CPU where there is none."""


def preprocess(config: PreprocessConfig) -> DatasetSummary:
    """Encode a folder of footage into `out/clips.parquet` and return the file's summary.

    Raises:
        ValueError: a missing folder, a video without caption or caption without video, sizes that the encoders can't
            take, a video that is damaged or too short, output that already exists, cannot be written, or is in use.
    """
    output = config.out / OUTPUT_NAME
    if output.exists():
        raise ValueError(f"{output} exists; choose another folder for --out")
    with of_key("--captions", config.captions):
        captions = read_captions(config.captions, config.folder)
    with of_key("FOLDER", config.folder):
        videos = find_videos(config.folder, captions, config.captions)
    if config.image_encoder and not config.images:
        raise ValueError(f"--image-encoder {config.image_encoder} has no effect without --images; add it")
    for name in ("fps", "stride", "clips_per_video"):
        value = getattr(config, name)
        if value is not None and not value > 0:  # nan is neither
            raise ValueError(f"--{name.replace('_', '-')} {value:g} is not positive: leave it out for the default")
    if config.fps is not None and config.fps > MAX_FPS:
        raise ValueError(f"--fps {config.fps:g} repeats every frame without end; choose at most {MAX_FPS}")
    if config.max_text_tokens < 1:
        raise ValueError(f"--max-text-tokens {config.max_text_tokens} leaves no text; choose 1 or more")
    device = named_device(config.device)
    probe_folder(config.out, "--out")
    with RunLock(config.out):
        encoder = model_family(config.family).footage_encoder(config, device)
        encoder.check_size(config.num_frames, config.height, config.width)
        size = (config.num_frames, config.height, config.width)
        manifest = DataManifest(latents="normalised", sizes=(size,), fps=config.fps)
        write_rows(output, _rows(config, videos, captions, encoder))
        write_manifest(config.out, manifest.with_encoders(encoder.digests()))
    return inspect(output)


def read_captions(path: Path, folder: Path) -> dict[str, str]:
    """Captions by name below `folder` (`plain_name`), from a table or a folder; raises `ValueError` with the line that
    is wrong."""
    if not path.exists():
        raise ValueError("there is no such captions file; correct the path")
    captions: dict[str, str] = {}
    for where, video, caption in tables.read_captions(path):
        name = _below(folder, video)
        if name in captions:
            raise ValueError(f"{where}: {name} has a second caption here: keep only one")
        captions[name] = caption
    return captions


def _below(folder: Path, name: str) -> str:
    path = Path(name)
    above = next((base for base in (folder.absolute(), folder.resolve()) if path.is_relative_to(base)), None)
    return plain_name(path if above is None else path.relative_to(above))


def find_videos(folder: Path, captions: Iterable[str], captions_file: Path) -> dict[str, Path]:
    """Videos below `folder` by relative name, sorted; raises `ValueError` unless they match `captions` one to one."""
    if not folder.is_dir():
        raise ValueError("there is no such folder; name a folder of videos")
    videos = {plain_name(path.relative_to(folder)): path for path in files_below(folder, SUFFIXES)}
    without_video = sorted(set(captions) - set(videos))
    if without_video:
        raise ValueError(f"{captions_file} names {listed(without_video)}: no such video in {folder}")
    without_caption = sorted(set(videos) - set(captions))
    if without_caption:
        raise ValueError(
            f"{folder}: {captions_file} has no caption for {listed(without_caption)}; add them, or remove the files"
        )
    if not videos:
        raise ValueError(f"no video in {folder}: expected files ending in {', '.join(SUFFIXES)}")
    return videos


def _rows(
    config: PreprocessConfig, videos: dict[str, Path], captions: dict[str, str], encoder: FootageEncoder
) -> Iterator[LatentRow]:
    dtype = DTYPES[config.dtype]
    size = VideoSize(config.num_frames, config.height, config.width, config.fps)
    for name, path in tqdm(videos.items(), unit="video", disable=None):
        embedding = encoder.embed_prompt(captions[name], config.max_text_tokens).to(dtype)
        clips = read_clips(path, size, config.stride)
        for index, clip in enumerate(itertools.islice(clips, config.clips_per_video)):
            frames = clip.pixels.permute(0, 2, 3, 1)
            pictures = encoder.encode_pictures(frames[:1], config.num_frames)
            yield LatentRow(
                id=f"{name}-{index:04d}",
                caption=captions[name],
                text_embedding=embedding,
                vae_latent=encoder.encode_video(frames[None])[0].to("cpu", dtype),
                extra={name: tensor[0].to("cpu", dtype) for name, tensor in pictures.items()},
                file_name=name,
                width=config.width,
                height=config.height,
                num_frames=config.num_frames,
                duration_sec=clip.duration_seconds,
                fps=config.num_frames / clip.duration_seconds,
            )
