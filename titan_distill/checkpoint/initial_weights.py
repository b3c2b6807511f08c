"""Initial weights of a role from a role of a checkpoint, named as `".../step-00000100#student:ema"`.

Unlike a resume this takes weights only, nothing else has to agree, and a role may read its weights in another dtype (a
frozen role in bf16 from fp32 masters). Names and shapes must be the same, both ways. Each rank reads the parts that
its own layout needs, whatever the layout that wrote them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from titan_distill.checkpoint import storage
from titan_distill.checkpoint.diffusers_folder import TRANSFORMER
from titan_distill.checkpoint.discovery import resolve
from titan_distill.checkpoint.manifest import MANIFEST_NAME, Manifest, TrainedRole, read_manifest
from titan_distill.checkpoint.state import ema_key, model_key
from titan_distill.fault_tolerance.files import fingerprint, record_file
from titan_distill.fault_tolerance.ranks import Ranks
from titan_distill.parallelisms.lora import without_adapters

_FORM = "write PATH#ROLE, PATH#ROLE:ema or PATH#ROLE:raw, where PATH is a step's folder or checkpoints/latest"


@dataclass(frozen=True)
class WeightsReference:
    """Weights in a checkpoint that is known to exist and to have them."""

    checkpoint: Path
    manifest: Manifest
    role: str
    use_ema: bool

    @property
    def text(self) -> str:
        """The reference with its step and its kind of weights spelled out, so that its meaning does not change."""
        return f"{self.checkpoint}#{self.role}:{'ema' if self.use_ema else 'raw'}"

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds the hash of every file of the checkpoint."""
        return record_file(self.checkpoint / MANIFEST_NAME).sha256

    @property
    def trained(self) -> TrainedRole:
        """The role's entry in the manifest, with its architecture."""
        return self.manifest.trained[self.role]


def is_reference(text: str) -> bool:
    """Whether `init_from` names a role of a checkpoint rather than a folder of weights."""
    return "#" in text


def resolve_reference(text: str) -> WeightsReference:
    """Finds the weights that `PATH#ROLE[:ema|:raw]` names; reads the manifest and no weights.

    `:ema` or `:raw` may be left out only where there is no average to confuse the weights with. Raises ValueError
    for anything else, an unusable checkpoint, an unknown role and an average that was never kept.
    """
    path, _, rest = text.rpartition("#")
    role, colon, weights = rest.partition(":")
    if not path or not role or (colon and weights not in ("ema", "raw")):
        raise ValueError(f"{text!r} names no weights of a checkpoint; {_FORM}")
    checkpoint = resolve(Path(path))
    manifest = read_manifest(checkpoint)
    trained = trained_role(checkpoint, manifest, role, use_ema=weights == "ema")
    if trained.base is not None:
        raise ValueError(
            f"{checkpoint} holds only a LoRA adapter of {role!r}, for the weights in {trained.base.path}; merge the "
            "two with `titan-distill checkpoint export` and name the exported folder"
        )
    if trained.has_ema and not colon:
        raise ValueError(f"{checkpoint} has two sets of weights of {role!r}; write #{role}:ema or #{role}:raw")
    return WeightsReference(checkpoint, manifest, role, weights == "ema")


def trained_role(checkpoint: Path, manifest: Manifest, role: str, *, use_ema: bool = False) -> TrainedRole:
    """Returns the manifest's entry of a trained role. Raises ValueError for any other, and for an EMA that it lacks."""
    if role in manifest.frozen:
        raise ValueError(
            f"role {role!r} is frozen, so {checkpoint} does not hold it; its weights are in "
            f"{manifest.frozen[role].path or 'no folder'}"
        )
    if role not in manifest.trained:
        raise ValueError(f"{checkpoint} has no role {role!r}; it has {', '.join(manifest.trained)}")
    if use_ema and not manifest.trained[role].has_ema:
        raise ValueError(f"{checkpoint} has no EMA of {role!r}: set [ema] in the run, or ask for the raw weights")
    return manifest.trained[role]


def stored_names(metadata: Metadata, trained: TrainedRole, role: str, module: str, *, use_ema: bool) -> dict[str, str]:
    """Returns the names in the checkpoint by the names in the model, of one of a role's modules.

    A role without that module has one network, which stands for it. Buffers are not averaged: they come from the model
    in any case.
    """
    module = module if module in trained.modules else TRANSFORMER
    stored = sorted(metadata.state_dict_metadata)
    ema = f"{ema_key(role)}." if len(trained.modules) == 1 else f"{ema_key(role)}.{module}."
    model, averaged = (
        {name.removeprefix(prefix): name for name in stored if name.startswith(prefix)}
        for prefix in (f"{model_key(role, module)}.", ema)
    )
    assert averaged.keys() <= model.keys(), "EMA and model disagree on parameter names"
    return {**model, **averaged} if use_ema else model


def weights_digest(weights: str) -> str:
    """Returns a digest of the weights that a role starts from, in a checkpoint or in a folder."""
    return resolve_reference(weights).digest if is_reference(weights) else fingerprint(Path(weights))


@torch.no_grad()
def read_weights(reference: str, module: nn.Module, name: str = TRANSFORMER) -> None:
    """Fills a materialised module, plain or sharded in any layout, with the weights that a reference names.

    `name` chooses one of the role's modules where it has several. Collective where there are several ranks. Everything
    is checked before any tensor changes. Raises as `resolve_reference`, CheckpointDamaged naming the file, or
    ValueError naming the first weight that the module and the checkpoint do not share.
    """
    ranks = Ranks()
    found = ranks.on_rank_zero(lambda: resolve_reference(reference))
    metadata = storage.open_together(found.checkpoint, found.manifest, ranks)
    names = stored_names(metadata, found.trained, found.role, name, use_ema=found.use_ema)
    weights: dict[str, Any] = without_adapters(get_model_state_dict(module))
    ranks.together(lambda: _check_same(weights, names, metadata, reference))
    storage.read({names[name]: weight for name, weight in weights.items()}, found.checkpoint, metadata, ranks.group)


def _check_same(weights: dict[str, torch.Tensor], names: dict[str, str], metadata: Metadata, reference: str) -> None:
    if missing := sorted(weights.keys() - names.keys()):
        raise ValueError(f"{reference} has no {missing[0]} ({len(missing)} of {len(weights)} weights are missing)")
    if extra := sorted(names.keys() - weights.keys()):
        raise ValueError(f"{reference} has {extra[0]}, unknown to the model ({len(extra)} such weights)")
    for name, weight in sorted(weights.items()):
        entry = metadata.state_dict_metadata[names[name]]
        if not isinstance(entry, TensorStorageMetadata) or entry.size != weight.shape:
            found = list(entry.size) if isinstance(entry, TensorStorageMetadata) else "no tensor"
            raise ValueError(f"{name} in {reference} is {found}, the model needs {list(weight.shape)}")
