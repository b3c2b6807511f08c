"""Held-out loss: the method's own losses and metrics on rows that the run does not train on.

The loss of a training step says little, because each step has other rows, other noise levels and other noise. Here all
three are fixed: the first rows of `validation.data`, and noise that depends on `validation.seed`, the row and the draw,
but not on the step (`FixedNoise`). So the curve moves only when the weights do. Where it turns up while the training
loss goes on falling, the run memorises its data. The losses are those of the trained weights, without EMA, as training
logs them.

Every method has a held-out loss, but not every loss is one to be read. Those of distribution matching (dmd2's student)
and of continuous-time consistency (scm) are surrogates whose values say nothing about convergence; their metrics do,
`dmd/gradient_size` and `scm/tangent_size`, and so do the losses of critic and discriminator.

Each data group measures an equal number of rows (the last ones may be repetitions, which count nothing), because with
sharded weights a forward pass is a collective. Sums are divided by the number of rows, so the layout does not change
the result. Nothing is kept from one validation to the next: a resumed run measures what the first one would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from titan_distill.config.config import Config
from titan_distill.config.paths import of_key
from titan_distill.config.sections import DataConfig
from titan_distill.data.loader import Batch, collate_rows
from titan_distill.data.rows import BadRowError, RowDataset
from titan_distill.data.tables import listed
from titan_distill.diffusion.noise import FixedNoise
from titan_distill.diffusion.transfer import to_device
from titan_distill.fault_tolerance.ranks import Ranks
from titan_distill.methods.base import TrainingMethod
from titan_distill.models.base import Adapter
from titan_distill.observability.timing import PhaseTimer
from titan_distill.parallelisms.mesh import Layouts, sum_over_samples
from titan_distill.roles import RoleManager

HELD_OUT = "validation.data"
"""Configuration key of the rows."""


def held_out_section(config: Config) -> DataConfig:
    """Returns the section [data] with the held-out rows in the place of the training data."""
    return replace(config.data, path=config.validation.data, sources=())


def check_held_out(config: Config, rows: RowDataset[Any], training: RowDataset[Any]) -> None:
    """Raises ValueError for held-out rows that cannot be used, or that are training data: a file of it, or a copy.
    Footage is read by the first validation, because decoding takes a second or more."""
    shared = sorted(rows.files & training.files)
    if shared or rows.set_digests & training.set_digests:
        raise ValueError(
            f"{HELD_OUT} = {config.validation.data!r} holds {listed(shared) or 'files'} that the run trains on; name "
            "rows that are left out of it"
        )
    if config.data.holds_videos:
        return
    with of_key(HELD_OUT, config.validation.data):
        for index in range(_num_rows(config, rows)):
            rows.read(index)


def _num_rows(config: Config, rows: RowDataset[Any]) -> int:
    return min(config.validation.num_rows, len(rows))


class HeldOutLoss:
    """Measures the losses of all roles on the held-out rows. All ranks must call its methods.

    Attributes:
        poll: function called before every micro-batch, on all ranks. It raises StopRequested on all ranks if one of
            them was asked to stop. The trainer sets it.
    """

    def __init__(
        self,
        config: Config,
        rows: RowDataset[Any],
        method: TrainingMethod,
        adapter: Adapter,
        layouts: Layouts,
        ranks: Ranks,
    ) -> None:
        self.config, self.rows, self.method, self.adapter = config, rows, method, adapter
        self.layouts, self.ranks, self.num_rows = layouts, ranks, _num_rows(config, rows)
        self.poll: Callable[[], None] = lambda: None

    @torch.no_grad()
    def measure(self, step: int, roles: RoleManager) -> dict[str, float]:
        """Returns the means over rows and draws after `step` training steps, on all ranks: `loss/<role>` and the
        method's metrics. Raises BadRowError on all ranks for a row that cannot be used."""
        self.adapter.start_step(roles, step)
        totals: dict[str, Tensor] = {}
        for indices in self._by_shape():
            for name, total in self._totals(indices, step):
                totals[name] = totals[name] + total if name in totals else total
        summed = sum_over_samples(torch.stack([*totals.values()]), self.layouts.data_group)
        num_draws = self.num_rows * self.method.num_held_out_draws
        return dict(zip(totals, (summed / num_draws).tolist(), strict=True))

    def _by_shape(self) -> list[list[int]]:
        """Returns the rows of each bucket: all ranks compute on one shape at a time, as in training."""
        found: dict[tuple[int, ...] | None, list[int]] = {}
        for index in range(self.num_rows):
            found.setdefault(self.rows.shape(index), []).append(index)
        return [*found.values()]

    def _totals(self, indices: list[int], step: int) -> Iterator[tuple[str, Tensor]]:
        """Yields the sums over this data group's share of rows of one shape, for each draw and update."""
        batches, weights = self._load(indices)
        self.adapter.use_shape(batches[0])
        timer, mean = PhaseTimer(self.layouts.device), partial(self._mean, len(indices), torch.cat(weights))
        for draw in range(self.method.num_held_out_draws):
            method = self.method.measured_with(FixedNoise(self.config.validation.seed, draw), timer)
            for update in method.held_out_updates(step):
                prepared = batches if update.prepare is None else update.prepare(batches, step, mean)
                for batch, weight_B in zip(prepared, weights, strict=True):
                    self.poll()
                    result = update.loss(batch, step)
                    for name, value_B in {f"loss/{update.role}": result.losses_B, **result.metrics_B}.items():
                        yield name, (value_B.double() * weight_B).sum()

    def _load(self, indices: list[int]) -> tuple[list[Batch], list[Tensor]]:
        """Returns this data group's share of rows in micro-batches, on the device, and the weight of each sample: 1, or
        0 for a repetition."""
        num_rows, size = len(indices), self.config.training.local_batch_size
        num_own = -(-num_rows // self.layouts.num_data_groups)
        first, batches, weights = self.layouts.data_rank * num_own, [], []
        for start in range(first, first + num_own, size):
            positions = range(start, min(start + size, first + num_own))
            rows = [indices[position % num_rows] for position in positions]
            batch = self.ranks.together(partial(self._read, rows))
            batches.append(self.adapter.share_batch(batch))
            counts = torch.tensor([float(position < num_rows) for position in positions], dtype=torch.float64)
            weights.append(to_device(counts, self.layouts.device))
        return batches, weights

    def _read(self, indices: list[int]) -> Batch:
        try:
            rows = [self.rows[index] for index in indices]
            batch = collate_rows(indices, rows, self.config.data.max_text_tokens)
            return self.adapter.prepare_batch(replace(batch, latent_shape=self.rows.shape(indices[0])))
        except ValueError as error:
            raise BadRowError(f"{HELD_OUT}: {error}") from error

    def _mean(self, num_rows: int, weight_N: Tensor, values_N: Tensor) -> Tensor:
        """Returns the mean over all held-out rows of one shape of values [N, ...], see `GlobalMean`."""
        weights = weight_N.view(-1, *[1] * (values_N.ndim - 1))
        total = sum_over_samples((values_N.double() * weights).sum(0), self.layouts.data_group)
        return total / num_rows
