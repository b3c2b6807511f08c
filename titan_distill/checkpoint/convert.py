"""From a training checkpoint to a folder that diffusers loads.

Weights are read one tensor at a time (``contents.py``) and handed to the family's writer: no process group, no model,
and no memory beyond what the writer keeps. The other parts of the pipeline (VAE,
text encoder, tokenizer, scheduler) are copied as they are. The folder appears complete or not at all.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_distill.checkpoint.contents import open_checkpoint
from titan_distill.checkpoint.diffusers_folder import TRANSFORMER, open_folder
from titan_distill.checkpoint.discovery import resolve
from titan_distill.checkpoint.initial_weights import is_reference, resolve_reference, weights_digest
from titan_distill.checkpoint.manifest import AdaptedBase, Manifest, read_manifest
from titan_distill.checkpoint.role_weights import check_weights, stored_names, trained_role
from titan_distill.parallelisms.lora import merge

__all__ = ["export", "role_tensors", "trained_role"]

WeightWriter = Callable[[Iterable[tuple[str, Tensor]], dict[str, Any], Path, torch.dtype | None], None]
"""Writes (name, tensor) pairs and the architecture into a folder, in the family's format; no dtype means as they
are."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PIPELINE_INDEX = "model_index.json"


def export(
    checkpoint: Path,
    role: str,
    out: Path,
    *,
    write_weights: WeightWriter,
    use_ema: bool,
    dtype: str | None = None,
    pipeline_folder: Path | None = None,
) -> Path:
    """Writes ``out/transformer``, a model card, and the parts of ``pipeline_folder``. Returns ``out``.

    ``checkpoint`` may end in ``latest``. ``dtype`` is one of DTYPES, None keeps the stored precision. Raises
    ValueError for a missing or damaged checkpoint, an unknown role, an EMA that was never kept, and an ``out`` that
    exists.
    """
    checkpoint = resolve(checkpoint)
    if out.exists():
        raise ValueError(f"{out} exists already; remove it, or export to another folder")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; it must be one of {', '.join(DTYPES)}")
    storage_dtype = DTYPES[dtype] if dtype is not None else None
    parts = _pipeline_parts(pipeline_folder) if pipeline_folder is not None else []
    manifest = read_manifest(checkpoint)
    tensors = role_tensors(checkpoint, role, use_ema=use_ema)

    temporary = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        for part in parts:
            _copy(part, temporary / part.name)
        write_weights(tensors, manifest.trained[role].architecture, temporary / TRANSFORMER, storage_dtype)
        (temporary / "README.md").write_text(_model_card(checkpoint, manifest, role, use_ema=use_ema))
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out


def role_tensors(checkpoint: Path, role: str, *, use_ema: bool) -> Iterator[tuple[str, Tensor]]:
    """The weights of a role's transformer as full CPU tensors, one at a time, sorted by name; adapters are merged into
    their base, in fp32.

    Verifies the whole checkpoint first. Raises as ``export`` does, before the first tensor.
    """
    checkpoint = resolve(checkpoint)
    check_weights(checkpoint, read_manifest(checkpoint), role, use_ema=use_ema)
    contents = open_checkpoint(checkpoint)
    names = stored_names(contents.metadata, role, use_ema=use_ema)
    tensors = ((name, contents.read(stored)) for name, stored in names.items())
    base = contents.manifest.trained[role].base
    if base is None:
        return tensors
    adapters = dict(tensors)
    return ((name, merge(name, weight, adapters, base.scale)) for name, weight in _base_tensors(base))


def _base_tensors(base: AdaptedBase) -> Iterator[tuple[str, Tensor]]:
    """Everything that the base holds, one tensor at a time, sorted by name.

    Raises ValueError when it is not there any more, or not what it was.
    """
    if not is_reference(base.path):
        source = open_folder(Path(base.path))
    if weights_digest(base.path) != base.digest:
        raise ValueError(
            f"the weights in {base.path} are not those that the adapters were trained on; put the original ones back"
        )
    if is_reference(base.path):
        found = resolve_reference(base.path)
        return role_tensors(found.checkpoint, found.role, use_ema=found.use_ema)
    return ((name, source.read(name)) for name in sorted(source.kinds))


def _pipeline_parts(folder: Path) -> list[Path]:
    """The index and the folders that it names, the transformer excepted; other files in the folder stay behind."""
    index = folder / PIPELINE_INDEX
    if not index.is_file():
        raise ValueError(
            f"{folder} is not a diffusers pipeline: it has no {PIPELINE_INDEX}; name a folder that has one"
        )
    names = [name for name in json.loads(index.read_text()) if name != TRANSFORMER and (folder / name).is_dir()]
    return [index, *(folder / name for name in names)]


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


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
| adapters | {"none" if base is None else f"merged into {base.path}"} |
| updates of this role | {manifest.trained[role].num_updates} |
| samples seen | {manifest.samples_seen} |
| seed | {manifest.seed} |

## Configuration of the run

```toml
{config_text.rstrip()}
```
"""
