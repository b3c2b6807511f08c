"""Where attention finds its tokens: on this rank, or spread over several.

A *placement* stands between a block and an attention core. It brings queries, keys and values together, lets the core
mix them, and returns outputs to the rank whose tokens they are. There the gate is, so there the coarse output is added.
`parallelisms.sequence` has the placements of shared tokens.

Shape suffixes: B batch, L a rank's tokens, H heads, D head dim, N tiles of the rank's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import titan_kernels
from titan_kernels import TileLayout, Tiles
from torch import Tensor

from titan_distill.attention.dense import AttentionCore


class Placement(Protocol):
    """Attention of a rank's tokens among all tokens of their samples."""

    def __call__(
        self,
        q_BLHD: Tensor,
        k_BLHD: Tensor,
        v_BLHD: Tensor,
        layout: TileLayout,
        gate_BLHD: Tensor | None,
        num_selected: int | None,
        /,
    ) -> Tensor:
        """Return [B, L, H, D]; rows of padding come out as zeros.

        Args:
            q_BLHD, k_BLHD, v_BLHD: of the rank's tokens.
            layout: the tiles of all tokens.
            gate_BLHD: how much of the coarse output each of the rank's tokens takes; None for a core without one.
            num_selected: tiles that each query tile reads; None reads all.
        """
        ...


@dataclass(frozen=True, eq=False)
class LocalAttention:
    """All tokens are here."""

    core: AttentionCore

    def __call__(
        self,
        q_BLHD: Tensor,
        k_BLHD: Tensor,
        v_BLHD: Tensor,
        layout: TileLayout,
        gate_BLHD: Tensor | None,
        num_selected: int | None,
    ) -> Tensor:
        fine_BLHD, coarse_BNHD = self.core.mix(q_BLHD, k_BLHD, v_BLHD, layout, num_selected)
        return add_coarse(fine_BLHD, coarse_BNHD, gate_BLHD, layout.tiles())


def add_coarse(fine_BLHD: Tensor, coarse_BNHD: Tensor | None, gate_BLHD: Tensor | None, tiles: Tiles) -> Tensor:
    """The fine output and, where there is a coarse one, what the gate takes of it."""
    if coarse_BNHD is None or gate_BLHD is None:
        assert coarse_BNHD is gate_BLHD, "a block has a gate exactly where its core is sparse"
        return fine_BLHD
    return titan_kernels.add_coarse(fine_BLHD, coarse_BNHD, gate_BLHD, tiles)
