"""`titan-distill checkpoint export`: a role of a training checkpoint as a folder that diffusers loads.

Weights are read one tensor at a time and handed to the family's writer: no process group, no model, and no memory
beyond what the writer keeps. The other parts of the pipeline (VAE, text encoder, tokenizer) are copied unchanged,
except for links that lead out of it: what somebody sent must not fetch files of the reader's into a folder that is sent
on. The scheduler gets the noise levels of the role, and `README.md` a program that samples it without this package. The
folder appears complete or not at all.
"""

from __future__ import annotations

import json
import logging
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
from titan_distill.config.loading import import_family, load_config
from titan_distill.config.parsing import ConfigError
from titan_distill.config.paths import of_key, seen_from
from titan_distill.diffusion.requests import SampleRequest
from titan_distill.fault_tolerance.files import atomic, is_bare
from titan_distill.fault_tolerance.outputs import probe_folder
from titan_distill.methods.base import method_class
from titan_distill.models.base import ModelFamily, model_family

SCHEDULER = "scheduler"
"""Folder of the scheduler in a pipeline."""
FENCE = "`" * 3

logger = logging.getLogger(__name__)


def export(
    checkpoint: Positional[Path],
    out: Path,
    role: str = "student",
    weights: Literal["ema", "raw", "auto"] = "auto",
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored",
    pipeline: Path | None = None,
    original: bool = False,
    trust_imports: tuple[str, ...] = (),
) -> None:
    """Write a role of a checkpoint as a diffusers folder that WanPipeline.from_pretrained loads.

    Args:
        checkpoint: Folder of a step, or of a run, which means its latest.
        out: Folder to write; must not exist.
        role: Role to export.
        weights: Averaged or raw weights; auto takes the average where there is one.
        dtype: Dtype of the written weights; stored keeps that of the checkpoint.
        pipeline: Diffusers folder whose VAE, text encoder and tokenizer are copied beside the transformer. Its
            scheduler gets the role's noise levels. Default: the run's pipeline_config.path.
        original: Write one safetensors file per network instead, under the tensor names of the model's original code.
            ComfyUI reads such files. A file's tensors are in memory together.
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
    if original and pipeline is not None:
        raise ValueError(f"--pipeline {pipeline} has no effect with --original; leave one of the two out")
    pipeline = None if original else pipeline or (Path(config["path"]) if config.get("path") else None)
    if pipeline is not None and not (pipeline / PIPELINE_INDEX).is_file():
        raise ValueError(
            f"{pipeline}{seen_from(pipeline)} is not a diffusers pipeline: it has no {PIPELINE_INDEX}; "
            "name a folder that has one"
        )
    index = {} if pipeline is None else _read_index(pipeline)
    sampled = _sampling(checkpoint, manifest, role, trust_imports)
    tensors = {name: role_tensors(checkpoint, role, use_ema=use_ema, module=name) for name in trained.modules}
    left_out: list[str] = []
    with atomic(out) as temporary:
        temporary.mkdir(parents=True)
        for name, of_module in tensors.items():
            if original:
                family.write_original(of_module, temporary / f"{name}.safetensors", DTYPES.get(dtype))
            else:
                family.write_weights(of_module, trained.architecture, temporary / name, DTYPES.get(dtype))
        if pipeline is not None:
            scheduler = {} if isinstance(sampled, str) else sampled[0].exported_scheduler(sampled[1])
            index = family.pipeline_index(index, trained.modules, config)
            index |= {SCHEDULER: ["diffusers", scheduler["_class_name"]]} if scheduler else {}
            for name in sorted(index.keys() - {TRANSFORMER, TRANSFORMER_2} - ({SCHEDULER} if scheduler else set())):
                if (pipeline / name).is_dir() or (pipeline / name).is_symlink():
                    left_out += _copy(pipeline / name, temporary / name, _own_folder(pipeline))
            if scheduler:
                (temporary / SCHEDULER).mkdir()
                _write_json(temporary / SCHEDULER / "scheduler_config.json", scheduler)
            _write_json(temporary / PIPELINE_INDEX, index)
        card = _model_card(checkpoint, manifest, role, None if original else index, sampled, use_ema=use_ema)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    print(f"{role} of {checkpoint} ({'EMA' if use_ema else 'raw'}, {dtype}) is in {out}")
    if left_out:
        print(f"left out, because these are no files in {pipeline}, but links or the like: {', '.join(left_out)}")


def _sampling(
    checkpoint: Path, manifest: Manifest, role: str, trusted: tuple[str, ...]
) -> tuple[ModelFamily, SampleRequest] | str:
    """Returns the run's model family and the sampling of a role, or a sentence why they are not known: the weights can
    be exported without them."""
    config_file = checkpoint.parent.parent / "config.toml"
    if manifest.weights_only:
        return "These weights were imported; no run says how to sample them."
    if not config_file.is_file():
        return f"The run's `{config_file.name}` is not beside its checkpoints; only it says how to sample the role."
    try:
        config = load_config(["--job.config_file", str(config_file)], trusted)
    except ConfigError as error:
        logger.warning("README.md will not say how to sample the %s: %s", role, error)
        return f"It is not known how to sample the role, because the run's configuration does not load: {error}"
    method = method_class(config.recipe.method)
    request = method.validation_samples(config.method_config, config.pipeline_config.flow_shift).of_role(role)
    if request is None:
        return f"The method `{config.recipe.method}` does not say how to sample from its {role}."
    return model_family(config.recipe.family)(config), request


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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


def _model_card(
    checkpoint: Path,
    manifest: Manifest,
    role: str,
    index: dict[str, Any] | None,
    sampled: tuple[ModelFamily, SampleRequest] | str,
    *,
    use_ema: bool,
) -> str:
    """Returns the text of `README.md`. `index` is the exported pipeline's, empty for networks alone, None for files in
    the original format."""
    trained = manifest.trained[role]
    if isinstance(sampled, str):
        sampling = sampled
    else:
        sampling = sampled[0].sampling_section(sampled[1], trained.architecture, trained.modules, index)
    content = "diffusers' `DiffusionPipeline.from_pretrained` loads it."
    if index is None:
        content = f"`{TRANSFORMER}.safetensors` has the tensor names of the model's original code."
    elif not index:
        content = f"`{TRANSFORMER}/` belongs into a diffusers pipeline of the same family."
    run_folder = checkpoint.parent.parent
    config = run_folder / "config.toml"
    base = trained.base
    if manifest.weights_only:
        config_text = "# none: these weights were imported"
    else:
        config_text = config.read_text(encoding="utf-8") if config.is_file() else "# not found beside the checkpoints"
    return f"""---
library_name: diffusers
tags: [titan_distill, {manifest.family}]
---

# {checkpoint.name if manifest.weights_only else run_folder.name}: {role}

Exported by titan_distill from `{checkpoint.name}`: {content}

| | |
| --- | --- |
| role | {role} |
| weights | {"exponential moving average" if use_ema else "raw, as trained"} |
| step | {manifest.step} |
| LoRA adapter | {"none" if base is None else f"merged into {base.path}"} |
| updates of this role | {trained.num_updates} |
| samples seen | {manifest.samples_seen} |
| seed | {manifest.seed} |

## Sampling

{sampling}

## Configuration of the run

{FENCE}toml
{config_text.rstrip()}
{FENCE}
"""
