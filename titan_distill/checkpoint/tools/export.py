"""Exports a role of a training checkpoint as a folder that diffusers loads.

Weights are read one tensor at a time (`contents.py`) and handed to the family's writer: no process group, no model, and
no memory beyond what the writer keeps. The other parts of the pipeline (VAE, text encoder, tokenizer, scheduler) are
copied unchanged. The folder appears complete or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_distill.checkpoint.diffusers_folder import (
    PIPELINE_INDEX,
    TRANSFORMER,
    TRANSFORMER_2,
    open_folder,
    read_json,
)
from titan_distill.checkpoint.discovery import resolve
from titan_distill.checkpoint.initial_weights import (
    is_reference,
    resolve_reference,
    stored_names,
    trained_role,
    weights_digest,
)
from titan_distill.checkpoint.manifest import AdaptedBase, Manifest, read_manifest
from titan_distill.checkpoint.tools.contents import open_checkpoint
from titan_distill.config.dtypes import DTYPES
from titan_distill.fault_tolerance.files import atomic
from titan_distill.parallelisms.lora import merge

WeightWriter = Callable[[Iterable[tuple[str, Tensor]], dict[str, Any], Path, torch.dtype | None], None]
"""Writes (name, tensor) pairs and their architecture into a folder: `ModelFamily.write_weights`."""
IndexCompleter = Callable[[dict[str, Any], Sequence[str], Mapping[str, Any]], dict[str, Any]]
"""Returns the index of an exported pipeline: `ModelFamily.pipeline_index`."""


def export(
    checkpoint: Path,
    role: str,
    out: Path,
    *,
    write_weights: WeightWriter,
    pipeline_index: IndexCompleter,
    use_ema: bool,
    dtype: str | None = None,
    pipeline_folder: Path | None = None,
) -> Path:
    """Writes `out/transformer`, a model card, and the parts of `pipeline_folder`. Returns `out`.

    `checkpoint` may end in `latest`. `dtype` is one of DTYPES, None keeps the stored precision. Raises ValueError for a
    missing or damaged checkpoint, an unknown role, an EMA that was never kept, and an `out` that exists.
    """
    checkpoint = resolve(checkpoint)
    if out.exists():
        raise ValueError(f"{out} exists already; remove it, or export to another folder")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; it must be one of {', '.join(DTYPES)}")
    index = _read_index(pipeline_folder) if pipeline_folder is not None else {}
    manifest = read_manifest(checkpoint)
    trained = trained_role(checkpoint, manifest, role)
    tensors = {name: role_tensors(checkpoint, role, use_ema=use_ema, module=name) for name in trained.modules}
    with atomic(out) as temporary:
        temporary.mkdir(parents=True)
        for name, of_module in tensors.items():
            write_weights(of_module, trained.architecture, temporary / name, DTYPES[dtype] if dtype else None)
        if pipeline_folder is not None:
            for name in index.keys() - {TRANSFORMER, TRANSFORMER_2}:
                if (pipeline_folder / name).is_dir():
                    shutil.copytree(pipeline_folder / name, temporary / name)
            index = pipeline_index(index, trained.modules, manifest.pipeline_config)
            (temporary / PIPELINE_INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (temporary / "README.md").write_text(_model_card(checkpoint, manifest, role, use_ema=use_ema))
    return out


def role_tensors(
    checkpoint: Path, role: str, *, use_ema: bool, module: str = TRANSFORMER
) -> Iterator[tuple[str, Tensor]]:
    """Returns the weights of one of a role's modules as full CPU tensors, one at a time, sorted by name.

    A LoRA adapter is merged into its base, in fp32. Verifies the whole checkpoint first. Raises as `export` does,
    before the first tensor.
    """
    checkpoint = resolve(checkpoint)
    trained = trained_role(checkpoint, read_manifest(checkpoint), role, use_ema=use_ema)
    contents = open_checkpoint(checkpoint)
    names = stored_names(contents.metadata, trained, role, module, use_ema=use_ema)
    tensors = ((name, contents.read(stored)) for name, stored in names.items())
    if (base := trained.base) is None:
        return tensors
    lora = dict(tensors)
    return ((name, merge(name, weight, lora, base.scale)) for name, weight in _base_tensors(base, module))


def _base_tensors(base: AdaptedBase, module: str) -> Iterator[tuple[str, Tensor]]:
    """Returns all tensors of the base, one at a time, sorted by name.

    Raises ValueError when the base is gone, or has changed since.
    """
    source = None if is_reference(base.path) else open_folder(Path(base.path), module)
    if weights_digest(base.path) != base.digest:
        raise ValueError(
            f"the weights in {base.path} are not those that the LoRA adapter was trained on; put the original ones back"
        )
    if source is not None:
        return ((name, source.read(name)) for name in sorted(source.shapes))
    found = resolve_reference(base.path)
    return role_tensors(found.checkpoint, found.role, use_ema=found.use_ema, module=module)


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / PIPELINE_INDEX).is_file():
        raise ValueError(
            f"{folder} is not a diffusers pipeline: it has no {PIPELINE_INDEX}; name a folder that has one"
        )
    return read_json(folder / PIPELINE_INDEX)


def _model_card(checkpoint: Path, manifest: Manifest, role: str, *, use_ema: bool) -> str:
    run_folder = checkpoint.parent.parent
    config = run_folder / "config.toml"
    base = manifest.trained[role].base
    if manifest.weights_only:
        config_text = "# none: these weights were imported"
    else:
        config_text = config.read_text() if config.is_file() else "# not found beside the checkpoints"
    return f"""---
library_name: diffusers
tags: [titan_distill, {manifest.family}]
---

# {checkpoint.name if manifest.weights_only else run_folder.name}: {role}

Exported by titan_distill from `{checkpoint.name}`. Where the folder has a `{PIPELINE_INDEX}`, diffusers'
`DiffusionPipeline.from_pretrained` loads it; otherwise `{TRANSFORMER}/` belongs into a pipeline of the same family.

| | |
| --- | --- |
| role | {role} |
| weights | {"exponential moving average" if use_ema else "raw, as trained"} |
| step | {manifest.step} |
| LoRA adapter | {"none" if base is None else f"merged into {base.path}"} |
| updates of this role | {manifest.trained[role].num_updates} |
| samples seen | {manifest.samples_seen} |
| seed | {manifest.seed} |

## Configuration of the run

``toml
{config_text.rstrip()}
``
"""
