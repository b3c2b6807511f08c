"""What DCP (torch.distributed.checkpoint) is told to do differently when it writes.

- Files are hashed on their way to the disk (``hashing.py``).
- Rank 0 knows everybody's plan before a byte is written, and so how much room the checkpoint needs: a disk that is too
  full is refused there, on all ranks at once, instead of failing some of them minutes later.
- Tensors may be taken from copies in host memory (``staging.py``) instead of the live ones. The plan is always made
  from the live ones, whose layouts it needs; so a copied and a direct save have the same files.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from titan_distill.checkpoint.hashing import HashedFiles
from titan_distill.checkpoint.ranks import RankFailure

_ITEM_BYTES = 4096
"""What a value costs beyond its numbers: header, alignment, its place in the index. All of one that is no tensor."""
_MARGIN = 1.01


class NotEnoughSpace(RankFailure):
    """The disk has less room than the checkpoint needs; nothing was written."""


class Writer(dcp.FileSystemWriter):
    """Writes one checkpoint: a file a rank, flushed to disk."""

    def __init__(self, folder: Path) -> None:
        # One thread: further ones are where DCP loses an OSError (https://github.com/pytorch/pytorch/issues/191391).
        super().__init__(folder, thread_count=1, sync_files=True)
        self.fs = self.files = HashedFiles()

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Rank 0 only. Raises NotEnoughSpace, which DCP tells the others."""
        check_space(Path(self.path), planned_bytes(plans))
        return super().prepare_global_plan(plans)


class Planner(dcp.DefaultSavePlanner):
    """Plans by the state it is given, and takes data from ``copies`` (by flat name) where there are any."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._copies[index.fqn] if index.fqn in self._copies else super().lookup_object(index)


def planned_bytes(plans: list[SavePlan]) -> int:
    """Room that a checkpoint needs: the shards that all ranks write, each once, and a little more."""
    num_bytes = sum(_item_bytes(item) for plan in plans for item in plan.items)
    return math.ceil(num_bytes * _MARGIN)


def check_space(folder: Path, num_bytes: int) -> None:
    """Raises NotEnoughSpace when the disk of ``folder`` has less than ``num_bytes`` left."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise NotEnoughSpace(
            f"the checkpoint needs {_readable(num_bytes)}, but the disk of {folder.parent} has {_readable(free)} left; "
            "free some, or write elsewhere (a run: lower checkpoint.keep, or choose another job.output_dir)"
        )


def _item_bytes(item: WriteItem) -> int:
    if item.tensor_data is None:
        return _ITEM_BYTES
    return _ITEM_BYTES + math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _readable(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
