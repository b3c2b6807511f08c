"""Text of a plan: tables of layout, tokens, memory, FLOPs, traffic and seconds."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch

from titan_distill.fault_tolerance.files import format_bytes
from titan_distill.planner.hardware import EFFICIENCY, GPUS_PER_NODE, RESERVE
from titan_distill.planner.hours import Hours
from titan_distill.planner.measured import measurements
from titan_distill.planner.memory import GIB
from titan_distill.planner.plan import START, VALIDATION, Plan, RolePlan
from titan_distill.planner.seconds import RATES, Part, summed

CALIBRATE = "titan-distill plan JOB.toml --calibrate times three steps on this machine"


def report(plan: Plan, hours: Hours) -> str:
    """Returns the text of a plan: all tables except the table of changes that would lower its memory."""
    tables = [layout_table(plan), token_table(plan), memory_table(plan), *_work_tables(plan), hours_table(plan, hours)]
    return "\n\n".join(tables)


def layout_table(plan: Plan) -> str:
    """Returns a table of each role's layout and of its attention under sequence parallelism."""
    rows = [
        (role.name, str(role.degrees), _heads(role), _method(role), _groups(role), _choices(role))
        for role in plan.roles.values()
    ]
    ranks = plan.layout.default.world_size
    groups, micro_batches = plan.layout.default.data_parallel, plan.layout.num_micro_batches
    title = f"LAYOUT   {ranks} ranks, {groups} data-parallel groups, {micro_batches} micro-batches per step"
    names = ("role", "degrees", "heads, ffn per rank", "attention", "data groups at once", "could also be")
    return table(title, names, rows)


def token_table(plan: Plan) -> str:
    """Returns a table of the tokens that each rank holds of one sample, and of the tiles that they come in where a
    role's attention is sparse."""
    title = f"TOKENS   {_times(plan.grid)} = {math.prod(plan.grid):,} tokens"
    rows = []
    for role in plan.roles.values():
        lengths, padded = role.shards.lengths, role.shards.padded_length
        padding = 1 - role.shards.bounds[-1] / (padded * len(lengths))
        tiles = role.tile_layout
        num_ragged = int((tiles.length < math.prod(tiles.tile)).sum())
        row = (role.name, str(len(lengths)), f"{min(lengths):,}", f"{padded:,}", f"{padding:.1%}")
        share = f"{role.useful_share:.3f}" if role.sparse else ""
        rows.append((*row, _times(tiles.tile), f"{tiles.num_tiles:,}", f"{num_ragged:,}", share))
    names = ("role", "ranks per sample", "shortest run", "padded to", "padding")
    if not any(role.sparse for role in plan.roles.values()):
        return table(title, names, [row[: len(names)] for row in rows])
    shown = table(title, (*names, "tile", "tiles", "ragged", "useful share"), rows)
    return f"{shown}\n  useful share: of the products of whole tiles in sparse attention, the part for valid tokens"


def _times(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes))


def memory_table(plan: Plan) -> str:
    """Returns a table of the memory of each role on rank 0, in GiB."""
    names = ("role", "parameters", "gradients", "optimizer", "EMA", "activations", "temporary", "where")
    rows = []
    for role in plan.roles.values():
        held = role.states
        gradients = max(held.gradients, role.accumulated[plan.reduce_gradients])
        sizes = (held.parameters, gradients, held.optimizer, held.ema, role.graph, role.temporary)
        rows.append((role.name, *(f"{size / GIB:.2f}" for size in sizes), "host" if role.offloaded else "device"))
    encoders = plan.encoders
    if encoders.held:
        rows.append(("encoders", f"{encoders.held / GIB:.2f}", *[""] * 5, "for the whole run"))
    if encoders.released:
        rows.append(("text encoder", f"{encoders.released / GIB:.2f}", *[""] * 5, "until the first step"))
    if encoders.decoding:
        rows.append(("decoding", *[""] * 4, f"{encoders.decoding / GIB:.2f}", "", "in validation, one clip at a time"))
    gpu, verdict = plan.gpu, "fits" if plan.fits else "DOES NOT FIT"
    return "\n".join(
        [
            table("MEMORY   GiB on rank 0, which holds the largest shards", names, rows),
            *_settings(plan),
            f"  peak {plan.peak / GIB:.1f} GiB, in {_peak_phase(plan)}",
            f"  {verdict}: {gpu.name} has {gpu.memory_gib:.1f} GiB, {gpu.usable_gib:.1f} after a reserve of "
            f"{RESERVE:.0%} for {'other work' if gpu.is_cpu else 'CUDA, NCCL and fragmentation'}",
        ]
    )


