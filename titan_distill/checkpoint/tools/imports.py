"""From a diffusers folder to a checkpoint that roles start from.

A role on many ranks reads only its own parts of a checkpoint. What is published holds weights and nothing else: the
manifest says so, and no run can be resumed from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from titan_distill.checkpoint.diffusers_folder import TRANSFORMER, TRANSFORMER_2, open_folder
from titan_distill.checkpoint.manifest import FileRecord, Manifest, TrainedRole
from titan_distill.checkpoint.publish import publish_alone
from titan_distill.checkpoint.state import model_prefix
from titan_distill.checkpoint.tools import rewrite

MAX_FILE_BYTES = 5 << 30

UsedWeights = Callable[[dict[str, Any], Mapping[str, torch.Size]], list[str]]
"""Architecture and shapes by name -> the names that the family's network has. Raises ValueError when they disagree."""


def import_folder(folder: Path, out: Path, role: str, family: str, used_weights: UsedWeights) -> Path:
    """Writes the network, or the two experts, in ``folder`` to the checkpoint ``out``, as the weights of ``role``.
    Returns ``out``.

    Weights keep their dtype. Holds one tensor. Raises ValueError for a folder that is not what diffusers writes or not
    of the family, and for an ``out`` that exists.
    """
    if not re.fullmatch(r"[\w-]+", role):
        raise ValueError(f"role {role!r} is no name of a role; use letters, digits, - and _")
    modules = [TRANSFORMER, TRANSFORMER_2] if (folder / TRANSFORMER_2).is_dir() else [TRANSFORMER]
    sources = {model_prefix(role, module): open_folder(folder, module) for module in modules}
    architecture = sources[model_prefix(role, TRANSFORMER)].architecture
    kinds: dict[str, rewrite.TensorKind] = {}
    for prefix, source in sources.items():
        names = used_weights(architecture, {name: kind.shape for name, kind in source.kinds.items()})
        kinds |= {prefix + name: source.kinds[name] for name in names}
    num_bytes = sum(kind.num_bytes for kind in kinds.values())
    manifest = Manifest(
        step=0,
        samples_seen=0,
        seed=0,
        world_size=1,
        config_digest="",
        family=family,
        pipeline_config={},
        trained={role: TrainedRole(modules, 0, has_ema=False, mesh={}, architecture=architecture)},
        frozen={},
        files={},
        weights_only=True,
    )

    def read(name: str) -> torch.Tensor:
        prefix = next(prefix for prefix in sources if name.startswith(prefix))
        return sources[prefix].read(name.removeprefix(prefix))

    def fill(temporary: Path) -> dict[str, FileRecord]:
        num_files = min(len(kinds), 1 + num_bytes // MAX_FILE_BYTES)
        return rewrite.write(temporary, kinds, read, num_files)

    return publish_alone(out, manifest, fill)
