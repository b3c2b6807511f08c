"""Two experts in one role: Wan2.2 A14B denoises high noise with one transformer and low noise with another.

A sample goes through `transformer` at timesteps of at least the boundary, and through `transformer_2` below it. So a
role has twice the parameters of one network and the FLOPs of one. Samples and ranks differ in their timesteps, but with
sharded weights all ranks must run the same forwards. Two rules ensure this:

- *Without gradients* ranks find out which experts any rank needs, and all ranks run those. This takes one all-reduce of
  two numbers between hosts. No host waits for its GPU, because noise levels are on the host. All samples have the same
  noise level in a step of a rollout or of sampling, so only one expert runs and only its weights are gathered.
- *With gradients* all ranks always run both experts. If an expert did not run in the last micro-batch, the gradients
  that it accumulated in earlier ones would never be reduced. An expert without a sample in a global batch has a zero
  gradient in every layout.

A rank that must run an expert for which it has no sample runs it on the first latent frame of any sample (on the whole
sample if ranks share its tokens) and ignores the result. At 480p these are 1/21 of the tokens. It also gathers the
weights and reduces zero gradients.

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
"""Flavors with two experts."""

Run = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""Function that runs one expert: (latents, noise levels, condition) -> velocity."""


def is_high_noise(sigma: Tensor, boundary_ratio: float) -> Tensor:
    """Returns a bool tensor [B] on the host: whether a sample belongs to `transformer`. As in diffusers, the boundary
    itself does.

    `sigma` is [B], or [B, F] if a given frame has less noise than the sample. The host waits only if `sigma` is on a
    GPU.
    """
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
    """Returns the velocity of each sample from its expert, in the order of the samples. Collective if there are several
    ranks.

    Args:
        experts: functions that run the high-noise and the low-noise expert.
        high_B: whether each sample belongs to the high-noise expert; on the host.
        x, sigma, condition: batch-first; sigma [B] or [B, F].
        run_both: whether to run both experts, as needed with gradients; see the module's docstring.
        dummy_frames: latent frames of the input of an expert that has no sample on this rank.
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
    """Returns the names of the role's networks, from its flavor or else from its weights. `by_name` uses the flavor
    without reading files. Raises ValueError for a flavor with one network and weights with two experts."""
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
    """Returns the timestep, as a share of 1000, at which the high-noise expert hands over to the low-noise one.

    It comes from pipeline_config.boundary_ratio, or from the model_index.json of a configured pipeline folder. None if
    no role has two experts.

    Args:
        pipeline: of the run.
        weights: of each role with two experts.
        by_name: return None if there is no file to read, see `experts_of`.

    Raises:
        ValueError: the boundary is unknown, contradictory, or set without effect.
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
