"""Faults that a parallel trainer is easily born with, one context manager each; the layout matrix must catch them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from titan_kernels import Tiles, tile_layout
from torch import Tensor, nn
from torch.autograd import forward_ad

import titan_distill.train
from titan_distill.attention import sharded
from titan_distill.attention.sharded import add_coarse
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.methods import losses
from titan_distill.models.wan import adapter, tensor_plan
from titan_distill.models.wan.layers import SelfAttention
from titan_distill.parallelisms import collectives, tensor
from titan_distill.parallelisms.sequence import token_bounds


def noise_keyed_by_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(titan_distill.train, "KeyedNoise", lambda seed: KeyedNoise(seed + dist.get_rank()))


def equal_noise_on_data_ranks(patch: pytest.MonkeyPatch) -> None:
    """Every rank draws for the first samples of a batch, whichever it has."""

    class Unkeyed(KeyedNoise):
        def normal(self, purpose: str, step: int, sample_ids: Sequence[int], *rest: Any, **options: Any) -> Tensor:
            return super().normal(purpose, step, range(len(sample_ids)), *rest, **options)

    patch.setattr(titan_distill.train, "KeyedNoise", Unkeyed)


def sequence_gradients_not_divided(patch: pytest.MonkeyPatch) -> None:
    """Every rank's gradient of a replicated result is whole; summing them makes one per rank too many."""
    _backward(patch, "gather", collectives._reduce_scatter)


def _backward(patch: pytest.MonkeyPatch, name: str, backward: Callable[..., Tensor]) -> None:
    patch.setitem(collectives.PAIRS, name, (collectives.PAIRS[name][0], backward))


def tangents_stay_where_they_are(patch: pytest.MonkeyPatch) -> None:
    apply = collectives._apply

    def forgetful(name: str, x: Tensor, *arguments: Any) -> Tensor:
        value, tangent = forward_ad.unpack_dual(x)
        if tangent is None or name != "all_to_all":
            return apply(name, x, *arguments)
        return forward_ad.make_dual(apply(name, value, *arguments), tangent.clone())

    patch.setattr(collectives, "_apply", forgetful)


def features_averaged_by_rank(patch: pytest.MonkeyPatch) -> None:
    """Each sequence rank judges its own tokens."""
    patch.setattr(adapter, "mean_over_tokens", lambda transformer, values_BL, x: values_BL.double().mean(1))


def norm_over_local_width(patch: pytest.MonkeyPatch) -> None:
    def forward(norm: nn.RMSNorm, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], tensor.local(norm.weight), norm.eps)

    patch.setattr(tensor, "_shared_rms_norm", forward)


def mean_of_means(patch: pytest.MonkeyPatch) -> None:
    """Each sequence rank averages over its own tokens, and the averages are averaged: runs of tokens are uneven."""

    def mean_per_sample(x: Tensor, mask: Tensor | None) -> Tensor:
        _, _, frames, height, width = x.shape
        layout = tile_layout((frames, height // 2, width // 2))
        bounds = token_bounds(layout, dist.get_world_size())
        by_token_BL = F.avg_pool3d(x, (1, 2, 2)).mean(dim=1).flatten(1)[:, layout.permutation]
        runs = [by_token_BL[:, start:end].mean(dim=1) for start, end in pairwise(bounds)]
        return torch.stack(runs).mean(dim=0)

    patch.setattr(losses, "_mean_per_sample", mean_per_sample)


def replicated_gradient_not_reduced(patch: pytest.MonkeyPatch) -> None:
    _backward(patch, "enter_parts", collectives._nothing)


def coarse_rows_of_the_next_tile(patch: pytest.MonkeyPatch) -> None:
    def shifted(fine: Tensor, coarse: Tensor | None, gate: Tensor | None, tiles: Tiles) -> Tensor:
        return add_coarse(fine, None if coarse is None else coarse.roll(-1, 1), gate, tiles)

    patch.setattr(sharded, "add_coarse", shifted)


def gate_outside_of_the_region(patch: pytest.MonkeyPatch) -> None:
    """The gate is made from replicated tokens, so that their gradient through it is only this rank's part."""

    def enter_region(module: nn.Module, region: tensor.Region) -> None:
        tensor.enter_region(module, region)
        if isinstance(module, SelfAttention):
            module.register_forward_pre_hook(gate_first, prepend=True)

    def gate_first(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BLM, context, to_gate = args
        return x_BLM, context, to_gate and (lambda entered: to_gate(x_BLM.to(entered.dtype)))

    patch.setattr(tensor_plan, "enter_region", enter_region)


MUTANTS = {
    mutant.__name__: mutant
    for mutant in (
        noise_keyed_by_rank,
        equal_noise_on_data_ranks,
        sequence_gradients_not_divided,
        tangents_stay_where_they_are,
        features_averaged_by_rank,
        norm_over_local_width,
        mean_of_means,
        replicated_gradient_not_reduced,
        coarse_rows_of_the_next_tile,
        gate_outside_of_the_region,
    )
}
