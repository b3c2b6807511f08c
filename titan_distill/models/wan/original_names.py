"""Tensor names of Wan's original repositories, which ComfyUI and other programs read, from those of diffusers.

The values are the same; only names differ. The original format is one safetensors file per network.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from titan_distill.fault_tolerance.files import with_umask_mode
from titan_distill.models.wan.state_dict import GATE

EMBEDDER = "condition_embedder."
OF_EMBEDDER = {
    "time_embedder.linear_1": "time_embedding.0",
    "time_embedder.linear_2": "time_embedding.2",
    "time_proj": "time_projection.1",
    "text_embedder.linear_1": "text_embedding.0",
    "text_embedder.linear_2": "text_embedding.2",
    "image_embedder.norm1": "img_emb.proj.0",
    "image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "image_embedder.ff.net.2": "img_emb.proj.3",
    "image_embedder.norm2": "img_emb.proj.4",
}
OF_BLOCK = {
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
OF_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm_added_k": "norm_k_img",
}
OF_HEAD = {"scale_shift_table": "head.modulation", "proj_out": "head.head"}


def original_name(name: str) -> str:
    """Returns the original name of a tensor with diffusers' name `name`."""
    if name.startswith(EMBEDDER):
        return _renamed(name.removeprefix(EMBEDDER), OF_EMBEDDER)
    if not name.startswith("blocks."):
        return _renamed(name, OF_HEAD)
    _, block, rest = name.split(".", 2)
    part, _, inner = rest.partition(".")
    if part in ("attn1", "attn2"):
        rest = f"{part}.{_renamed(inner, OF_ATTENTION)}"
    return f"blocks.{block}.{_renamed(rest, OF_BLOCK)}"


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def save_original(tensors: Iterable[tuple[str, Tensor]], file: Path, dtype: torch.dtype | None) -> None:
    """Writes a network as one file with original names. The whole network is in memory: safetensors writes a file at
    once.

    Args:
        tensors: tensors by diffusers' names.
        file: to write.
        dtype: storage dtype; None keeps each tensor's.

    Raises:
        ValueError: a network with sparse attention.
    """
    found = {}
    for name, tensor in tensors:
        if GATE in name:
            raise ValueError(
                f"--original: the network has sparse attention ({name}), which the original format does not know; "
                "leave it out, and sample with `titan-distill generate`"
            )
        found[original_name(name)] = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
    with with_umask_mode(file):
        save_file(found, file, metadata={"format": "pt"})
