"""The batch exchange: a role whose ranks span several data groups serves all of them at once.

Example: four data-parallel students, each with its own prompt, and a teacher that is tensor-parallel over the same four
ranks. The teacher's ranks must all see the same input, so the four inputs are gathered, the teacher runs once on a
batch of four, and everyone takes its own result back. Both directions carry gradients: what was gathered is replicated
(each rank computes the same with it), and what is taken back is cut from a replicated tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from titan_distill.parallelisms import collectives

Forward = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class BatchExchange:
    """``group`` has one rank of each data group that the role spans, in the order of their samples."""

    group: dist.ProcessGroup

    def run(self, forward: Forward, x: Tensor, sigma_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """``forward`` of all groups' samples, of which this rank's are returned. Tensors are batch-first."""
        whole = {name: collectives.gather(value, 0, self.group) for name, value in condition.items()}
        everything = forward(collectives.gather(x, 0, self.group), collectives.gather(sigma_B, 0, self.group), whole)
        return collectives.shard(everything, 0, self.group)
