"""What validation says in numbers: a distance between two sets of samples, and a table for the end of the log.

The sliced Wasserstein distance compares distributions through their projections on random directions θ, where optimal
transport is sorting:

    SW₂(a, b) = sqrt( mean over θ of mean over i of (sort(aθ)_i − sort(bθ)_i)² ),   θ uniform on the unit sphere of R^D

A unit direction averages over coordinates, so the unit of SW₂ is that of one coordinate: latents of unit variance
project to unit variance, and a shift by δ gives |δ| / √D. It needs no network and no fit, unlike Fréchet distances, and
works on a hundred samples; but its floor is not zero: two sets of N samples of one law differ by about 1/√N, so compare
distances at equal N, or with the distance between two seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def sliced_wasserstein(a: Tensor, b: Tensor, *, num_projections: int = 256, seed: int = 0) -> float:
    """SW₂ between two sets of N samples (``[N, ...]``, flattened), in the unit of one coordinate.

    Computed in float64 on the CPU with directions drawn from ``seed``: equal on every machine. Raises ValueError when
    the two sets differ in shape.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"sample sets have shapes {list(a.shape)} and {list(b.shape)}; compare equally many of equal size"
        )
    a_ND, b_ND = a.detach().cpu().double().flatten(1), b.detach().cpu().double().flatten(1)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(num_projections):  # one at a time: all directions at once would not fit for real latents
        direction_D = torch.randn(a_ND.shape[1], generator=generator, dtype=torch.float64)
        direction_D /= direction_D.norm()
        gap_N = (a_ND @ direction_D).sort().values - (b_ND @ direction_D).sort().values
        total += gap_N.square().mean().item()
    return (total / num_projections) ** 0.5


def format_table(rows: Sequence[Mapping[str, str | float]]) -> str:
    """Rows as an aligned text table with their keys as columns: text left, numbers right with three decimals.

    A key that a row lacks is shown as a dash.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    is_text = [any(isinstance(row.get(column), str) for row in rows) for column in columns]

    def line(values: Sequence[str]) -> str:
        aligned = (
            value.ljust(width) if text else value.rjust(width)
            for value, width, text in zip(values, widths, is_text, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(columns), "  ".join("─" * width for width in widths), *map(line, cells)])


def _cell(value: str | float | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.3f}"
