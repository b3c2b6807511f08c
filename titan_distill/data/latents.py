"""Raw or normalised: the form of a dataset's latents.

Transformers process normalised latents, `(z - mean) / std` per channel. Some datasets hold the raw means z of the VAE's
posterior instead, and nothing in the file says so; a model trained on them learns wrong numbers. So the mean and the
standard deviation of each channel over the first rows are compared with both forms: 0 and 1, or those of the VAE. The
distance to a form is the mean over channels of `|m - mean| / std + |log(s / std)|`.

Trade-off: a few clips, or clips that all look alike, can be far from both. Then the user of a foreign dataset says
which form it is (`data.latents`); a guess would be found out after days. Other datasets are taken as normalised, as
they were before this comparison, with a warning.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Form = Literal["raw", "normalised"]

NUM_ROWS = 64
"""Rows whose latents are compared."""
MAX_DISTANCE = 1.0
"""Largest distance to a form that is taken for it."""
MAX_RATIO = 0.6
"""Largest distance to the form that is taken, as a multiple of the distance to the other one."""


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation per channel of a VAE's raw latents. Empty if the VAE is not known.

    `key` is the configuration's key for the VAE's folder, for messages.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    key: str = ""

    def normalise(self, latent_CFHW: Tensor) -> Tensor:
        """Returns `(z - mean) / std` in fp32. Raises ValueError for another number of channels."""
        if len(latent_CFHW) != len(self.mean):
            raise ValueError(
                f"raw latents of {len(latent_CFHW)} channels, but the VAE of {self.key} has "
                f"{len(self.mean)}; name the VAE that made them"
            )
        mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (self.mean, self.std))
        return (latent_CFHW.float() - mean) / std


def find_form(
    latents: Iterable[Tensor],
    statistics: LatentStatistics,
    stated: Form | None,
    stated_by: str = "data.latents",
    *,
    is_foreign: bool,
) -> Form:
    """Returns the form of a dataset's latents [C, F, H, W].

    Args:
        latents: those of the first rows.
        statistics: those of the run's VAE.
        stated: the form that the user or the dataset's manifest states; a warning is logged if it looks wrong.
        stated_by: configuration key or field of the manifest that states it, for messages.
        is_foreign: whether another program wrote the dataset, so that it may be raw.

    Raises:
        ValueError: the form is neither stated nor clear, or it is raw and the VAE is not known.
    """
    if stated == "raw" and not statistics.mean:
        raise ValueError(
            f'{stated_by} = "raw" needs the VAE\'s mean and standard deviation; set {statistics.key} to a folder '
            "with the VAE that made the latents"
        )
    if not statistics.mean:
        if stated is None and is_foreign:
            raise ValueError(
                "it is not known whether the latents, which another program wrote, are raw or normalised; set "
                f'{stated_by} to "raw" or "normalised", and for raw ones {statistics.key} to a folder with the VAE'
            )
        return stated or "normalised"
    measured = measure(latents)
    if measured is None or len(measured.mean) != len(statistics.mean):
        return stated or "normalised"  # the checks of rows name another number of channels
    unit = LatentStatistics((0.0,) * len(statistics.mean), (1.0,) * len(statistics.mean))
    raw, normalised = distance(measured, statistics), distance(measured, unit)
    near, far = sorted((raw, normalised))
    found: Form | None = None
    if near <= min(MAX_DISTANCE, MAX_RATIO * far):
        found = "raw" if raw < normalised else "normalised"
    figures = (
        f"over the first rows the channels' means are {_range(measured.mean)} and their standard deviations "
        f"{_range(measured.std)}, a distance of {normalised:.2f} from normalised latents and of {raw:.2f} from raw "
        "ones of this VAE"
    )
    if stated is None and found is None and is_foreign:
        raise ValueError(
            f'the latents may be raw or normalised: {figures}; set {stated_by} to "raw" or "normalised", as they were '
            "written"
        )
    if stated is None and found is None and raw != normalised:
        logger.warning(
            "The latents look like neither and are taken as normalised (%s states it): %s", stated_by, figures
        )
    if stated is not None and found not in (None, stated):
        logger.warning('%s = "%s" looks wrong, the latents seem %s: %s', stated_by, stated, found, figures)
    if stated is None and found == "raw":
        logger.info("The latents are raw and are normalised while they are read: %s", figures)
    return stated or found or "normalised"


def measure(latents: Iterable[Tensor]) -> LatentStatistics | None:
    """Returns mean and standard deviation per channel over all latents [C, F, H, W]; None if there are none. Latents
    with another number of channels than the first are left out."""
    total: Tensor | None = None
    count = 0
    for latent in latents:
        values = latent.double().flatten(1)
        sums = torch.stack([values.sum(1), values.square().sum(1)])
        if total is None or total.shape == sums.shape:
            total = sums if total is None else total + sums
            count += values.shape[1]
    if total is None:
        return None
    mean, square = total / count
    return LatentStatistics(tuple(mean.tolist()), tuple((square - mean.square()).clamp(min=0).sqrt().tolist()))


def distance(measured: LatentStatistics, form: LatentStatistics) -> float:
    """Returns the distance of measured statistics from those of a form; inf if a channel is constant."""
    if min(measured.std) <= 0:
        return math.inf
    channels = zip(measured.mean, measured.std, form.mean, form.std, strict=True)
    terms = [abs(m - mean) / std + abs(math.log(s / std)) for m, s, mean, std in channels]
    return sum(terms) / len(terms)


def _range(values: tuple[float, ...]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"
