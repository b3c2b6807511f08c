"""Wan weights in the folder format of diffusers, read and written one tensor at a time.

A folder holds `config.json` and either one `diffusion_pytorch_model.safetensors` or several with an index. Our
parameter names are diffusers', so nothing is renamed. Reading never holds more than one tensor beside the model, and
of that only this rank's part: a 14B role is built on the meta device, sharded, materialised, and then filled from
memory-mapped files.
Writing holds one file's worth. Names and shapes are checked from the file headers before the first value is copied.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_distill.checkpoint.complete import check_dtypes, check_tensors
from titan_distill.checkpoint.diffusers_folder import (
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    DiffusersFolder,
    open_folder,
    read_json,
)
from titan_distill.fault_tolerance.files import with_umask_mode
from titan_distill.models.wan.config import WanConfig
from titan_distill.models.wan.original import refuse_original
from titan_distill.models.wan.transformer import WanTransformer
from titan_distill.parallelisms.lora import without_adapters
from titan_distill.parallelisms.shards import fill, local_region
from titan_distill.parallelisms.tensor import local

WEIGHTS_STEM = "diffusion_pytorch_model"

GATE = "to_gate_compress"
"""In the names of what a sparse model has more than a dense one."""

# Published I2V checkpoints carry a query norm that no Wan code has ever read; diffusers skips it by name, too.
UNUSED_KEY = "norm_added_q"


def read_config(folder: str | Path) -> WanConfig:
    """Read the `config.json` of a diffusers transformer folder.

    Raises:
        ValueError: no such folder or file, invalid JSON, or a config that is not Wan's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"weights folder {folder} does not exist")
    refuse_original(folder)
    return WanConfig.from_diffusers(read_json(folder / CONFIG_NAME))


@torch.no_grad()
def load_weights(model: WanTransformer, folder: str | Path) -> None:
    """Fill `model` with the weights of a diffusers folder, in the model's own dtypes, devices and shards.

    A sparse model takes the weights of a dense one, too: its gates are then zero, which leaves the coarse branch out.

    Args:
        model: materialised, its parameters plain tensors or DTensors.
        folder: the folder of the transformer itself, not of the pipeline.

    Raises:
        ValueError: no such folder or file, a config other than the model's, an index entry that is not a bare file
            name, a damaged file, a key that is missing, superfluous or of another shape, or gates of a sparse model for
            a dense one.
    """
    parameters = without_adapters(dict(model.named_parameters()))
    found, gates = check_weights(model, folder)
    for name in gates:
        local(parameters.pop(name)).zero_()
    for name in (name for name in found.shapes if name in parameters):
        if local(parameters[name]).numel():  # FSDP leaves the last ranks without a part of a small tensor
            fill(parameters[name], found.read_part(name, local_region(parameters[name])))


def check_weights(model: WanTransformer, folder: str | Path) -> tuple[DiffusersFolder, list[str]]:
    """Compares a diffusers folder with `model`, which may be on the meta device, by the headers of its files.

    Returns the open folder, and the names of the gates that a sparse model has and dense weights lack. Raises the
    errors of `load_weights`.
    """
    folder = Path(folder)
    config = read_config(folder)
    _check_same_config(model.config, config, folder)
    found = open_folder(folder)
    needed = {name: tuple(p.shape) for name, p in without_adapters(dict(model.named_parameters())).items()}
    stored = {name: shape for name, shape in found.shapes.items() if UNUSED_KEY not in name}
    gates = []
    if not config.sparse_attention and not any(GATE in name for name in stored):
        gates = [name for name in needed if GATE in name]
    extra = sorted(stored.keys() - needed.keys())
    if extra and all(GATE in name for name in extra):
        raise ValueError(
            f"weights in {folder} have {extra[0]}: they are of a model with sparse attention, whose coarse branch this "
            "dense one lacks; set the role's attention to 'sparse' or choose other weights"
        )
    check_tensors(str(found.source), {name: needed[name] for name in needed.keys() - set(gates)}, stored)
    check_dtypes(found, list(stored))
    return found, gates


def save_folder(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: WanConfig,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write a folder that diffusers' `WanTransformer3DModel.from_pretrained` and `load_weights` read.

    Diffusers knows no sparse attention: of a sparse model it loads everything but the gates, says so, and then attends
    densely without the coarse branch. That is another function than the one that was trained, if a close one; where it
    matters, sample with `titan-distill generate`.

    Weights of an earlier save in the same folder are replaced. A process that dies in between leaves a folder without
    `config.json`, which nothing loads.

    Args:
        tensors: names and whole (not sharded) tensors; a lazy iterable keeps memory at one file's worth.
        config: the transformer's.
        folder: created if missing.
        dtype: storage dtype; None keeps each tensor's.
        max_shard_bytes: a file is closed before it would exceed this; a single larger tensor gets a file of its own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (folder / CONFIG_NAME, *folder.glob(f"{WEIGHTS_STEM}*")):
        stale.unlink(missing_ok=True)
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    shards: list[dict[str, int]] = []
    for shard in _shards(pairs, dtype, max_shard_bytes):
        file = folder / _shard_name(len(shards))  # provisional, because their number is known only at the end
        with with_umask_mode(file):
            save_file(shard, file, metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in shard.items()})
    final_names = [_shard_name(index, len(shards)) for index in range(len(shards))]
    for index, final_name in enumerate(final_names):
        (folder / _shard_name(index)).rename(folder / final_name)
    if len(shards) > 1:
        index_of_shards = {
            "metadata": {"total_size": sum(sum(shard.values()) for shard in shards)},
            "weight_map": {name: final for final, shard in zip(final_names, shards, strict=True) for name in shard},
        }
        text = json.dumps(index_of_shards, indent=2, sort_keys=True) + "\n"
        (folder / INDEX_NAME).write_text(text, encoding="utf-8")
    (folder / CONFIG_NAME).write_text(json.dumps(config.to_diffusers(), indent=2) + "\n", encoding="utf-8")


def _shards(
    pairs: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, max_bytes: float
) -> Iterator[dict[str, Tensor]]:
    """Group tensors, in order, into CPU shards of at most `max_bytes`; at least one shard, even if empty."""
    shard: dict[str, Tensor] = {}
    for name, tensor in pairs:
        assert not isinstance(tensor, DTensor), f"{name} is sharded; pass full_tensor()"
        stored = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
        if shard and sum(other.nbytes for other in shard.values()) + stored.nbytes > max_bytes:
            yield shard
            shard = {}
        shard[name] = stored
    yield shard


def _shard_name(index: int, total: int | None = None) -> str:
    if total == 1:
        return WEIGHTS_NAME
    return f"{WEIGHTS_STEM}-{index + 1:05d}-of-{'unknown' if total is None else f'{total:05d}'}.safetensors"


def _check_same_config(ours: WanConfig, theirs: WanConfig, folder: Path) -> None:
    differing = [
        f"{key} {theirs_value!r} (model: {getattr(ours, key)!r})"
        for key, theirs_value in vars(theirs).items()
        # Whether gates are there is told by the keys, in files of others too; causality and tile by no weight.
        if key not in ("sparse_attention", "causal_attention", "vsa_tile") and theirs_value != getattr(ours, key)
    ]
    if differing:
        raise ValueError(f"weights in {folder} are of another model: {', '.join(differing)}")
