"""Spies: whether a golden job runs what it is named for.

A curve may agree with its file to the last digit and show nothing: a sparse job that is dense in all of its steps,
an average that is still a copy. A spy watches one thing while the job trains. It is a function that takes the assembled
trainer, puts itself in the way, and returns what says afterwards, given the curves, what was missing: a list of
sentences, empty where all was there.

Spies wrap methods of the run's own objects, so that nothing is left of them when it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from titan_distill.attention.dense import AttentionCall

if TYPE_CHECKING:
    from titan_distill.trainer import Trainer

Curves = dict[str, list["float | None"]]
Report = Callable[[Curves], list[str]]
Spy = Callable[["Trainer"], Report]

NOTICEABLE = 1e-4
"""Share of a loss from which on a term counts as part of it. Consistency is small beside its gradient: the golden
job's is a thousandth of the loss, while steps of it alone have a seventh of the gradient norm."""
LEAST_SPARSITY = 0.5
"""From step `SPARSE_FROM` on; a job of eight steps that is less sparse has more of its tiles than of its name."""
SPARSE_FROM = 4


def average_lags(trainer: Trainer) -> Report:
    """The average follows the weights up to its start, then differs from them and from where it began."""
    (role,) = (role for role in trainer.roles if role.ema is not None)
    start = {name: tensor.clone() for name, tensor in role.ema.shadow.items()}

    def report(curves: Curves) -> list[str]:
        distances = [value for value in curves[f"ema_distance/{role.name}"] if value is not None]
        has_moved = any(bool((role.ema.shadow[name] - tensor).norm()) for name, tensor in start.items())
        return [
            *([] if has_moved else [f"the average of {role.name} is still where it began"]),
            *([] if distances[-1] > 0 else [f"the average of {role.name} is a copy of its weights"]),
        ]

    return report


def roles_train(*names: str) -> Spy:
    """Every update of these roles moves weights, and they are all that is trained."""

    def spy(trainer: Trainer) -> Report:
        def report(curves: Curves) -> list[str]:
            moved = {key.partition("/")[2]: values for key, values in curves.items() if key.startswith("update_norm/")}
            others = [f"{name} trains" for name in moved.keys() - set(names)]
            still = [name for name in names if not any(moved.get(name, []))]
            return [*others, *(f"{name} does not train" for name in still)]

        return report

    return spy


def reads_some_tiles(trainer: Trainer) -> Report:
    """The student's attention is told, by each of its calls, to read fewer tiles than there are."""
    core, read = trainer.roles["student"].transformer.sparse_attention, {}
    mix = core.mix

    def noting(call: AttentionCall) -> Any:
        share = 1.0 if call.num_selected is None else call.num_selected / call.layout.num_tiles
        read.setdefault(trainer.state.step, set()).add(share)
        return mix(call)

    core.mix = noting

    def report(curves: Curves) -> list[str]:
        late = {step: max(shares) for step, shares in read.items() if step >= SPARSE_FROM}
        if not late:
            return ["the student's attention was never sparse: the job is too short, or another core ran"]
        return [
            f"step {step} reads {share:.0%} of the tiles, more than {1 - LEAST_SPARSITY:.0%}"
            for step, share in late.items()
            if share > 1 - LEAST_SPARSITY
        ]

    return report


def both_terms_count(trainer: Trainer) -> Report:
    """After its warm-up the student's loss has a share of consistency and one of distribution matching."""
    method, config = trainer.method, trainer.config.method_config
    consistency: list[torch.Tensor] = []
    shares: list[tuple[float, float]] = []
    tangent_loss, student_loss = method.tangent_loss, method.student_loss

    def noting_term(batch: Any, step: int) -> Any:
        result = tangent_loss(batch, step)
        weight = config.consistency_weight / batch.latents[0].numel()
        consistency.append(result.losses_B.detach() * weight)
        return result

    def noting_sum(batch: Any, step: int) -> Any:
        result = student_loss(batch, step)
        term, total = float(consistency[-1].sum()), float(result.losses_B.detach().sum())
        if step >= config.tangent_warmup:
            shares.append((term / total, 1 - term / total))
        return result

    method.tangent_loss, method.student_loss = noting_term, noting_sum

    def report(curves: Curves) -> list[str]:
        if not shares:
            return ["no student update has both terms: the warm-up takes all steps"]
        names = ("consistency", "distribution matching")
        return [
            f"{name} is {min(of_term):.1e} of a loss that should have both terms"
            for name, of_term in zip(names, zip(*shares))
            if min(of_term) < NOTICEABLE
        ]

    return report


def unrolls_on_its_own_context(trainer: Trainer) -> Report:
    """Segments are made one after the other, with gradient, on a cache of those before; exits differ."""
    method, adapter = trainer.method, trainer.adapter
    exits, cached = set(), set()
    exit_index, open_stream = method._exit_index, adapter.open_stream

    def noting_exit(step: int, purpose: str, segment: int) -> int:
        exits.add(exit_index(step, purpose, segment))
        return exit_index(step, purpose, segment)

    def noting_stream(*arguments: Any) -> Any:
        stream = open_stream(*arguments)
        predict = stream.predict_velocity

        def noting_forward(*inputs: Any) -> Any:
            velocity = predict(*inputs)
            if velocity.requires_grad:
                cached.add(stream.caches[0].num_cached)
            return velocity

        stream.predict_velocity = noting_forward
        return stream

    method._exit_index, adapter.open_stream = noting_exit, noting_stream

    def report(curves: Curves) -> list[str]:
        return [
            *([] if len(exits) > 1 else ["every rollout has the same exit"]),
            *([] if len(cached - {0}) > 1 else ["no two segments were made on a cache of those before"]),
        ]

    return report


SPIES: dict[str, tuple[Spy, ...]] = {
    "dmd2": (average_lags, roles_train("student", "critic")),
    "finetune": (average_lags, roles_train("student")),
    "sparse": (average_lags, roles_train("student"), reads_some_tiles),
    "self_forcing": (average_lags, roles_train("student", "critic"), unrolls_on_its_own_context),
    "rcm": (average_lags, roles_train("student", "critic"), both_terms_count),
}
