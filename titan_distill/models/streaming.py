"""Interface for generating a sequence segment by segment with a causal role.

A sample is a sequence along one dim of its latents, cut into *segments*. A `SegmentStream` goes through them in order.
It predicts the current segment given the *context* of all finished segments. The caller tells it when a segment is
finished, and the noise level of its context. Training and sampling use only this interface. They need not know the
contents of segments and contexts (in a video transformer: frames, and the keys and values of every layer).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from titan_distill.diffusion import schedule


class SegmentStream(ABC):
    """A batch of sequences in progress. Segments are [B, ...], shorter than a sample along the sequence's dim."""

    @abstractmethod
    def predict_velocity(self, x: Tensor, sigma_B: Tensor) -> Tensor:
        """Returns the velocity of the current segment `x` at noise level `sigma_B`, in shape and dtype of `x`.

        Gradients reach the weights through this forward alone, never through the context.
        """

    def predict_x0(self, x: Tensor, sigma_B: Tensor) -> Tensor:
        """Returns the x0 prediction of the current segment."""
        return schedule.x0_from_velocity(x, self.predict_velocity(x, sigma_B), sigma_B)

    @torch.no_grad()
    def write(self, x: Tensor, sigma_B: Tensor) -> None:
        """Adds a finished segment, noised to `sigma_B`, to the context. The following segment becomes the current
        one."""
        self._write(x.detach(), sigma_B)

    @abstractmethod
    def _write(self, x: Tensor, sigma_B: Tensor) -> None:
        """Does the work of `write`; runs without gradients."""


def write_context(stream: SegmentStream, x0: Tensor, sigma: float, noise: Callable[[], Tensor]) -> None:
    """Finishes a segment and writes its context at the noise level `sigma`. `noise` is called only if `sigma` is above
    0."""
    sigma_B = torch.full((len(x0),), sigma, dtype=torch.float64)
    stream.write(schedule.add_noise(x0, noise(), sigma_B) if sigma else x0, sigma_B)
