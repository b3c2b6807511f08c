"""Schedules that a run is too short for: warm-ups, averages and sparsities that are copied from a longer run.

A shortened run is legitimate, as a look at the first steps or as a test, so none of this is refused. The start of such
a run tells the consequence: nobody should find out from its samples.
"""

from __future__ import annotations

from titan_distill.attention.sparse import SparsitySchedule, exact
from titan_distill.config.config import Config
from titan_distill.methods.base import TrainingMethod


def unreached_schedules(config: Config, method: type[TrainingMethod]) -> list[str]:
    """Returns one sentence for each schedule that the run does not complete, with the consequence."""
    updates = method.num_updates(config.method_config, config.training.steps)
    return [
        *_idle_roles(config, updates),
        *_warmup(config, updates),
        *_average(config, method),
        *_sparsity(config),
        *method.unreached(config),
    ]


def _idle_roles(config: Config, updates: dict[str, int]) -> list[str]:
    steps = config.training.steps
    idle = [name for name, number in updates.items() if not number]
    return [f"roles.{name} has no update in training.steps = {steps}: it stays as it is" for name in idle]


def _warmup(config: Config, updates: dict[str, int]) -> list[str]:
    warmup = config.lr_scheduler.warmup_steps
    short = {name: number for name, number in updates.items() if 0 < number < warmup}
    if not short:
        return []
    named = ", ".join(f"{name} has {number} updates" for name, number in short.items())
    return [
        f"lr_scheduler.warmup_steps = {warmup} is longer than the run ({named}): the learning rate ends at "
        f"{max(short.values()) / warmup:.2g} of its peak or below"
    ]


def _average(config: Config, method: type[TrainingMethod]) -> list[str]:
    """Compares the unit of ema.start_step, training steps, with the role's last update."""
    ema, steps = config.ema, config.training.steps
    if not ema.decay:
        return []
    before, after = (method.num_updates(config.method_config, n)[ema.role] for n in (min(ema.start_step, steps), steps))
    if before < after:
        return []
    return [
        f"ema.start_step = {ema.start_step} is beyond the last update of the {ema.role} in training.steps = {steps}: "
        "EMA never starts, and raw weights are sampled and exported"
    ]


def _sparsity(config: Config) -> list[str]:
    if not any(role.attention == "sparse" for role in config.roles.values()):
        return []
    sparse, steps = config.sparse_attention, config.training.steps
    schedule = SparsitySchedule.of(sparse)
    last = schedule.at(steps - 1)
    if last >= schedule.target:
        return []
    is_dense = last < exact(sparse.crossover)
    stays = f", below crossover = {sparse.crossover}, so that attention is dense" if is_dense else ""
    return [
        f"sparse_attention.schedule_rate = {sparse.schedule_rate} does not reach sparsity = {sparse.sparsity} in "
        f"training.steps = {steps}: the last step has {float(last):.3g}{stays}"
    ]
