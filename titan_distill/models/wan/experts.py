"""Two experts in one role: Wan2.2 A14B denoises high noise with one transformer and low noise with another.

A sample goes through `transformer` at timesteps of at least the boundary, through `transformer_2` below it. So a role
holds twice the parameters of one network and does the work of one. Samples of a batch differ in their timesteps, and so
do ranks, but with sharded weights a forward is something that all ranks do together. Two rules keep them together:

- *Without gradients* ranks tell each other which experts anyone needs, and all run those: one all-reduce of two
  numbers between hosts, of which none waits for its GPU, because noise levels are on the host. Steps of a rollout or of
  a sampling share one noise level: they run one expert, and never gather the weights of the other.
- *With gradients* all run both, always: weights that were left out of the last micro-batch would never reduce what
  earlier ones had accumulated. An expert without any sample in a global batch has a gradient of zero, whatever the
  layout.

A rank that must run an expert for which it has no sample gives it the first latent frame of one (the whole sample,
where ranks share its tokens), of which nothing is used: at 480p 1/21 of the tokens. What remains is the price of
sharding: the weights are gathered, and zero gradients reduced.

Shapes: B samples, N those of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_distill.checkpoint.diffusers_folder import TRANSFORMER, TRANSFORMER_2, read_json
from titan_distill.checkpoint.initial_weights import is_reference, resolve_reference
from titan_distill.checkpoint.tools.export import BOUNDARY, PIPELINE_INDEX
from titan_distill.diffusion.schedule import NUM_TRAIN_TIMESTEPS, timestep
from titan_distill.diffusion.transfer import to_device

if TYPE_CHECKING:
    from titan_distill.config.config import Config
    from titan_distill.config.role_sections import RoleConfig

TWO_EXPERTS = frozenset({"A14B", "A14B-I2V", "tiny-A14B"})
"""Flavors with both."""

EXPERTS = (TRANSFORMER, TRANSFORMER_2)

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


def stored_experts(weights: str) -> tuple[str, ...]:
    """The experts that a folder, or a role in a checkpoint, holds."""
    if is_reference(weights):
        return tuple(resolve_reference(weights).trained.modules)
    return EXPERTS if (Path(weights) / TRANSFORMER_2).is_dir() else EXPERTS[:1]


def experts_of(name: str, role: RoleConfig, *, by_name: bool) -> tuple[str, ...]:
    """Names of the role's networks: by its flavor, or else by its weights. ``by_name`` believes a flavor without
    reading any file. Raises ValueError for one network from two experts."""
    weights = role.path or role.init_from
    if role.flavor in TWO_EXPERTS:
        return EXPERTS
    if role.flavor and by_name:
        return EXPERTS[:1]
    found = stored_experts(weights) if weights else EXPERTS[:1]
    if role.flavor and len(found) > 1:
        raise ValueError(
            f"roles.{name}.flavor = {role.flavor!r} is one network, but {weights} has two experts; name one of its "
            f"folders, {TRANSFORMER} or {TRANSFORMER_2}, or choose one of the flavors {', '.join(sorted(TWO_EXPERTS))}"
        )
    return found


def find_boundary(config: Config, *, by_name: bool = False) -> float | None:
    """Boundary of the two experts as a share of the timesteps: pipeline_config.boundary_ratio, or what the
    model_index.json of a pipeline folder that is named says; None where no role has two experts.

    ``by_name``: as in `experts_of`; then the answer may be None because no file was there to be asked. Raises
    ValueError for a boundary that is unknown, contradictory or of no use.
    """
    pipeline = config.pipeline_config
    roles = {n: r for n, r in config.roles.items() if len(experts_of(n, r, by_name=by_name)) > 1}
    if not roles:
        for key in ("boundary_ratio", "guidance_scale_2"):
            if getattr(pipeline, key) is not None:
                raise ValueError(
                    f"pipeline_config.{key} = {getattr(pipeline, key)} has no effect, because no role has two experts; "
                    "remove it"
                )
        return None
    if pipeline.boundary_ratio is not None:
        return pipeline.boundary_ratio
    folders = [*(role.path or role.init_from for role in roles.values()), pipeline.path]
    found = dict(_stated_boundaries(folders))
    if len(set(found.values())) > 1:
        stated = ", ".join(f"{value} in {folder}" for folder, value in found.items())
        raise ValueError(f"the pipelines' boundaries differ ({stated}); set pipeline_config.boundary_ratio")
    if not found and not by_name:
        raise ValueError(
            f"roles.{next(iter(roles))} has two experts, but no {PIPELINE_INDEX} says where the second one takes over; "
            "set pipeline_config.boundary_ratio (Wan2.2: 0.875 for text, 0.9 for images)"
        )
    return next(iter(found.values()), None)


def _stated_boundaries(folders: list[str]) -> Iterator[tuple[str, float]]:
    for folder in folders:
        index = Path(folder) / PIPELINE_INDEX
        if folder and not is_reference(folder) and index.is_file():
            stated: Any = read_json(index).get(BOUNDARY)
            if stated is not None:
                if not isinstance(stated, (int, float)) or not 0 < stated < 1:
                    raise ValueError(
                        f"{index} has {BOUNDARY} = {stated!r}, which is no share between 0 and 1; correct it"
                    )
                yield folder, float(stated)
