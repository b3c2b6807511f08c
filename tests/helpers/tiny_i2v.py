"""A whole Wan 2.1 image-to-video pipeline of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_media import write_pipeline
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.state_dict import save_folder
from titan_distill.models.wan.transformer import WanTransformer

CONFIG = WanConfig(
    num_layers=1, num_attention_heads=2, attention_head_dim=12, ffn_dim=16, text_dim=16, freq_dim=16, in_channels=36,
    image_dim=24, added_kv_proj_dim=24,
)  # fmt: skip


def save_random(config: WanConfig, folder: Path, seed: int) -> None:
    model = WanTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    values = {name: 0.2 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    save_folder(values, config, folder)


def write_i2v_pipeline(folder: Path) -> Path:
    """vae/, text_encoder/, tokenizer/, image_encoder/ (CLIP), image_processor/ and transformer/, in `folder`."""
    write_pipeline(folder)
    torch.manual_seed(1)
    clip = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModel(clip).save_pretrained(folder / "image_encoder")
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    CLIPImageProcessor(**sizes).save_pretrained(folder / "image_processor")
    save_random(CONFIG, folder / "transformer", 2)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanImageToVideoPipeline"}))
    return folder
