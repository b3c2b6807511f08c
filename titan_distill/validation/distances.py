"""Distances between two sets of samples, for validation.

The sliced Wasserstein distance compares distributions through their projections on random directions θ, where optimal
transport is sorting:

    SW₂(a, b) = sqrt( mean over θ of mean over i of (sort(aθ)_i − sort(bθ)_i)² ),   θ uniform on the unit sphere of R^D

SW₂ has the unit of one coordinate: latents of unit variance have projections of unit variance, and a shift by δ gives
|δ| / √D. In contrast to Fréchet distances it needs no network and no fit, and it works with a hundred samples.

Its floor is not zero: two sets of N samples from the same distribution have a distance of about 1.9 / √N standard
deviations. For N = 96 this is as large as the distance of a good sampler from its reference.
`sliced_wasserstein_excess` removes the floor. It cuts both sets into the same random halves A and B, and subtracts the
squared distances between halves of one set from those between halves of different sets:

    excess² = ½ (SW₂²(a_A, b_B) + SW₂²(a_B, b_A) − SW₂²(a_A, a_B) − SW₂²(b_A, b_B)),   mean over cuts

If the two distributions are equal, the four terms have equal means, so the mean of excess² is zero for any N. Samples
with the same index (same prompt, same noise) are never compared, so a sampler gains no advantage from the noise that it
shares with the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_PROJECTIONS = 256

# Directions drawn and multiplied at once, and values of a sample converted to float64 at once: a real latent has
# millions of values, so neither all directions nor all samples in float64 would fit into memory.
_DIRECTIONS_AT_ONCE, _VALUES_AT_ONCE = 16, 2**18


def project(samples: Sequence[Tensor], *, num_projections: int = NUM_PROJECTIONS, seed: int = 0) -> Tensor:
    """Projects samples of one shape on random unit directions: [N, P], float64 on the CPU.

    The directions are drawn from `seed` on the CPU, so they are equal on every machine. The projections of a sample do
    not depend on the other samples (except for the last bits), so sets can be projected in parts, on any rank.
    """
    if not samples:
        return torch.empty(0, num_projections, dtype=torch.float64)
    samples_ND = torch.stack([sample.detach().cpu().flatten() for sample in samples])
    generator = torch.Generator().manual_seed(seed)
    projected = []
    for start in range(0, num_projections, _DIRECTIONS_AT_ONCE):
        count = min(_DIRECTIONS_AT_ONCE, num_projections - start)
        drawn = [torch.randn(samples_ND.shape[1], generator=generator, dtype=torch.float64) for _ in range(count)]
        directions_PD = torch.stack(drawn)
        parts = zip(samples_ND.split(_VALUES_AT_ONCE, 1), directions_PD.split(_VALUES_AT_ONCE, 1), strict=True)
        products_NP = torch.stack([values.double() @ directions.T for values, directions in parts]).sum(0)
        projected.append(products_NP / directions_PD.norm(dim=1))
    return torch.cat(projected, dim=1)


def sliced_wasserstein(a_NP: Tensor, b_NP: Tensor) -> float:
    """Returns SW₂ between two sets of N samples, projected on the same directions, in the unit of one coordinate."""
    return _squared_gap(a_NP, b_NP) ** 0.5


def sliced_wasserstein_excess(a_NP: Tensor, b_NP: Tensor, *, num_cuts: int = 32, seed: int = 0) -> float:
    """Returns SW₂ between the distributions of two projected sets, without the floor from finite N; see the module's
    docstring.

    The squared excess of two equal distributions scatters around zero; for a negative square this returns 0. Raises
    ValueError for fewer than four samples.
    """
    if len(a_NP) < 4:
        raise ValueError(f"{len(a_NP)} samples are too few for the distance without its floor; compare at least 4")
    generator = torch.Generator().manual_seed(seed)
    half = len(a_NP) // 2
    total = 0.0
    for _ in range(num_cuts):
        first, second = torch.randperm(len(a_NP), generator=generator)[: 2 * half].chunk(2)
        total += _squared_gap(a_NP[first], b_NP[second]) + _squared_gap(a_NP[second], b_NP[first])
        total -= _squared_gap(a_NP[first], a_NP[second]) + _squared_gap(b_NP[first], b_NP[second])
    return max(0.0, total / (2 * num_cuts)) ** 0.5


def _squared_gap(a_NP: Tensor, b_NP: Tensor) -> float:
    """Returns SW₂² of two projected sets."""
    assert a_NP.shape == b_NP.shape, f"sets of {list(a_NP.shape)} and {list(b_NP.shape)}"
    return (a_NP.sort(dim=0).values - b_NP.sort(dim=0).values).square().mean().item()
