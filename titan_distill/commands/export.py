"""`titan-distill checkpoint export`: a role of a training checkpoint as a folder that diffusers loads.

Weights are read one tensor at a time and handed to the family's writer: no process group, no model, and no memory
beyond what the writer keeps. The other parts of the pipeline (VAE, text encoder, tokenizer, scheduler) are copied
unchanged, except for links that lead out of it: what somebody sent must not fetch files of the reader's into a folder
that is sent on. The folder appears complete or not at all.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from titan_distill.checkpoint.diffusers_folder import PIPELINE_INDEX, TRANSFORMER, TRANSFORMER_2, read_json
from titan_distill.checkpoint.discovery import resolve
from titan_distill.checkpoint.initial_weights import trained_role
from titan_distill.checkpoint.manifest import Manifest, read_manifest
from titan_distill.checkpoint.tools.contents import role_tensors
from titan_distill.config.dtypes import DTYPES
from titan_distill.config.loading import import_family
from titan_distill.config.paths import of_key, seen_from
from titan_distill.fault_tolerance.files import atomic, is_bare
from titan_distill.fault_tolerance.outputs import probe_folder
from titan_distill.models.base import model_family


def export(
    checkpoint: Positional[Path],
    out: Path,
    role: str = "student",
    weights: Literal["ema", "raw", "auto"] = "auto",
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored",
    pipeline: Path | None = None,
    trust_imports: tuple[str, ...] = (),
) -> None:
    """Write a role of a checkpoint as a diffusers folder that WanPipeline.from_pretrained loads.

    Args:
        checkpoint: Folder of a step, or of a run, which means its latest.
        out: Folder to write; must not exist.
        role: Role to export.
        weights: Averaged or raw weights; auto takes the average where there is one.
        dtype: Dtype of the written weights; stored keeps that of the checkpoint.
        pipeline: Diffusers folder whose VAE, text encoder, tokenizer and scheduler are copied beside the transformer.
            Default: the run's pipeline_config.path.
        trust_imports: Modules of the run's job.imports to import although they are not part of titan_distill. Importing
            a module runs its code. Default: none.
    """
    with of_key("CHECKPOINT", checkpoint):
        checkpoint = resolve(checkpoint)
    manifest = read_manifest(checkpoint)
    trained = trained_role(checkpoint, manifest, role)
    use_ema = trained.has_ema if weights == "auto" else weights == "ema"
    if out.exists():
        raise ValueError(f"{out} exists already; export to another folder")
    probe_folder(out, "--out")
    import_family(checkpoint.parent.parent / "config.toml", manifest.family, trust_imports)
    family, config = model_family(manifest.family), manifest.pipeline_config
    pipeline = pipeline or (Path(config["path"]) if config.get("path") else None)
    if pipeline is not None and not (pipeline / PIPELINE_INDEX).is_file():
        raise ValueError(
            f"{pipeline}{seen_from(pipeline)} is not a diffusers pipeline: it has no {PIPELINE_INDEX}; "
            "name a folder that has one"
        )
    index = {} if pipeline is None else _read_index(pipeline)
    tensors = {name: role_tensors(checkpoint, role, use_ema=use_ema, module=name) for name in trained.modules}
    left_out: list[str] = []
    with atomic(out) as temporary:
        temporary.mkdir(parents=True)
        for name, of_module in tensors.items():
            family.write_weights(of_module, trained.architecture, temporary / name, DTYPES.get(dtype))
        if pipeline is not None:
            for name in sorted(index.keys() - {TRANSFORMER, TRANSFORMER_2}):
                if (pipeline / name).is_dir() or (pipeline / name).is_symlink():
                    left_out += _copy(pipeline / name, temporary / name, _own_folder(pipeline))
            index = family.pipeline_index(index, trained.modules, config)
            (temporary / PIPELINE_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(_model_card(checkpoint, manifest, role, use_ema=use_ema), encoding="utf-8")
    print(f"{role} of {checkpoint} ({'EMA' if use_ema else 'raw'}, {dtype}) is in {out}")
    if left_out:
        print(f"left out, because these are no files in {pipeline}, but links or the like: {', '.join(left_out)}")


def _read_index(pipeline: Path) -> dict[str, Any]:
    """Returns a pipeline's index. Raises ValueError for one that leads out of the folder."""
    path = pipeline / PIPELINE_INDEX
    if not path.resolve().is_relative_to(_own_folder(pipeline)):
        raise ValueError(f"{path} is a link to a file outside of the pipeline; put a copy of that file in its place")
    index = read_json(path)
    for name in index:
        if not is_bare(name):
            raise ValueError(f"{path} names {name!r}, which is outside of the pipeline; do not trust this folder")
    return index


def _own_folder(pipeline: Path) -> Path:
    """Returns the folder that a pipeline's links may lead to: its own or, for a snapshot in a Hugging Face cache, which
    is made of links to blobs, that of the repository in the cache."""
    folder = pipeline.resolve()
    repository = folder.parent.parent
    return repository if folder.parent.name == "snapshots" and (repository / "blobs").is_dir() else folder


def _copy(source: Path, target: Path, root: Path) -> list[str]:
    """Copies a folder, with the umask's modes. Returns the entries that are not copied: links to folders, to files
    outside of `root` and to nothing, and what is neither file nor folder."""
    if source.is_file() and source.resolve().is_relative_to(root):
        shutil.copyfile(source, target)
        return []
    if source.is_symlink() or not source.is_dir():
        return [str(source)]
    target.mkdir()
    return [link for entry in sorted(source.iterdir()) for link in _copy(entry, target / entry.name, root)]


def _model_card(checkpoint: Path, manifest: Manifest, role: str, *, use_ema: bool) -> str:
    run_folder = checkpoint.parent.parent
    config = run_folder / "config.toml"
    base = manifest.trained[role].base
    if manifest.weights_only:
        config_text = "# none: these weights were imported"
    else:
        config_text = config.read_text(encoding="utf-8") if config.is_file() else "# not found beside the checkpoints"
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
