"""How many ranks share what, as numbers; no process group and no torch needed.

Ranks are laid out as ``dp_replicate × dp_shard × sequence × tensor`` with tensor innermost: neighbours in rank, which
share a node, talk most.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Degrees:
    """The resolved layout of one role; the product of the four is the number of ranks of the run.

    Attributes:
        dp_replicate: copies of the sharded weights (HSDP).
        dp_shard: ranks with different samples that share one copy of the weights (FSDP).
        sequence: ranks that share the tokens of a sample; they shard weights too.
        tensor: ranks that share each weight matrix.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    sequence: int = 1
    tensor: int = 1

    @property
    def data_parallel(self) -> int:
        """Groups of ranks that work on different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def model_parallel(self) -> int:
        """Ranks that work on the same samples."""
        return self.sequence * self.tensor

    @property
    def world_size(self) -> int:
        return self.data_parallel * self.model_parallel

    def __str__(self) -> str:
        named = {
            "replicas": self.dp_replicate,
            "FSDP": self.dp_shard,
            "sequence": self.sequence,
            "tensor": self.tensor,
        }
        return " × ".join(f"{name} {degree}" for name, degree in named.items() if degree > 1) or "whole"
