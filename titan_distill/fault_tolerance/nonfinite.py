"""Updates whose loss or gradient is not finite: they end the run, or are left out.

The flag is reduced with the sums of the update, before the optimizer step, so all ranks do the same: NaN in one rank's
copy of a gradient must not send ranks different ways. A second exchange, which happens once, tells who saw it.
Nothing is repaired: `nan_to_num` on gradients would train on made-up numbers and hide the fault.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A loss or gradient norm is not finite; raised on all ranks before the optimizer could spread it."""


def count_nonfinite(losses_N: Tensor, grad_norm: float) -> Tensor:
    """Returns the count of this rank's numbers that are not finite: [] fp64 on the losses' device, without waiting."""
    return (~losses_N.isfinite()).sum().double() + (not math.isfinite(grad_norm))


def describe_nonfinite(role: str, step: int, sample_ids: list[int], losses_N: Tensor, grad_norm: float) -> str:
    """Returns one sentence, equal on all ranks, with role, step and samples of the ranks that saw it. Collective."""
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
    """Returns when the update may be left out, as the role's skip number `num_skips`; else raises NonFiniteError."""
    if num_skips > max_skips:
        allowed = f"; {max_skips} such updates were allowed and skipped" if max_skips else ""
        raise NonFiniteError(
            f"{sentence}{allowed}. Nothing was updated; lower the learning rate, look at these samples, or raise "
            "training.max_nonfinite_skips to leave such updates out"
        )
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning("%s. This update is skipped (%d of at most %d)", sentence, num_skips, max_skips)
