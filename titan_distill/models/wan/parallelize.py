"""How a Wan transformer is laid out and brought to life. The body of ``build_transformer`` is the order of
operations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.state_dict import load_weights
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.parallelisms.activation_checkpoint import apply_activation_checkpointing
from titan_distill.parallelisms.fsdp import apply_fsdp


@dataclass(frozen=True)
class Layout:
    """Everything about a role's network but its architecture and weights."""

    mesh: DeviceMesh | None
    device: torch.device
    trainable: bool
    storage_dtype: torch.dtype
    compute_dtype: torch.dtype
    activation_checkpoint: str
    compile: bool


def build_transformer(architecture: WanConfig, weights: Path | None, layout: Layout, seed: int) -> WanTransformer:
    """Builds one role's transformer. ``weights`` is a diffusers folder, or None for random ones drawn from ``seed``.

    With ``layout.device`` = meta the result has shapes and no storage. Raises ValueError for weights that do not fit.
    """
    with torch.device("meta"):
        model = WanTransformer.from_config(architecture)
    model.to(layout.storage_dtype).requires_grad_(layout.trainable)
    if layout.trainable:
        apply_activation_checkpointing(model.blocks, layout.activation_checkpoint)
    if layout.compile:
        for block in model.blocks:
            block.compile()
    if layout.mesh is not None:
        apply_fsdp(model, model.blocks, layout.mesh, layout.compute_dtype)
    if layout.device.type == "meta":
        return model
    model.to_empty(device=layout.device)
    if weights is not None:
        load_weights(model, weights)
    else:
        model.reset_parameters(seed)
    return model
