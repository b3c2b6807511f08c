"""What a configuration means for a given number of ranks: every layout's degrees, and how the batch splits.

Everything here is arithmetic on the configuration, done before any process group exists; what depends on a model's
heads or tokens is checked by its family (`ModelFamily.check_layouts`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from titan_distill.config.degrees import Degrees
from titan_distill.config.parsing import ConfigError, nearest_divisors, nearest_multiples
from titan_distill.config.sections import ParallelismConfig

if TYPE_CHECKING:
    from titan_distill.config.config import Config


@dataclass(frozen=True)
class RunLayout:
    """All layouts of a run, with every -1 resolved.

    Attributes:
        default: of the data: ranks of one sequence × tensor group load the same samples.
        roles: of each role's network.
        num_micro_batches: micro-batches of local_batch_size that each rank runs for one global batch.
    """

    default: Degrees
    roles: dict[str, Degrees]
    num_micro_batches: int


def role_parallelism(config: Config, name: str) -> ParallelismConfig:
    """[parallelism] with the role's own table laid over it."""
    return config.roles[name].parallelism.applied_to(config.parallelism)


def role_degrees(config: Config, name: str, world_size: int) -> Degrees:
    """The resolved layout of one role. Raises ConfigError."""
    own = role_parallelism(config, name)
    key = f"roles.{name}.parallelism" if own != config.parallelism else "parallelism"
    return _resolve(own, key, world_size)


def needs_group(config: Config) -> bool:
    """Whether a single process needs a process group: mixed precision and offloading are FSDP's, which works on one."""
    offloaded = any(role_parallelism(config, name).cpu_offload for name in config.roles)
    return config.training.dtype != "float32" or offloaded


def check_world(config: Config, world_size: int) -> RunLayout:
    """Resolves all layouts for ``world_size`` ranks.

    Raises ConfigError, with the nearest valid choices, when degrees do not multiply to it, a role's ranks do not fit
    those that share samples, or the batch does not split.
    """
    try:
        default = _resolve(config.parallelism, "parallelism", world_size)
        roles = {name: role_degrees(config, name, world_size) for name in config.roles}
        for name, degrees in roles.items():
            _check_data_group(name, degrees, default, world_size)
        return RunLayout(default, roles, _num_micro_batches(config, default))
    except ValueError as error:
        raise ConfigError(f"{config.job.config_file or 'command line'}: {error}") from error


def _resolve(parallelism: ParallelismConfig, key: str, world_size: int) -> Degrees:
    fixed = {name: getattr(parallelism, name) for name in ("dp_replicate", "sequence", "tensor")}
    product, shard = math.prod(fixed.values()), parallelism.dp_shard
    if world_size % product:
        asked = {name: degree for name, degree in fixed.items() if degree > 1}
        if len(asked) == 1:
            ((name, degree),) = asked.items()
            raise ValueError(
                f"{key}.{name} = {degree} does not divide the number of ranks, {world_size}; set it to "
                f"{nearest_divisors(degree, world_size)}"
            )
        terms = " × ".join(f"{name} {degree}" for name, degree in asked.items())
        raise ValueError(
            f"{key}: {terms} = {product} does not divide the number of ranks, {world_size}; choose degrees whose "
            f"product is {nearest_divisors(product, world_size)}, or start {nearest_multiples(world_size, product)}"
        )
    available = world_size // product
    if shard not in (-1, available):
        raise ValueError(
            f"{key}.dp_shard = {shard} with {_others(fixed)} makes {shard * product} ranks, but the run has "
            f"{world_size}; set dp_shard to {available} or -1, or start {shard * product} ranks"
        )
    return Degrees(fixed["dp_replicate"], available, fixed["sequence"], fixed["tensor"])


def _others(fixed: dict[str, int]) -> str:
    return ", ".join(f"{name} = {degree}" for name, degree in fixed.items())


def _check_data_group(name: str, degrees: Degrees, default: Degrees, world_size: int) -> None:
    group = default.model_parallel
    if degrees.model_parallel % group == 0:
        return
    choices = [n for n in range(group, world_size + 1, group) if world_size % n == 0]
    nearest = sorted(choices, key=lambda n: abs(n - degrees.model_parallel))[:2]
    raise ValueError(
        f"roles.{name}.parallelism: sequence × tensor = {degrees.model_parallel} ranks is no multiple of the {group} "
        f"ranks that share a sample in [parallelism]; choose {' or '.join(map(str, sorted(nearest)))}"
    )


def _num_micro_batches(config: Config, default: Degrees) -> int:
    training = config.training
    num_samples = training.local_batch_size * default.data_parallel
    if training.global_batch_size % num_samples:
        raise ValueError(
            f"training.global_batch_size = {training.global_batch_size} is no multiple of local_batch_size × "
            f"data-parallel ranks = {training.local_batch_size} × {default.data_parallel} = {num_samples}; set it to "
            f"{nearest_multiples(training.global_batch_size, num_samples)}"
        )
    return training.global_batch_size // num_samples
