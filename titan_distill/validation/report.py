"""What validation says in numbers: a distance between two sets of samples, and a table for the end of the log.

The sliced Wasserstein distance compares distributions through their projections on random directions θ, where optimal
transport is sorting:

    SW₂(a, b) = sqrt( mean over θ of mean over i of (sort(aθ)_i − sort(bθ)_i)² ),   θ uniform on the unit sphere of R^D

A unit direction averages over coordinates, so the unit of SW₂ is that of one coordinate: latents of unit variance
project to unit variance, and a shift by δ gives |δ| / √D. It needs no network and no fit, unlike Fréchet distances, and
works on a hundred samples.

Its floor is not zero: two sets of N samples of one law differ by about 1.9 / √N standard deviations, which for N = 96
is as much as a good sampler differs from its reference. `sliced_wasserstein_excess` takes the floor away. Both sets are
cut into the same random halves A and B, and what two halves of one law differ by is subtracted from what halves of
different laws do:

    excess² = ½ (SW₂²(a_A, b_B) + SW₂²(a_B, b_A) − SW₂²(a_A, a_B) − SW₂²(b_A, b_B)),   mean over cuts

If the laws are equal the four terms have equal means, so the mean is zero for any N; and as samples with a common
index (one prompt, one noise) are never compared, a sampler gains nothing from starting at the reference's noise.
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
    a_NP, b_NP = _projections(a, b, num_projections, seed)
    return _squared_gap(a_NP, b_NP) ** 0.5


def sliced_wasserstein_excess(
    a: Tensor, b: Tensor, *, num_projections: int = 256, num_cuts: int = 32, seed: int = 0
) -> float:
    """SW₂ between the laws of two sets of N samples, without what the finite N adds; see the module's docstring.

    The squared excess of two equal laws scatters around zero; where it is negative this returns 0. Arguments and errors
    as for ``sliced_wasserstein``, and ValueError for fewer than four samples.
    """
    if len(a) < 4:
        raise ValueError(f"{len(a)} samples can't be cut into halves that tell anything; compare at least 4")
    a_NP, b_NP = _projections(a, b, num_projections, seed)
    generator = torch.Generator().manual_seed(seed)
    half = len(a) // 2
    total = 0.0
    for _ in range(num_cuts):
        first, second = torch.randperm(len(a), generator=generator)[: 2 * half].chunk(2)
        total += _squared_gap(a_NP[first], b_NP[second]) + _squared_gap(a_NP[second], b_NP[first])
        total -= _squared_gap(a_NP[first], a_NP[second]) + _squared_gap(b_NP[first], b_NP[second])
    return max(0.0, total / (2 * num_cuts)) ** 0.5


def _projections(a: Tensor, b: Tensor, num_projections: int, seed: int) -> tuple[Tensor, Tensor]:
    """Both sets on the same random unit directions, [N, P] each."""
    if a.shape != b.shape:
        raise ValueError(
            f"sample sets have shapes {list(a.shape)} and {list(b.shape)}; compare equally many of equal size"
        )
    both = torch.cat([a.detach().cpu().double().flatten(1), b.detach().cpu().double().flatten(1)])
    generator = torch.Generator().manual_seed(seed)
    projected = []
    for _ in range(num_projections):  # one at a time: all directions at once would not fit for real latents
        direction_D = torch.randn(both.shape[1], generator=generator, dtype=torch.float64)
        projected.append(both @ (direction_D / direction_D.norm()))
    a_NP, b_NP = torch.stack(projected, dim=1).chunk(2)
    return a_NP, b_NP


def _squared_gap(a_NP: Tensor, b_NP: Tensor) -> float:
    """SW₂² of projected sets."""
    return (a_NP.sort(dim=0).values - b_NP.sort(dim=0).values).square().mean().item()


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
