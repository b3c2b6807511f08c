"""Stage `data`: the parquet files that the small Wan is trained on, and the folders' last parts.

A clip is drawn, encoded with the VAE (posterior mean, normalised by the config's statistics) and stored in half
precision with the embedding of its caption. Captions cycle through all training combinations and all templates, so each
is seen equally often; held-out combinations appear in no file but the list of prompts for scoring.

Legend: C latent channels, F latent frames, H and W latent pixels.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from tiny_world.shapes import (
    FRAME_SIZE,
    FRAMES_PER_SECOND,
    NUM_FRAMES,
    ShapesClip,
    captioned,
    draw_clip,
    held_out_attributes,
    train_attributes,
)

from titan_distill.data.parquet import LatentRow, write_rows
from titan_distill.models.wan.text_encoder import TextEncoder
from titan_distill.models.wan.vae import encode_video, load_vae

MAX_TOKENS = 64
PROMPT_REPEATS = 4
CLIPS_A_BATCH = 8
FLOW_SHIFT = 3.0


def write_data(assets: Path, pipeline: Path, local: Path, *, num_shipped: int, num_local: int, seed: int) -> None:
    """Write `assets`/{latents,prompts}.parquet, `assets`/held_out_prompts.txt and `local`/latents.parquet."""
    vae = load_vae(pipeline, "cpu")
    text = TextEncoder(pipeline)
    write_rows(assets / "latents.parquet", _latent_rows(vae, text, num_shipped, seed))
    write_rows(assets / "prompts.parquet", _prompt_rows(text))
    prompts = [f"{clip.caption()}\n" for clip in held_out_attributes()] * PROMPT_REPEATS
    (assets / "held_out_prompts.txt").write_text("".join(prompts), encoding="utf-8")
    write_rows(local / "latents.parquet", _latent_rows(vae, text, num_local, seed + 1))


def write_pipeline_index(pipeline: Path) -> None:
    """Write the scheduler's folder and model_index.json, with which diffusers' `WanPipeline` loads `pipeline`."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
    )
    scheduler.save_pretrained(pipeline / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "ByT5Tokenizer"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (pipeline / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _latent_rows(vae: AutoencoderKLWan, text: TextEncoder, num_rows: int, seed: int) -> Iterator[LatentRow]:
    rng = np.random.default_rng(seed)
    order = _shuffled(rng)
    for first in range(0, num_rows, CLIPS_A_BATCH):
        pairs = list(itertools.islice(order, min(CLIPS_A_BATCH, num_rows - first)))
        frames_BTHW3 = np.stack([draw_clip(clip, rng) for _, clip in pairs])
        latents_BCFHW = encode_video(vae, torch.from_numpy(frames_BTHW3))
        for i, ((caption, _), latent_CFHW) in enumerate(zip(pairs, latents_BCFHW, strict=True), first):
            yield LatentRow(
                id=f"shapes-{seed}-{i:05d}",
                caption=caption,
                text_embedding=text.embed(caption, MAX_TOKENS).half(),
                vae_latent=latent_CFHW.half(),
                file_name=f"drawn-{i:05d}",
                width=FRAME_SIZE,
                height=FRAME_SIZE,
                num_frames=NUM_FRAMES,
                duration_sec=NUM_FRAMES / FRAMES_PER_SECOND,
                fps=FRAMES_PER_SECOND,
            )


def _prompt_rows(text: TextEncoder) -> Iterator[LatentRow]:
    for i, (caption, _) in enumerate(captioned(train_attributes())):
        embedding = text.embed(caption, MAX_TOKENS).half()
        yield LatentRow(id=f"prompt-{i:03d}", caption=caption, text_embedding=embedding, media_type="text")


def _shuffled(rng: np.random.Generator) -> Iterator[tuple[str, ShapesClip]]:
    """All training captions with their clips, in a new order each time, without end."""
    pairs = captioned(train_attributes())
    while True:
        yield from (pairs[i] for i in rng.permutation(len(pairs)))