def _settings(plan: Plan) -> Iterable[str]:
    """Yields a line for each sum of the memory table that depends on a setting alone."""
    for role in plan.roles.values():
        if plan.layout.num_micro_batches > 1 and role.states.gradients:
            sums = _or_else(role.accumulated, plan.reduce_gradients)
            yield f"  gradients of {role.name} on the device by training.reduce_gradients: {sums}"
        if role.exchanged:
            sums = _or_else(role.exchanged, "all" if role.num_turns == 1 else "in_turn")
            yield f"  temporary of {role.name} by roles.{role.name}.parallelism.exchange_groups: {sums}"


def _or_else(sizes: Mapping[str, float], chosen: str) -> str:
    return ", ".join(f"{name} {size / GIB:.2f}{' (chosen)' * (name == chosen)}" for name, size in sizes.items())


def _peak_phase(plan: Plan) -> str:
    if plan.peak_phase == START:
        return "the start: all states, and the text encoder"
    if plan.peak_phase == VALIDATION:
        return "validation: all states, and the decoding of a clip"
    return f"the update of {plan.peak_phase}: all states, and its gradients, activations and largest temporary"


def _work_tables(plan: Plan) -> Iterable[str]:
    if not plan.phases:
        return ["WORK     not known: the method declares no passes (TrainingMethod.passes)"]
    return [_flops_table(plan), _communication_table(plan), _seconds(plan)]


def _flops_table(plan: Plan) -> str:
    rows: list[tuple[str, ...]] = []
    for phase in plan.phases:
        passes = phase.passes
        kind = "forward + backward" if passes.backward else "forward"
        rows.append(
            (
                passes.update, passes.phase, passes.role, kind,
                f"{passes.num_forwards * passes.num_conditions:g} × {passes.updates_per_step:g}",
                f"{phase.executed_flops / 1e12:,.0f}", f"{phase.dense_flops / 1e12:,.0f}",
                _number(phase.compute_seconds), _number(phase.exposed_seconds),
            )
        )  # fmt: skip
    executed, dense = (sum(getattr(phase, name) for phase in plan.phases) for name in ("executed_flops", "dense_flops"))
    rows.append(("step", *[""] * 4, f"{executed / 1e12:,.0f}", f"{dense / 1e12:,.0f}", "", ""))
    names = ("update", "phase", "role", "passes", "per sample × step", "executed", "dense", "compute s", "waiting s")
    title = (
        "WORK     TFLOP per step, over all ranks; dense: without recomputation and with dense attention for every role"
    )
    return table(title, names, rows)


def _communication_table(plan: Plan) -> str:
    totals: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for phase in plan.phases:
        for transfer in phase.transfers:
            if transfer.bytes_sent:
                key = (phase.passes.role, transfer.collective, "overlapped" if transfer.overlaps else "waited for")
                totals[key][0] += transfer.bytes_sent
                totals[key][1] += transfer.seconds
    rows = [
        (role, collective, f"{sent / GIB:.2f}", _number(seconds), how)
        for (role, collective, how), (sent, seconds) in totals.items()
    ]
    names = ("role", "collective", "GiB", "s", "")
    return table("TRAFFIC  sent per rank and step", names, rows or [("none", "", "", "", "")])


def parts(plan: Plan) -> list[Part]:
    """Returns the work of one rank in a step by part, the longest first."""
    found = summed([*(part for phase in plan.phases for part in phase.parts), plan.optimizer])
    return sorted(found, key=lambda part: -part.seconds)


def _seconds(plan: Plan) -> str:
    gpu = plan.gpu
    left_out = [f"  not in this plan: {thing}" for thing in plan.left_out]
    if not gpu.has_rates:
        title = f"SECONDS  not known, because no rates of this {gpu.name} are assumed; {CALIBRATE}"
        return "\n".join([title, *left_out])
    exposed = sum(phase.exposed_seconds for phase in plan.phases)
    rows = [(part.name, _work(part), _rate(part.name, plan), f"{part.seconds:.2f}") for part in parts(plan)]
    rows.append(("waiting for other ranks", "", "", f"{exposed:.2f}"))
    title = f"SECONDS  {plan.seconds:.1f} per step on each rank; the rates are assumed, not measured"
    lines = [table(title, ("part", "work", "rate", "s"), rows)]
    lines.append(
        f"  links: {EFFICIENCY.network:.0%} of {gpu.nvlink_bytes / 1e9:.0f} GB/s within nodes of {GPUS_PER_NODE} and "
        f"of {gpu.network_bytes / 1e9:.0f} GB/s per GPU between them"
    )
    lines += [f"  measured, {each}" for each in measurements(gpu)]
    return "\n".join([*lines, *left_out])


