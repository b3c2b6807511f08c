"""The VAE of a run and what follows from it: shapes, token grids and possible video sizes, for both published VAEs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import TINY_WAN
from tiny_ti2v import write_pipeline

from titan_distill.commands.plan import Planner
from titan_distill.config.config import Config
from titan_distill.config.degrees import resolve_layout
from titan_distill.config.loading import load_config
from titan_distill.models.base import EncoderMemory, model_family
from titan_distill.models.wan.encoder_memory import PUBLISHED, decoding_bytes
from titan_distill.models.wan.latents import LatentSpace, find_latent_space
from titan_distill.models.wan.vae import decode_latents, encode_video, load_vae, vae_dtype
from titan_distill.planner.hardware import GPUS
from titan_distill.planner.plan import fake_world

WAN21, WAN22 = LatentSpace(16, 4, 8), LatentSpace(48, 4, 16)


def ti2v_config(*overrides: str) -> Config:
    return load_config(
        [
            *("--job.name", "x", "--recipe.method", "finetune", "--data.path", "x"),
            *("--roles.student.flavor", "5B", "--roles.student.trainable", "true"),
            *("--training.steps", "1", "--training.global_batch_size", "1", "--training.local_batch_size", "1"),
            *("--pipeline_config.num_frames", "121", "--pipeline_config.height", "704"),
            *("--pipeline_config.width", "1280", *overrides),
        ]
    )


def check(config: Config) -> None:
    model_family("wan")(config).check_layouts(resolve_layout(config, 1).roles)


def test_published_sizes_give_the_published_grids() -> None:
    """The token counts of docs/algorithms.md, "Sizes of Wan"."""
    assert WAN21.token_grid(81, 480, 832) == (21, 30, 52)
    assert WAN21.token_grid(81, 720, 1280) == (21, 45, 80)
    assert WAN22.shape(121, 704, 1280) == (48, 31, 44, 80)
    assert WAN22.token_grid(121, 704, 1280) == (31, 22, 40)


def test_a_flavor_brings_its_vae_where_no_file_can_be_read() -> None:
    family = model_family("wan")(ti2v_config("--pipeline_config.path", "absent"))
    assert family.token_grid() == (31, 22, 40)
    tiny = load_config(["--job.config_file", str(Path(TINY_WAN).parents[2] / "train_configs/tiny_wan_finetune.toml")])
    assert model_family("wan")(tiny).token_grid() == (5, 6, 6)


def test_the_config_of_a_vae_is_believed(tmp_path: Path) -> None:
    assert find_latent_space(str(TINY_WAN), lambda: 48) == WAN21
    assert find_latent_space(str(write_pipeline(tmp_path)), lambda: 16) == WAN22


def test_the_vae_of_wan_22_makes_such_latents(tmp_path: Path) -> None:
    vae = load_vae(write_pipeline(tmp_path), "cpu")
    video = torch.randint(0, 256, (1, 9, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = encode_video(vae, video)
    assert tuple(latents.shape[1:]) == WAN22.shape(9, 64, 96)
    assert decode_latents(vae, latents).shape == video.shape
    # Causal: the first latent frame is that of the first picture alone, so an image is encoded as a video of one frame.
    assert torch.equal(encode_video(vae, video[:, :1]), latents[:, :, :1])


def test_encoding_in_bf16_is_encoding(tmp_path: Path) -> None:
    """A GPU with bf16 encodes and decodes in it; a CPU keeps fp32."""
    folder = write_pipeline(tmp_path)
    video = torch.randint(0, 256, (1, 9, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents, rounded = (
        encode_video(load_vae(folder, "cpu", dtype), video) for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - latents).norm() < 0.05 * latents.norm()
    assert vae_dtype(torch.device("cpu"), torch.bfloat16) == torch.float32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--pipeline_config.height", "720"), r"height = 720 must be a multiple of 32 .*; set it to 704 or 736"),
        (("--pipeline_config.width", "16"), r"width = 16 must be a multiple of 32 .*; set it to 32"),
        (("--pipeline_config.path", str(TINY_WAN)), r"of 48 channels, but the VAE of the run makes 16"),
    ],
)
def test_what_does_not_fit_the_vae_is_refused(overrides: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(ti2v_config(*overrides))


def test_odd_vaes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="20 channels, which no published Wan VAE makes"):
        find_latent_space("", lambda: 20)
    with pytest.raises(ValueError, match=r"num_frames = 9 must be 6 n \+ 1 for this VAE; set it to 7 or 13"):
        LatentSpace(16, 6, 8).check_size(9, 480, 832)
    config = tmp_path / "vae" / "config.json"
    config.parent.mkdir()
    for damaged in ("", "[]", json.dumps({"z_dim": "many"}), json.dumps({"z_dim": None})):
        config.write_text(damaged)
        with pytest.raises(ValueError, match="is no configuration of a VAE"):
            find_latent_space(str(tmp_path), lambda: 16)


def test_the_plan_of_5b_counts_its_tokens_and_its_vae() -> None:
    with fake_world(1) as world:
        config = ti2v_config()
        plan = Planner(world, GPUS["H200"]).plan(config)
        assert plan.grid == (31, 22, 40)
        assert plan.encoders == EncoderMemory()
        config = replace(config, pipeline_config=replace(config.pipeline_config, path="absent"))
        priced = Planner(world, GPUS["H200"]).plan(config)
        as_videos = replace(config, data=replace(config.data, path="videos.csv"))
        encoding = Planner(world, GPUS["H200"]).plan(as_videos)
    vae, text, decoding = 4 * 704_688_668, 4 * 5_680_910_336, decoding_bytes(PUBLISHED[48], (31, 44, 80), 4)
    assert priced.encoders == EncoderMemory(vae, text, decoding)
    assert encoding.encoders == EncoderMemory(vae + text, 0.0, decoding), "captions of videos are encoded all the time"
    assert encoding.peak - priced.peak == text
