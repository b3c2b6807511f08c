"""Initial weights of a role from a role of a checkpoint, named as `".../step-00000100#student:ema"`.

In contrast to a resume, only the weights are read, the two runs may otherwise differ, and the dtype may change (a
frozen role reads fp32 weights as bf16). The names and shapes of the weights must be the same in model and checkpoint.
Each rank reads the parts that its layout needs, whatever layout wrote them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from titan_distill.checkpoint import storage
from titan_distill.checkpoint.complete import check_tensors
from titan_distill.checkpoint.diffusers_folder import TRANSFORMER, TRANSFORMER_2, network_folder
from titan_distill.checkpoint.discovery import resolve
from titan_distill.checkpoint.manifest import MANIFEST_NAME, Manifest, TrainedRole, read_manifest
from titan_distill.checkpoint.state import ema_key, model_key
from titan_distill.config.paths import is_reference
from titan_distill.fault_tolerance.files import fingerprint, record_file
from titan_distill.fault_tolerance.ranks import Ranks
from titan_distill.parallelisms.lora import without_adapters

_FORM = "write PATH#ROLE, PATH#ROLE:ema or PATH#ROLE:raw, where PATH is a step's folder or checkpoints/latest"


@dataclass(frozen=True)
class WeightsReference:
    """Reference to weights in a checkpoint that exists and contains them."""

    checkpoint: Path
    manifest: Manifest
    role: str
    use_ema: bool

    @property
    def text(self) -> str:
        """Returns the reference with its step and `ema` or `raw` spelled out, so that it always means the same
        weights."""
        return f"{self.checkpoint}#{self.role}:{'ema' if self.use_ema else 'raw'}"

    @property
    def digest(self) -> str:
        """Returns the SHA-256 of the manifest, which contains the hash of every file of the checkpoint."""
        return record_file(self.checkpoint / MANIFEST_NAME).sha256

    @property
    def trained(self) -> TrainedRole:
        """Returns the role's entry in the manifest, with its architecture."""
        return self.manifest.trained[self.role]


def resolve_reference(text: str) -> WeightsReference:
    """Finds the weights that `PATH#ROLE[:ema|:raw]` names. It reads the manifest and no weights.

    `:ema` or `:raw` may be left out only if the role has no EMA. Raises ValueError for a reference in another form, an
    unusable checkpoint, an unknown role, and `:ema` for a role without EMA.
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
    """Returns the manifest's entry of a trained role. Raises ValueError for a frozen or unknown role, and if `use_ema`
    is true but the role has no EMA."""
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
    """Returns a dict for one module of a role: from each tensor's name in the model to its name in the checkpoint.

    If the role lacks that module it has a single network, whose names are returned. Buffers have no EMA; their names
    are always those of the raw weights.
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


def networks_digest(weights: str) -> str:
    """Returns a digest of the networks alone: other than for `weights_digest`, the encoders of a pipeline do not count.

    For a folder it covers names, sizes and both ends of the files: two megabytes per file of a 14B network. Headers
    alone would be equal for any two networks of one architecture. Raises ValueError for a folder that does not exist.
    """
    if is_reference(weights):
        return resolve_reference(weights).digest
    folders = dict.fromkeys(network_folder(Path(weights), module) for module in (TRANSFORMER, TRANSFORMER_2))
    if not all(folder.is_dir() for folder in folders):
        raise ValueError(f"there is no folder {weights}; name the folder of a diffusers transformer or pipeline")
    return hashlib.sha256("".join(map(fingerprint, folders)).encode()).hexdigest()


@torch.no_grad()
def read_weights(reference: str, module: nn.Module, name: str = TRANSFORMER) -> None:
    """Fills a materialised module, plain or sharded in any layout, with the weights that a reference names.

    `name` chooses one module of a role with several. Collective if there are several ranks. Everything is checked
    before any tensor changes. Raises the errors of `resolve_reference`, CheckpointDamaged with the name of the file, or
    ValueError with the names of weights that only the module or only the checkpoint has.
    """
    ranks = Ranks()
    found = ranks.on_rank_zero(lambda: resolve_reference(reference))
    metadata = storage.open_together(found.checkpoint, found.manifest, ranks)
    names = stored_names(metadata, found.trained, found.role, name, use_ema=found.use_ema)
    weights: dict[str, Any] = without_adapters(get_model_state_dict(module))
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    ranks.together(lambda: check_tensors(reference, shapes, _shapes(names, metadata), "choose other weights"))
    storage.read({names[name]: weight for name, weight in weights.items()}, found.checkpoint, metadata, ranks.group)


def _shapes(names: dict[str, str], metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each stored tensor by its name in the model. A value that is no tensor is left out."""
    entries = {name: metadata.state_dict_metadata[stored] for name, stored in names.items()}
    return {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