def hours_table(plan: Plan, hours: Hours) -> str:
    """Returns a table of the hours of a run by part, and the size of its checkpoints."""
    total, machine = hours.total, f"{hours.num_ranks} × {plan.gpu.name}"
    rows = [(name, f"{times:,}", *_each_and_all(times, each)) for name, (times, each) in hours.parts.items() if times]
    if total is None:
        why = "the method declares no passes (TrainingMethod.passes)" if plan.gpu.has_rates else CALIBRATE
        title = f"HOURS    no hours of this run on {machine} are known; {why}"
    else:
        cost = "" if plan.gpu.is_cpu else f" = {_hours(total * hours.num_ranks)} GPU-hours"
        source = "measured on this machine" if hours.measured else "at assumed rates, not measured"
        title = f"HOURS    {_hours(total)} on {machine}{cost}, {source}"
    lines = [table(title, ("part", "times", "s each", "hours"), rows)]
    if hours.num_saves:
        size = hours.checkpoint_bytes
        lines.append(f"  disk: {format_bytes(size)} per checkpoint, {format_bytes(hours.num_kept * size)} at most")
    if total is not None and not hours.measured:
        lines.append("  not in these hours: decoding, scoring and writing videos, held-out losses, start-up")
    if not (plan.gpu.is_cpu or hours.measured or torch.cuda.is_available()):
        lines.append("  not hours of this machine: it is a CPU, of which no rates are assumed")
    return "\n".join(lines)


def _each_and_all(times: int, seconds: float | None) -> tuple[str, str]:
    if seconds is None:
        return "", ""
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}", _hours(times * seconds / 3600)


def planned_line(plan: Plan, hours: Hours) -> str:
    """Returns the plan of a run in one line, for its banner."""
    facts = [f"peak memory {plan.peak / GIB:.2f} GiB per rank"]
    if hours.num_saves:
        facts.append(f"checkpoints of {format_bytes(hours.checkpoint_bytes)}")
    if hours.total is None:
        facts.append("no hours" if plan.gpu.has_rates else f"no hours ({CALIBRATE})")
    else:
        facts.append(f"{_hours(hours.total)} hours at assumed rates")
        facts.append(f"{_hours(hours.total * hours.num_ranks)} GPU-hours")
    return f"  planned   {' · '.join(facts)}"


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 0.1 else f"{value:.1f}"


def _number(seconds: float) -> str:
    return "" if math.isnan(seconds) else f"{seconds:.2f}"


def _work(part: Part) -> str:
    return f"{part.flops / 1e12:,.0f} TFLOP" if part.flops else f"{part.num_bytes / 1e9:,.0f} GB"


def _rate(part: str, plan: Plan) -> str:
    gpu = plan.gpu
    if part in RATES:
        return f"{RATES[part]:.0%} of {gpu.peak_flops / 1e12:.0f} TFLOP/s"
    return f"{EFFICIENCY.memory:.0%} of {gpu.memory_bytes / 1e12:.2f} TB/s"


def _heads(role: RolePlan) -> str:
    heads, tensor = role.architecture.num_attention_heads, role.degrees.tensor
    return f"{heads // tensor} of {heads}, {role.architecture.ffn_dim // tensor:,}"


def _groups(role: RolePlan) -> str:
    return f"{role.num_groups} of {role.num_exchanged}" if role.num_turns > 1 else str(role.num_groups)


def _choices(role: RolePlan) -> str:
    """Returns the other degrees that a role could have: those that its network and the number of ranks allow, one
    degree changed at a time."""
    heads, ffn, degrees = role.architecture.num_attention_heads, role.architecture.ffn_dim, role.degrees
    ranks = degrees.world_size // degrees.dp_replicate
    tensor = [n for n in range(1, ranks // degrees.sequence + 1) if not (ranks % n or heads % n or ffn % n)]
    ulysses = [n for n in range(1, ranks // degrees.tensor + 1) if not (ranks % n or heads % (n * degrees.tensor))]
    return f"tensor {_or(tensor)}; Ulysses over {_or(ulysses)}"


def _or(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _method(role: RolePlan) -> str:
    heads, degrees = role.architecture.num_attention_heads, role.degrees
    if degrees.sequence == 1:
        return "local"
    divides = "divides" if heads % degrees.model_parallel == 0 else "does not divide"
    name = "Ulysses" if role.method == "ulysses" else "all-gather of K/V"
    return f"{name}: {degrees.model_parallel} {divides} {heads}"


def table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats rows as a table below `title`. Columns of numbers are flush right."""
    columns = []
    for name, *cells in zip(names, *rows, strict=True):
        width = max(map(len, [name, *cells]))
        flush_right = any(cells) and all(re.match(r"[+-]?\d|$", cell) for cell in cells)
        columns.append([cell.rjust(width) if flush_right else cell.ljust(width) for cell in (name, *cells)])
    return "\n".join([title, *("  " + "  ".join(line).rstrip() for line in zip(*columns, strict=True))])
