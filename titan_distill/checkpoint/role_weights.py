"""Which weights of a role a checkpoint holds, and under which names."""

from __future__ import annotations

from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from titan_distill.checkpoint.diffusers_folder import TRANSFORMER
from titan_distill.checkpoint.manifest import Manifest, TrainedRole
from titan_distill.checkpoint.state import ema_prefix, model_prefix


def check_weights(checkpoint: Path, manifest: Manifest, role: str, *, use_ema: bool) -> None:
    """Raises ValueError when the manifest knows no such weights of a trained role."""
    if not trained_role(checkpoint, manifest, role).has_ema and use_ema:
        raise ValueError(f"{checkpoint} has no EMA of {role!r}: set [ema] in the run, or ask for the raw weights")


def trained_role(checkpoint: Path, manifest: Manifest, role: str) -> TrainedRole:
    """What the manifest says of a trained role. Raises ValueError with the known roles for any other."""
    if role in manifest.frozen:
        raise ValueError(
            f"role {role!r} is frozen, so {checkpoint} does not hold it; its weights are in "
            f"{manifest.frozen[role].path or 'no folder'}"
        )
    if role not in manifest.trained:
        raise ValueError(f"{checkpoint} has no role {role!r}; it has {', '.join(manifest.trained)}")
    return manifest.trained[role]


def stored_names(
    metadata: Metadata, role: str, *, use_ema: bool, module: str = TRANSFORMER, is_alone: bool = True
) -> dict[str, str]:
    """Name in the model -> name in the checkpoint, of one of a role's modules; ``is_alone``: of the only one.

    Buffers are not averaged: they come from the model in any case.
    """
    stored = sorted(metadata.state_dict_metadata)
    ema = ema_prefix(role) if is_alone else f"{ema_prefix(role)}{module}."
    model, averaged = (
        {name.removeprefix(prefix): name for name in stored if name.startswith(prefix)}
        for prefix in (model_prefix(role, module), ema)
    )
    assert averaged.keys() <= model.keys(), "EMA and model disagree on parameter names"
    return {**model, **averaged} if use_ema else model
