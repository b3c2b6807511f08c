"""What could be changed in a configuration so that it needs less memory: candidates, to be planned and compared.

Only changes that leave the training's mathematics alone are proposed; smaller videos or models are not ours to suggest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from titan_distill.planner.plan import Plan

if TYPE_CHECKING:
    from titan_distill.config.config import Config


@dataclass(frozen=True)
class Change:
    """One candidate, in the words of the TOML file."""

    text: str
    config: Config


def changes(config: Config, plan: Plan) -> Iterator[Change]:
    """Candidates for ``config``; not all of them are valid for its models and number of ranks."""
    yield from _recompute(config)
    yield from _shard(config, plan)
    yield from _split_roles(config, plan)
    yield from _split_samples(config, plan)
    yield from _offload(config)


def _recompute(config: Config) -> Iterator[Change]:
    section = config.activation_checkpoint
    if section.skip_interval:
        yield Change("activation_checkpoint.skip_interval = 0", _with_checkpointing(config, skip_interval=0))
    if section.mode == "none":
        yield Change("activation_checkpoint.mode = 'selective'", _with_checkpointing(config, mode="selective"))
    if section.mode != "full":
        full = _with_checkpointing(config, mode="full", selective_interval=None)
        yield Change("activation_checkpoint.mode = 'full'", full)


def _shard(config: Config, plan: Plan) -> Iterator[Change]:
    if not config.parallelism.reshard_after_forward:
        yield _parallelism(config, reshard_after_forward=True)
    replicas = plan.layout.default.dp_replicate
    while replicas > 1:
        replicas = next(n for n in range(replicas - 1, 0, -1) if replicas % n == 0)
        yield _parallelism(config, dp_replicate=replicas, dp_shard=-1)


def _split_roles(config: Config, plan: Plan) -> Iterator[Change]:
    """Larger roles first: more ranks for the weights of one."""
    order = sorted(plan.roles.values(), key=lambda role: -role.weights.total)
    for role in order:
        for tensor in (2, 4, 8):
            if tensor > role.degrees.tensor:
                yield _role(config, role.name, tensor=tensor)


def _split_samples(config: Config, plan: Plan) -> Iterator[Change]:
    training = config.training
    if training.local_batch_size % 2 == 0:
        half = replace(config, training=replace(training, local_batch_size=training.local_batch_size // 2))
        yield Change(f"training.local_batch_size = {training.local_batch_size // 2}", half)
    for sequence in (2, 4, 8):
        if sequence > plan.layout.default.sequence:
            yield _parallelism(config, sequence=sequence, dp_shard=-1)


def _offload(config: Config) -> Iterator[Change]:
    for name, role in config.roles.items():
        if not role.trainable and not role.parallelism.cpu_offload:
            yield _role(config, name, cpu_offload=True)
    if not config.parallelism.cpu_offload:
        yield _parallelism(config, cpu_offload=True)


def _with_checkpointing(config: Config, **values: object) -> Config:
    return replace(config, activation_checkpoint=replace(config.activation_checkpoint, **values))  # type: ignore[arg-type]


def _parallelism(config: Config, **values: object) -> Change:
    changed = replace(config, parallelism=replace(config.parallelism, **values))  # type: ignore[arg-type]
    return Change(_text("parallelism", values), changed)


def _role(config: Config, name: str, **values: object) -> Change:
    role = config.roles[name]
    own = replace(role.parallelism, **values)  # type: ignore[arg-type]
    changed = replace(config, roles={**config.roles, name: replace(role, parallelism=own)})
    return Change(_text(f"roles.{name}.parallelism", values), changed)


def _text(section: str, values: dict[str, object]) -> str:
    return ", ".join(f"{section}.{key} = {str(value).lower()}" for key, value in values.items())
