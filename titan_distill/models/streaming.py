"""A sequence made piece by piece: what a causal role offers to those who unroll it.

A sample is a sequence along one dim of its latents, cut into *segments*. A `SegmentStream` walks through them: it
predicts the segment at hand given the *context* of all finished ones, and is told when a segment is finished, at which
noise level its context shall be read. That is all that training and sampling need, so they know neither what a segment
is nor what a context is made of (for a video transformer: frames, and the keys and values of every layer).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from titan_distill.diffusion import schedule


class SegmentStream(ABC):
    """One batch of sequences under way. Segments are [B, ...], shorter than a sample along the sequence's dim."""

    @abstractmethod
    def predict_velocity(self, x: Tensor, sigma_B: Tensor) -> Tensor:
        """The velocity of the next segment at noise level `sigma_B`; shape and dtype of `x`.

        Gradients reach the weights through this forward alone, never through the context.
        """

    def predict_x0(self, x: Tensor, sigma_B: Tensor) -> Tensor:
        """The clean next segment."""
        return schedule.x0_from_velocity(x, self.predict_velocity(x, sigma_B), sigma_B)

    @torch.no_grad()
    def write(self, x: Tensor, sigma_B: Tensor) -> None:
        """Adds a finished segment, noised to `sigma_B`, to the context; the one after it is the next from now on."""
        self._write(x.detach(), sigma_B)

    @abstractmethod
    def _write(self, x: Tensor, sigma_B: Tensor) -> None:
        """`write`, without gradients."""


def write_context(stream: SegmentStream, x0: Tensor, sigma: float, noise: Callable[[], Tensor]) -> None:
    """Finishes a segment whose context is read at the noise level `sigma`; `noise` is asked for only above 0."""
    sigma_B = torch.full((len(x0),), sigma, dtype=torch.float64)
    stream.write(schedule.add_noise(x0, noise(), sigma_B) if sigma else x0, sigma_B)
