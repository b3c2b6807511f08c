"""Two experts in one role: Wan2.2 A14B denoises high noise with one transformer and low noise with another.

A sample goes through `transformer` at timesteps of at least the boundary, through `transformer_2` below it. So a role
holds twice the parameters of one network and runs the FLOPs of one. Samples of a batch differ in their timesteps, and
so do ranks, but with sharded weights a forward is something that all ranks do together. Two rules keep them together:

- *Without gradients* ranks tell each other which experts anyone needs, and all run those: one all-reduce of two
  numbers between hosts, of which none waits for its GPU, because noise levels are on the host. Steps of a rollout or of
  a sampling share one noise level: they run one expert, and never gather the weights of the other.
- *With gradients* all run both, always: weights that were left out of the last micro-batch would never reduce what
  earlier ones had accumulated. An expert without any sample in a global batch has a gradient of zero, whatever the
  layout.

A rank that must run an expert for which it has no sample gives it the first latent frame of one (the whole sample,
where ranks share its tokens), of which nothing is used: at 480p 1/21 of the tokens. The rest is the price of
sharding: the weights are gathered, and zero gradients reduced.

Shapes: B samples, N those of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from titan_distill.checkpoint.diffusers_folder import PIPELINE_INDEX
from titan_distill.config.role_sections import RoleConfig
from titan_distill.diffusion.schedule import NUM_TRAIN_TIMESTEPS, timestep
from titan_distill.diffusion.transfer import to_device
from titan_distill.models.wan.pipeline_config import WanPipelineConfig
from titan_distill.models.wan.pipeline_index import BOUNDARY, read_index
from titan_distill.models.wan.stored import EXPERTS, StoredWeights

TWO_EXPERTS = frozenset({"A14B", "A14B-I2V", "tiny-A14B"})
"""Flavors with both."""

Run = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""Velocity of one expert from latents, noise levels and condition."""


def is_high_noise(sigma: Tensor, boundary_ratio: float) -> Tensor:
    """[B] bool, on the host: which samples `transformer` is for. As in diffusers, the boundary itself is. `sigma` is
    [B], or [B, F] where a given frame has less noise than the sample; the host waits for it only if it is on a GPU."""
    sigma_B = sigma.detach() if sigma.ndim == 1 else sigma.detach().amax(1)
    return timestep(sigma_B.cpu()) >= boundary_ratio * NUM_TRAIN_TIMESTEPS


def route(
    experts: tuple[Run, Run],
    high_B: Tensor,
    x: Tensor,
    sigma: Tensor,
    condition: Mapping[str, Tensor],
    *,
    run_both: bool,
    dummy_frames: int,
) -> Tensor:
    """The velocity of each sample from its expert, in the order of the samples. Collective where there are ranks.

    Args:
        experts: for high noise, for low noise.
        high_B: which samples are the first one's; on the host.
        x, sigma, condition: batch-first; sigma [B] or [B, F].
        run_both: with gradients; see the module's docstring.
        dummy_frames: latent frames of what an expert gets that has no sample here.
    """
    rows = [mask_B.nonzero().flatten() for mask_B in (high_B, ~high_B)]
    needed = (True, True) if run_both else _needed_by_anyone(rows)
    parts, nothing = [], x.new_zeros(())
    for run, own_N, is_needed in zip(experts, rows, needed, strict=True):
        if len(own_N):
            own_N, levels = to_device(own_N, x.device), sigma[to_device(own_N, sigma.device)]
            parts.append(run(x[own_N], levels, {name: value[own_N] for name, value in condition.items()}))
        elif is_needed:
            first = {name: value[:1] for name, value in condition.items()}
            level = sigma[:1] if sigma.ndim == 1 else sigma[:1, :dummy_frames]
            unused = run(x[:1, :, :dummy_frames], level, first)
            # The sum of no number: it is zero, and so are its gradients, but a backward passes through the expert.
            nothing = nothing + unused.flatten()[:0].sum()
    return torch.cat(parts)[to_device(torch.cat(rows).argsort(), x.device)] + nothing


def _needed_by_anyone(rows: list[Tensor]) -> tuple[bool, ...]:
    needed = torch.tensor([len(own_N) for own_N in rows])
    if dist.is_initialized():  # on the CPU, hence over gloo
        dist.all_reduce(needed, op=dist.ReduceOp.MAX)
    return tuple(count > 0 for count in needed.tolist())


def experts_of(name: str, role: RoleConfig, stored: StoredWeights | None, *, by_name: bool) -> tuple[str, ...]:
    """Names of the role's networks: by its flavor, or else by its weights, where it has some. `by_name` believes a
    flavor without reading any file. Raises ValueError for one network from two experts."""
    if role.flavor in TWO_EXPERTS:
        return EXPERTS
    if stored is None or (role.flavor and by_name):
        return EXPERTS[:1]
    if role.flavor and len(stored.experts) > 1:
        raise ValueError(
            f"roles.{name}.flavor = {role.flavor!r} is one network, but {stored.weights} has two experts; name one of "
            f"its folders, {' or '.join(EXPERTS)}, or choose one of the flavors {', '.join(sorted(TWO_EXPERTS))}"
        )
    return stored.experts


def find_boundary(pipeline: WanPipelineConfig, weights: Mapping[str, str], *, by_name: bool = False) -> float | None:
    """The timestep, as a share of 1000, at which the high-noise expert hands over to the low-noise one: from
    pipeline_config.boundary_ratio, or from the model_index.json of a pipeline folder that is named; None where no role
    has two experts.

    Args:
        pipeline: of the run.
        weights: of each role with two experts.
        by_name: the answer may be None because no file was there to be asked, see `experts_of`.

    Raises:
        ValueError: a boundary that is unknown, contradictory or of no use.
    """
    if not weights:
        for key in ("boundary_ratio", "guidance_scale_2"):
            if getattr(pipeline, key) is not None:
                raise ValueError(
                    f"pipeline_config.{key} = {getattr(pipeline, key)} has no effect, because no role has two experts; "
                    "remove it"
                )
        return None
    if pipeline.boundary_ratio is not None:
        return pipeline.boundary_ratio
    stated = {folder: _stated_boundary(folder) for folder in (*weights.values(), pipeline.path)}
    found = {folder: value for folder, value in stated.items() if value is not None}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{value} in {folder}" for folder, value in found.items())
        raise ValueError(f"the pipelines' boundaries differ ({listed}); set pipeline_config.boundary_ratio")
    if not found and not by_name:
        raise ValueError(
            f"roles.{next(iter(weights))} has two experts, but no {PIPELINE_INDEX} says where the second one takes "
            "over; set pipeline_config.boundary_ratio (Wan2.2: 0.875 for text, 0.9 for images)"
        )
    return next(iter(found.values()), None)


def _stated_boundary(folder: str) -> float | None:
    stated = read_index(folder).get(BOUNDARY)
    if stated is None:
        return None
    if not isinstance(stated, (int, float)) or not 0 < stated < 1:
        raise ValueError(
            f"{folder}/{PIPELINE_INDEX} has {BOUNDARY} = {stated!r}, which is not a share between 0 and 1; correct it"
        )
    return float(stated)
