"""The identity of a set of pairs: all that determines a pair, except its index.

Pairs of two identities in one folder would be learned as one data set, and no row says which teacher made it. Making
them takes days at real size, so a folder whose identity fits must not be refused either. Paths, which move, are
therefore stored to be read and not compared; weights, prompts and the text encoder are compared by digest. Every key of
the configuration counts, except for a list of keys that change no pair, so that a new key counts unless somebody adds
it to the list.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from titan_distill.checkpoint.initial_weights import networks_digest
from titan_distill.config.config import Config
from titan_distill.config.text import to_dict
from titan_distill.data.parquet import LatentRow, ParquetDataset, read_captions
from titan_distill.data.row_groups import parquet_files
from titan_distill.diffusion.noise import NOISE_VERSION
from titan_distill.diffusion.requests import TrajectoryRequest
from titan_distill.fault_tolerance.files import atomic, parse_json
from titan_distill.models.base import ModelFamily

SETTINGS = "ode_pairs.json"
PATHS = {"teacher_digest": "teacher", "prompts_digest": "prompts"}
"""Digests, each with the setting that names the path of its files. That path is not compared."""
WITHOUT_EFFECT = (
    # Of the run that learns the pairs. Its seed counts only where it makes the teacher's weights.
    *("job", "recipe.method", "method_config", "optimizer", "lr_scheduler", "ema", "checkpoint", "validation"),
    *("data.path", "data.sources", "data.num_workers", "data.max_bad_rows", "data.fps"),
    *("training.global_batch_size", "training.local_batch_size", "training.max_grad_norm"),
    *("training.reduce_gradients", "training.gc_interval", "training.max_nonfinite_skips"),
    *("roles.teacher.trainable", "roles.teacher.optimizer", "roles.teacher.max_grad_norm", "roles.teacher.lora"),
    "float8.roles",  # for_role has looked at it
    # Layout and speed: the same numbers but for rounding.
    *("parallelism", "roles.teacher.parallelism", "activation_checkpoint", "compile"),
    *("metrics", "profiling", "comm"),
    # Compared by digest.
    *("roles.teacher.path", "roles.teacher.init_from", "roles.teacher.flavor"),
)
"""Keys of the configuration, and tables of them, that change no pair."""
OF_SPARSE_ATTENTION = ("sparse_attention", "roles.teacher.tile", "training.steps")
"""Keys that count only for a teacher with sparse attention. Its schedule ends with the last step."""


def identity(
    config: Config, family: ModelFamily, request: TrajectoryRequest, prompts: Path, prompts_digest: str, **pairs: Any
) -> dict[str, Any]:
    """Returns the identity, by name, in the form in which JSON stores it.

    Args:
        config: the configuration, its reference to the teacher's weights spelled out.
        family: the model family, built for `config`.
        request: the sampling.
        prompts: path of the prompts.
        prompts_digest: their digest.
        pairs: further settings of the pairs, from the command line.

    Raises:
        ValueError: a teacher without its weights.
    """
    role = config.roles["teacher"]
    weights = role.path or role.init_from
    named = {
        "teacher": weights or "random weights",
        "teacher_digest": networks_digest(weights) if weights else f"job.seed {config.job.seed}, flavor {role.flavor}",
        "prompts": str(prompts),
        "prompts_digest": prompts_digest,
        "noise_version": NOISE_VERSION,
        **pairs,
        **dataclasses.asdict(request),
    }
    plain: dict[str, Any] = json.loads(json.dumps({**named, **_of_config(config, family)}))
    return plain


def _of_config(config: Config, family: ModelFamily) -> dict[str, Any]:
    """Returns the keys of the configuration that change a pair, dotted."""
    tables = to_dict(config, skip_origins=True)
    role = tables["roles"]["teacher"]
    tables |= {
        "roles": {"teacher": role},
        "pipeline_config": family.sampling_settings("teacher"),
        "float8": to_dict(config.float8.for_role("teacher")),
    }
    without = WITHOUT_EFFECT if role["attention"] == "sparse" else (*WITHOUT_EFFECT, *OF_SPARSE_ATTENTION)
    return {key: value for key, value in flattened(tables) if not any(f"{key}.".startswith(f"{x}.") for x in without)}


def flattened(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def digest_of_prompts(prompts: list[str] | ParquetDataset) -> str:
    """Returns a digest of prompts: of all their texts and, where they have embeddings, of the first and the last one.

    Another encoder changes every embedding, and all of them together may be larger than the weights.
    """
    texts, rows = (prompts, []) if isinstance(prompts, list) else (read_captions(prompts.path, None), _ends(prompts))
    digest = hashlib.sha256(json.dumps(texts).encode())
    for embedding_LD in (row.text_embedding for row in rows):
        digest.update(f"{embedding_LD.dtype}{list(embedding_LD.shape)}".encode())
        digest.update(embedding_LD.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _ends(dataset: ParquetDataset) -> list[LatentRow]:
    return [dataset[0], dataset[len(dataset) - 1]]


def check_identity(out: Path, settings: Mapping[str, Any]) -> None:
    """Raises ValueError, with both values, if the pairs in `out` have another identity than `settings`, or none."""
    file = out / SETTINGS
    if not parquet_files(out):
        return
    if not file.is_file():
        raise ValueError(f"{out} holds parquet files that are no pairs ({SETTINGS} is missing); choose another --out")
    try:
        found = dict(parse_json(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} can't be read ({error}); choose another --out") from error
    if not PATHS.keys() <= found.keys():
        raise ValueError(
            f"{file} is of an earlier version and does not say which weights and prompts made the pairs; choose "
            "another --out (a run still learns from the old ones)"
        )
    for name in [name for name in {**found, **settings} if name not in PATHS.values()]:
        if name not in found or name not in settings or found[name] != settings[name]:
            raise ValueError(
                f"{out} holds pairs made with {PATHS.get(name, name)} = {_shown(name, found)}, not "
                f"{_shown(name, settings)}; choose another --out or the same settings"
            )


def _shown(name: str, settings: Mapping[str, Any]) -> str:
    if name in PATHS:
        return f"{settings[PATHS[name]]} (digest {settings[name][:12]})"
    return str(settings[name]) if name in settings else "(not a setting)"


def publish_identity(out: Path, settings: Mapping[str, Any]) -> None:
    """Writes the identity into the folder of the pairs, after another look: the lock is held only now."""
    check_identity(out, settings)
    out.mkdir(parents=True, exist_ok=True)
    with atomic(out / SETTINGS) as temporary:
        temporary.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
