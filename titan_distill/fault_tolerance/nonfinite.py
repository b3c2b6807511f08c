"""Handling of updates whose loss or gradient is not finite: they end the run or are skipped.

Before the optimizer step, ranks reduce the number of non-finite values together with the sums of the update. All ranks
therefore make the same decision, even if only one of them has a NaN. When there is one, a second collective tells all
ranks which ranks saw it. Nothing is repaired: `nan_to_num` on gradients would train on made-up numbers and hide the
fault.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A loss or gradient norm is not finite. All ranks raise this error before the optimizer step."""


def count_nonfinite(losses_N: Tensor, grad_norm: Tensor) -> Tensor:
    """Returns the number of this rank's losses and norms that are not finite, as a scalar fp64 tensor on their device;
    the host does not wait."""
    return (~losses_N.isfinite()).sum().double() + ~grad_norm.isfinite()


def describe_nonfinite(role: str, step: int, sample_ids: list[int], losses_N: Tensor, grad_norm: float) -> str:
    """Returns a sentence that names role, step (counted from 1), and the samples of the ranks with non-finite values.
    Collective; the result is equal on all ranks."""
    bad = [sample for sample, finite in zip(sample_ids, losses_N.isfinite().tolist(), strict=True) if not finite]
    found: list[Any] = [(bad, sample_ids, grad_norm)]
    if dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, (bad, sample_ids, grad_norm))
    if losses := [f"rank {rank}, samples {bad}" for rank, (bad, _, _) in enumerate(found) if bad]:
        return f"loss/{role} is not finite at step {step}: {'; '.join(losses)}"
    # Gradients are summed over ranks before anyone looks at them: whose it was can no longer be told.
    ranks = [rank for rank, (_, _, norm) in enumerate(found) if not math.isfinite(norm)]
    samples = sorted({sample for _, ids, _ in found for sample in ids})
    return (
        f"grad_norm/{role} is not finite at step {step} on ranks {ranks}, though the losses of its samples {samples} "
        "are"
    )


def skip_or_raise(sentence: str, num_skips: int, max_skips: int) -> None:
    """Raises NonFiniteError if the update may not be skipped.

    `num_skips` counts the role's skips, this one included; at most `max_skips` are allowed.
    """
    if num_skips > max_skips:
        allowed = f"; {max_skips} such updates were allowed and skipped" if max_skips else ""
        raise NonFiniteError(
            f"{sentence}{allowed}. Nothing was updated; lower the learning rate, look at these samples, or raise "
            "training.max_nonfinite_skips to leave such updates out"
        )
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning("%s. This update is skipped (%d of at most %d)", sentence, num_skips, max_skips)
