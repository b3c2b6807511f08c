"""The planner's memory of decoding, against the memory that a decode allocates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from runs import TINY_WAN, allocated_peak

from titan_distill.models.wan.encoder_memory import PUBLISHED, Decoder, decoding_bytes
from titan_distill.models.wan.vae import decode_latents, num_decoded_at_once, vae_dtype

WAN22: dict[str, Any] = {
    "base_dim": 8, "decoder_base_dim": 16, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip
NARROW = {"base_dim": 16, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1}
SMALL = {"2.1": {"base_dim": 16}, "2.2": WAN22, "narrow 2.1": NARROW}
LATENTS = (3, 16, 16)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("2.1", torch.float32), ("2.1", torch.bfloat16), ("2.2", torch.bfloat16), ("narrow 2.1", torch.float32)],
)
def test_peak_of_decoding_is_what_was_planned(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Two clips at once, because torch computes a single small one by another algorithm on a CPU."""
    vae = AutoencoderKLWan(**SMALL[name]).to(dtype).eval()
    vae.save_config(tmp_path)
    latents = torch.zeros(2, vae.config.z_dim, *LATENTS)
    measured = allocated_peak(lambda: decode_latents(vae, latents))
    planned = 2 * decoding_bytes(Decoder.read(tmp_path / "config.json"), LATENTS, dtype.itemsize)
    assert 0.98 * planned <= measured <= 1.04 * planned


def test_longer_videos_take_more_for_their_pictures_only() -> None:
    short, long = (decoding_bytes(PUBLISHED[16], (frames, 60, 104), 2) for frames in (21, 31))
    assert long - short == 2 * 3 * 40 * 480 * 832


def test_defaults_are_those_of_diffusers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    assert Decoder.read(tmp_path / "config.json") == PUBLISHED[16]
    assert Decoder.read(TINY_WAN / "vae" / "config.json").num_res_blocks == 1


def test_a_gpu_decodes_one_clip_at_once() -> None:
    """Four on a CPU; test_wan_latents.py tests the dtype."""
    assert [num_decoded_at_once(torch.device(name)) for name in ("cuda", "cpu")] == [1, 4]
    assert vae_dtype(torch.device("cpu"), torch.bfloat16) == torch.float32
