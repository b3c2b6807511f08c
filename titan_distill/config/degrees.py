"""Parallel degrees of the data loader and of every role, and the number of micro-batches, computed from the
configuration.

Ranks are laid out as `dp_replicate × dp_shard × sequence × tensor` with tensor innermost: ranks that communicate most
are neighbours and share a node. Everything here is arithmetic on the configuration and needs no process group. The
model family checks that the degrees fit each network, for instance that ranks divide its attention heads
(`ModelFamily.check_layouts`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from titan_distill.config.config import Config
from titan_distill.config.parsing import nearest_divisors, nearest_multiples
from titan_distill.config.role_sections import ParallelismConfig


@dataclass(frozen=True)
class Degrees:
    """The layout of one role. The product of the four degrees is the number of ranks of the run.

    Attributes:
        dp_replicate: replicas of the sharded weights (HSDP).
        dp_shard: ranks that load different samples and shard one replica of the weights (FSDP).
        sequence: ranks that share the tokens of a sample. They shard weights, too.
        tensor: ranks that share each weight matrix.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    sequence: int = 1
    tensor: int = 1

    @property
    def data_parallel(self) -> int:
        """Number of rank groups that load different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def model_parallel(self) -> int:
        """Number of ranks that share the same samples."""
        return self.sequence * self.tensor

    @property
    def world_size(self) -> int:
        """Number of ranks of the run."""
        return self.data_parallel * self.model_parallel

    def __str__(self) -> str:
        named = {
            "dp_replicate": self.dp_replicate,
            "FSDP": self.dp_shard,
            "sequence": self.sequence,
            "tensor": self.tensor,
        }
        return " × ".join(f"{name} {degree}" for name, degree in named.items() if degree > 1) or "unsharded"


@dataclass(frozen=True)
class RunLayout:
    """The layouts of the data and of all roles.

    Attributes:
        default: layout of the data. Ranks of one sequence × tensor group load the same samples.
        roles: layout of each role's network.
        num_micro_batches: micro-batches of local_batch_size samples that each rank runs per global batch.
        in_turn: roles that process the samples of one data group at a time, see `exchange_groups`.
    """

    default: Degrees
    roles: dict[str, Degrees]
    num_micro_batches: int
    in_turn: frozenset[str] = frozenset()


def resolve_layout(config: Config, world_size: int) -> RunLayout:
    """Resolves the layouts of the data and of all roles for `world_size` ranks.

    Raises ValueError, with the nearest valid choices, when the degrees do not multiply to the number of ranks, when a
    role's ranks do not fit the ranks that share samples, or when the batch does not split.
    """
    default = _resolve(config.parallelism, "parallelism", world_size)
    roles = {name: role_degrees(config, name, world_size) for name in config.roles}
    for name, degrees in roles.items():
        _check_data_group(name, degrees, default)
    in_turn = frozenset(name for name, role in config.roles.items() if role.parallelism.exchange_groups == "in_turn")
    return RunLayout(default, roles, _num_micro_batches(config, default), in_turn)


def role_degrees(config: Config, name: str, world_size: int) -> Degrees:
    """Resolves the layout of one role. Raises ValueError."""
    own = config.roles[name].parallelism
    return _resolve(own, "parallelism" if own == config.parallelism else f"roles.{name}.parallelism", world_size)


def needs_group(config: Config) -> bool:
    """Returns whether a single process needs a process group: FSDP implements mixed precision and offloading on one
    rank, too."""
    offloaded = any(role.parallelism.cpu_offload for role in config.roles.values())
    return config.training.dtype != "float32" or offloaded


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
        others = ", ".join(f"{name} = {degree}" for name, degree in fixed.items())
        raise ValueError(
            f"{key}.dp_shard = {shard} with {others} makes {shard * product} ranks, but the run has {world_size}; set "
            f"dp_shard to {available} or -1, or start {shard * product} ranks"
        )
    return Degrees(dp_shard=available, **fixed)


def _check_data_group(name: str, degrees: Degrees, default: Degrees) -> None:
    group, world_size = default.model_parallel, default.world_size
    if degrees.model_parallel % group == 0:
        return
    choices = [n for n in range(group, world_size + 1, group) if world_size % n == 0]
    nearest = sorted(choices, key=lambda n: abs(n - degrees.model_parallel))[:2]
    raise ValueError(
        f"roles.{name}.parallelism: sequence × tensor = {degrees.model_parallel} ranks is not a multiple of the "
        f"{group} ranks that share a sample in [parallelism]; choose {' or '.join(map(str, sorted(nearest)))}"
    )


def _num_micro_batches(config: Config, default: Degrees) -> int:
    training = config.training
    num_samples = training.local_batch_size * default.data_parallel
    if training.global_batch_size % num_samples:
        raise ValueError(
            f"training.global_batch_size = {training.global_batch_size} is not a multiple of local_batch_size × "
            f"data-parallel ranks = {training.local_batch_size} × {default.data_parallel} = {num_samples}; set it to "
            f"{nearest_multiples(training.global_batch_size, num_samples)}"
        )
    return training.global_batch_size // num_samples
