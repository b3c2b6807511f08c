"""Suggestions: overrides of a configuration that may lower its memory.

They do not change the mathematics of the training. Smaller videos or models are therefore not suggested.
"""

from __future__ import annotations

from collections.abc import Iterator

from titan_distill.config.config import Config
from titan_distill.config.text import toml_value
from titan_distill.planner.plan import Plan

Change = dict[str, bool | int | str]
"""Overrides of a configuration by dotted key."""


def describe(change: Change) -> str:
    """Returns a change as it would stand in the TOML file."""
    return ", ".join(f"{key} = {toml_value(value)}" for key, value in change.items())


def arguments(change: Change) -> list[str]:
    """Returns a change as command-line arguments."""
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in change.items()]


def changes(config: Config, plan: Plan) -> Iterator[Change]:
    """Yields changes to try on `config`. Some may be invalid for its models or its number of ranks."""
    yield from _accumulate_and_exchange(config, plan)
    yield from _recompute(config)
    yield from _shard(config, plan)
    yield from _split_roles(plan)
    yield from _split_samples(config, plan)
    yield from _offload(config)


def _accumulate_and_exchange(config: Config, plan: Plan) -> Iterator[Change]:
    if plan.layout.num_micro_batches > 1 and config.training.reduce_gradients == "last":
        yield {"training.reduce_gradients": "every"}
    for role in plan.roles.values():
        if role.num_exchanged > role.num_turns:
            yield {f"roles.{role.name}.parallelism.exchange_groups": "in_turn"}


def _recompute(config: Config) -> Iterator[Change]:
    section = config.activation_checkpoint
    if section.skip_interval:
        yield {"activation_checkpoint.skip_interval": 0}
    if section.mode == "none":
        yield {"activation_checkpoint.mode": "selective"}
    if section.mode == "selective" and section.store_hidden:
        yield {"activation_checkpoint.store_hidden": False}
    if section.mode != "full":
        full: Change = {"activation_checkpoint.mode": "full"}
        if section.selective_interval is not None:
            full["activation_checkpoint.selective_interval"] = "none"
        if not section.store_hidden:
            full["activation_checkpoint.store_hidden"] = True
        yield full


def _shard(config: Config, plan: Plan) -> Iterator[Change]:
    if not config.parallelism.reshard_after_forward:
        yield {"parallelism.reshard_after_forward": True}
    replicas = plan.layout.default.dp_replicate
    while replicas > 1:
        replicas = next(n for n in range(replicas - 1, 0, -1) if replicas % n == 0)
        yield {"parallelism.dp_replicate": replicas, "parallelism.dp_shard": -1}


def _split_roles(plan: Plan) -> Iterator[Change]:
    """Yields changes that shard one role's weights over more ranks, larger roles first."""
    for role in sorted(plan.roles.values(), key=lambda role: -role.weights.total):
        for tensor in (2, 4, 8):
            if tensor > role.degrees.tensor:
                yield {f"roles.{role.name}.parallelism.tensor": tensor}


def _split_samples(config: Config, plan: Plan) -> Iterator[Change]:
    if config.training.local_batch_size % 2 == 0:
        yield {"training.local_batch_size": config.training.local_batch_size // 2}
    for sequence in (2, 4, 8):
        if sequence > plan.layout.default.sequence:
            yield {"parallelism.sequence": sequence, "parallelism.dp_shard": -1}


def _offload(config: Config) -> Iterator[Change]:
    for name, role in config.roles.items():
        if not (role.trainable or role.parallelism.cpu_offload):
            yield {f"roles.{name}.parallelism.cpu_offload": True}
    if not config.parallelism.cpu_offload:
        yield {"parallelism.cpu_offload": True}
