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

from titan_distill.checkpoint.diffusers_folder import TRANSFORMER, TRANSFORMER_2, open_folder, read_json
from titan_distill.checkpoint.discovery import resolve
from titan_distill.checkpoint.initial_weights import is_reference, resolve_reference, weights_digest
from titan_distill.checkpoint.manifest import AdaptedBase, Manifest, read_manifest
from titan_distill.checkpoint.role_weights import check_weights, stored_names, trained_role
from titan_distill.checkpoint.tools.contents import open_checkpoint
from titan_distill.parallelisms.lora import merge

__all__ = ["export", "role_tensors", "trained_role"]

WeightWriter = Callable[[Iterable[tuple[str, Tensor]], dict[str, Any], Path, torch.dtype | None], None]
"""Writes (name, tensor) pairs and the architecture into a folder, in the family's format; no dtype means as they
are."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PIPELINE_INDEX = "model_index.json"
BOUNDARY = "boundary_ratio"
"""The key in it that says from which share of the timesteps on the first of two experts is used."""


EXPAND_TIMESTEPS = "expand_timesteps"
"""The key in it that says that each frame has a time of its own, as a given first frame needs."""


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
    modules = trained_role(checkpoint, manifest, role).modules
    tensors = {name: role_tensors(checkpoint, role, use_ema=use_ema, module=name) for name in modules}
    boundary = manifest.pipeline_config.get(BOUNDARY) if TRANSFORMER_2 in modules else None

    temporary = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        for part in parts:
            _copy(part, temporary / part.name)
        for name, of_module in tensors.items():
            write_weights(of_module, manifest.trained[role].architecture, temporary / name, storage_dtype)
        _name_experts(temporary / PIPELINE_INDEX, has_two=TRANSFORMER_2 in modules, boundary=boundary)
        if manifest.pipeline_config.get("image_probability"):
            _name_first_frames(temporary / PIPELINE_INDEX)
        (temporary / "README.md").write_text(_model_card(checkpoint, manifest, role, use_ema=use_ema))
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out


def role_tensors(
    checkpoint: Path, role: str, *, use_ema: bool, module: str = TRANSFORMER
) -> Iterator[tuple[str, Tensor]]:
    """The weights of one of a role's modules as full CPU tensors, one at a time, sorted by name; adapters are merged
    into their base, in fp32.

    Verifies the whole checkpoint first. Raises as ``export`` does, before the first tensor.
    """
    checkpoint = resolve(checkpoint)
    check_weights(checkpoint, read_manifest(checkpoint), role, use_ema=use_ema)
    contents = open_checkpoint(checkpoint)
    trained = contents.manifest.trained[role]
    is_alone = len(trained.modules) == 1
    names = stored_names(contents.metadata, role, use_ema=use_ema, module=module, is_alone=is_alone)
    tensors = ((name, contents.read(stored)) for name, stored in names.items())
    if (base := trained.base) is None:
        return tensors
    adapters = dict(tensors)
    return ((name, merge(name, weight, adapters, base.scale)) for name, weight in _base_tensors(base, module))


def _base_tensors(base: AdaptedBase, module: str) -> Iterator[tuple[str, Tensor]]:
    """Everything that the base holds, one tensor at a time, sorted by name.

    Raises ValueError when it is not there any more, or not what it was.
    """
    if not is_reference(base.path):
        source = open_folder(Path(base.path), module)
    if weights_digest(base.path) != base.digest:
        raise ValueError(
            f"the weights in {base.path} are not those that the adapters were trained on; put the original ones back"
        )
    if is_reference(base.path):
        found = resolve_reference(base.path)
        stored = module if module in found.trained.modules else TRANSFORMER
        return role_tensors(found.checkpoint, found.role, use_ema=found.use_ema, module=stored)
    return ((name, source.read(name)) for name in sorted(source.kinds))


def _pipeline_parts(folder: Path) -> list[Path]:
    """The index and the folders that it names, transformers excepted; other files in the folder stay behind."""
    index = folder / PIPELINE_INDEX
    if not index.is_file():
        raise ValueError(
            f"{folder} is not a diffusers pipeline: it has no {PIPELINE_INDEX}; name a folder that has one"
        )
    networks = (TRANSFORMER, TRANSFORMER_2)
    names = [name for name in json.loads(index.read_text()) if name not in networks and (folder / name).is_dir()]
    return [index, *(folder / name for name in names)]


def _name_experts(path: Path, *, has_two: bool, boundary: float | None) -> None:
    """Lets a copied index say how many transformers there are: its pipeline may have had another number.

    Raises ValueError when nobody knows where the second expert takes over.
    """
    if not path.is_file():
        return
    index = read_json(path)
    if has_two:
        boundary = index.get(BOUNDARY) if boundary is None else boundary
        if boundary is None:
            raise ValueError(f"neither the run nor its pipeline says {BOUNDARY}; name a --pipeline with two experts")
        index |= {TRANSFORMER_2: index[TRANSFORMER], BOUNDARY: boundary}
    elif index.get(BOUNDARY) is not None or index.get(TRANSFORMER_2, [None])[0] is not None:
        index |= {TRANSFORMER_2: [None, None], BOUNDARY: None}
    else:
        return
    path.write_text(json.dumps(index, indent=2) + "\n")


def _name_first_frames(path: Path) -> None:
    """Lets a copied index say that the exported model starts from images, which its pipeline's own may not have."""
    if path.is_file():
        path.write_text(json.dumps(read_json(path) | {EXPAND_TIMESTEPS: True}, indent=2) + "\n")


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
