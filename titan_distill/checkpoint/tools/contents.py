"""The contents of a checkpoint for a tool in one process: named values, read one at a time.

A 14B role with its optimizer moments has 170 GB, more than the memory of a workstation, but every tool (export,
reshard, diff, verify) needs only one value at a time. No process group and no model is needed. The hashes of all files
are compared before the first value is read, so a tool never processes half of a damaged checkpoint. The price is that
files are read twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from titan_distill.checkpoint import storage
from titan_distill.checkpoint.diffusers_folder import TRANSFORMER, open_folder
from titan_distill.checkpoint.discovery import resolve
from titan_distill.checkpoint.initial_weights import resolve_reference, stored_names, trained_role, weights_digest
from titan_distill.checkpoint.manifest import AdaptedBase, CheckpointDamaged, Manifest, read_manifest, verify_hashes
from titan_distill.config.paths import is_reference
from titan_distill.parallelisms.lora import merge


@dataclass(frozen=True)
class Contents:
    """An open checkpoint whose files match its manifest."""

    path: Path
    manifest: Manifest
    metadata: Metadata

    @property
    def names(self) -> list[str]:
        """Names of all values, sorted."""
        return sorted(self.metadata.state_dict_metadata)

    def tensor(self, name: str) -> TensorStorageMetadata | None:
        """Returns shape and dtype of a tensor; None for a value that is not one."""
        entry = self.metadata.state_dict_metadata[name]
        return entry if isinstance(entry, TensorStorageMetadata) else None

    def read(self, name: str) -> Any:
        """Reads one value: a whole CPU tensor put together from its shards, or another object.

        Raises CheckpointDamaged if the value cannot be read as plain data, for example because unpickling it would run
        code.
        """
        entry = self.tensor(name)
        state = {name: None if entry is None else torch.empty(entry.size, dtype=entry.properties.dtype)}
        try:
            storage.read(state, self.path, self.metadata)
        except RuntimeError as error:
            files = sorted({info.relative_path for at, info in self.metadata.storage_data.items() if at.fqn == name})
            raise CheckpointDamaged(
                f"{self.path / files[0]} can't be trusted: {name} in it is not plain data as .metadata describes it"
            ) from error
        return state[name]


def open_checkpoint(path: Path) -> Contents:
    """Opens a step's folder, or `.../latest`, after comparing sizes, hashes and index.

    Raises CheckpointDamaged naming the file, or ValueError when there is no checkpoint.
    """
    path = resolve(path)
    manifest = read_manifest(path)
    verify_hashes(path, manifest)
    return Contents(path, manifest, storage.read_index(path, manifest.files))


def role_tensors(
    checkpoint: Path, role: str, *, use_ema: bool, module: str = TRANSFORMER
) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights of one module of a role as whole CPU tensors, one at a time, sorted by name.

    A LoRA adapter is merged into its base in fp32. The whole checkpoint is verified first. Before the first tensor it
    raises ValueError for a missing or damaged checkpoint, an unknown role, or an EMA that the role does not have.
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
    """Yields all tensors of the base, one at a time, sorted by name.

    Raises ValueError if the base weights are missing or have changed since the LoRA adapter was trained.
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
