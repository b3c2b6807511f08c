"""Hours of a run: its steps, the validations and saves between them, and the disk that its checkpoints take.

Before the first step a validation samples the method's baselines; later ones sample the trained role alone. The seconds
of both follow from the forward passes of their sample sets, as those of a step do: data groups sample in rounds, one
prompt each, and the doctor adds samples of the first prompt and passes over them. Decoding, scoring and writing videos,
and the held-out loss, are not counted in a plan; `titan-distill plan --calibrate` measures them with the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from titan_distill.config.config import Config
from titan_distill.diffusion.requests import LEVELS, SampleRequest, ValidationRequest, num_samples
from titan_distill.methods.base import Passes
from titan_distill.observability.progress import CHECKPOINT, VALIDATION, Pauses
from titan_distill.planner.hardware import DISK_BYTES, GPUS_PER_NODE
from titan_distill.planner.memory import FP32, GIB
from titan_distill.planner.plan import START, Calls, Plan
from titan_distill.resolve import ResolvedRun
from titan_distill.roles import RoleHandle, RoleManager


@dataclass(frozen=True)
class Seconds:
    """Seconds of a run's parts, each time that they occur. None: not known."""

    step: float | None
    """One step, averaged over the method's cadence."""
    baselines: float | None
    """The validation before the first step."""
    validation: float | None
    """A later validation."""
    checkpoint: float | None
    """Time for which a save holds training up."""


@dataclass(frozen=True)
class Hours:
    """Hours of a run by part.

    Attributes:
        seconds: seconds of each part, once.
        num_ranks: ranks of the run, one per GPU.
        num_steps: steps of the whole run.
        num_validations: validations after the one before the first step.
        num_saves: checkpoints that it writes.
        validates: whether it validates before the first step.
        checkpoint_bytes: size of a checkpoint.
        num_kept: checkpoints on the disk at once, while one is being written.
        measured: whether the seconds were measured on this machine; otherwise rates are assumed.
    """

    seconds: Seconds
    num_ranks: int
    num_steps: int
    num_validations: int
    num_saves: int
    validates: bool
    checkpoint_bytes: float
    num_kept: int
    measured: bool = False

    @property
    def parts(self) -> dict[str, tuple[int, float | None]]:
        """Number of times and seconds of each part."""
        return {
            "steps": (self.num_steps, self.seconds.step),
            "baselines, before step 1": (int(self.validates), self.seconds.baselines),
            "validations": (self.num_validations, self.seconds.validation),
            "saves": (self.num_saves, self.seconds.checkpoint),
        }

    @property
    def total(self) -> float | None:
        """Hours of the whole run; None if a part of it is not known."""
        found = [(times, each) for times, each in self.parts.values() if times]
        if any(each is None for _, each in found):
            return None
        return sum(times * (each or 0.0) for times, each in found) / 3600

    def with_measured(self, seconds: Seconds) -> Hours:
        """Returns these hours at measured seconds."""
        return replace(self, seconds=seconds, measured=True)


def hours(run: ResolvedRun, roles: RoleManager, plan: Plan) -> Hours:
    """Returns the hours of a planned run, whose `roles` are built."""
    config = run.config
    pauses, num_steps = Pauses.of(config), config.training.steps
    validates = config.validation.enabled or bool(config.validation.data)
    return Hours(
        seconds=_planned(run, roles, plan),
        num_ranks=plan.layout.default.world_size,
        num_steps=num_steps,
        num_validations=pauses.count(VALIDATION, 0, num_steps) if validates else 0,
        num_saves=pauses.count(CHECKPOINT, 0, num_steps),
        validates=validates,
        checkpoint_bytes=sum(_saved_bytes(role, config) for role in roles.trainable),
        num_kept=min(config.checkpoint.keep + 1, pauses.count(CHECKPOINT, 0, num_steps)),
    )


def summary(plan: Plan, found: Hours) -> dict[str, object]:
    """Returns what `plan.json` holds: a plan's figures by name; None for what is not known."""
    total = found.total
    return {
        "memory_gib": plan.peak / GIB,
        "memory_parts": memory_parts(plan),
        "step_seconds": found.seconds.step,
        "baseline_seconds": found.seconds.baselines,
        "validation_seconds": found.seconds.validation,
        "checkpoint_seconds": found.seconds.checkpoint,
        "checkpoint_gib": found.checkpoint_bytes / GIB if found.num_saves else None,
        "hours": total,
        "gpu_hours": None if total is None or plan.gpu.is_cpu else total * found.num_ranks,
    }


def memory_parts(plan: Plan) -> dict[str, float]:
    """Returns the parts of the peak memory in GiB: what each role and the encoders hold for the whole run, and what the
    phase of the peak needs in addition."""
    parts = {name: held for name, held in plan.held.items() if held}
    phase = plan.peak_phase if plan.peak_phase not in plan.roles else f"update of {plan.peak_phase}"
    parts["text encoder" if plan.peak_phase == START else phase] = plan.peak - sum(parts.values())
    return {name: size / GIB for name, size in parts.items()}


def _planned(run: ResolvedRun, roles: RoleManager, plan: Plan) -> Seconds:
    def known(seconds: float) -> float | None:
        return None if math.isnan(seconds) else seconds

    checkpoint = known(_saving_seconds(run.config, roles, plan))
    if not run.config.validation.enabled:
        return Seconds(known(plan.seconds) if plan.phases else None, None, None, checkpoint)
    request = run.method.validation_samples(run.config.method_config, run.config.pipeline_config.flow_shift)
    baselines = [sample for sample in request.samples if sample.baseline]
    later = [sample for sample in request.samples if not sample.baseline]
    return Seconds(
        step=known(plan.seconds) if plan.phases else None,
        baselines=known(_sampling_seconds(run, plan, request, baselines or request.samples, is_first=True)),
        validation=known(_sampling_seconds(run, plan, request, later, is_first=False)),
        checkpoint=checkpoint,
    )


def _sampling_seconds(
    run: ResolvedRun, plan: Plan, request: ValidationRequest, samples: Iterable[SampleRequest], *, is_first: bool
) -> float:
    config, total, is_watched = run.config, 0.0, run.config.doctor.enabled
    num_groups = run.layout.default.world_size // run.layout.default.model_parallel
    num_rounds = -(-num_samples(config.validation.num_prompts, is_watched=is_watched) // num_groups)
    for sample in samples:
        segmentation = plan.roles[sample.role].segmentation
        num_segments = None if segmentation is None else len(segmentation.lengths(plan.grid[0]))
        passes = Passes(
            update=sample.role,
            role=sample.role,
            phase=VALIDATION,
            num_forwards=sample.num_passes(num_segments) / (num_segments or 1),
            # A step of training has a global batch of samples, a validation rounds of one for each data group.
            updates_per_step=num_rounds * num_groups / config.training.global_batch_size,
            num_conditions=sample.num_conditions,
            segments=None if num_segments is None else 0,
        )
        made = [passes]
        if is_watched:
            judges = [name for name, made_by in request.denoisers if made_by == sample.role]
            if is_first and request.reference is not None:  # an untrained network that sees whole videos judges it
                networks = [role.name for role in plan.roles.values() if role.segmentation is None]
                judges += [name for name in networks if config.roles[name].trainable][:1]
            whole = replace(passes, num_forwards=len(LEVELS), num_conditions=1, segments=None)
            made += [replace(whole, role=name) for name in judges]
        phases = [Calls(run, plan.gpu, plan.grid, plan.roles[each.role], each).phase for each in made]
        total += sum(phase.compute_seconds + phase.exposed_seconds for phase in phases)
    return total


def _saved_bytes(role: RoleHandle, config: Config) -> int:
    """Returns the bytes of a trained role in a checkpoint, over all ranks: weights, two moments and a step counter per
    parameter, and the EMA."""
    parameters = list(role.network.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    held = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    saved = trained if role.adapters_only else parameters
    weights = sum(parameter.numel() * parameter.element_size() for parameter in saved)
    has_ema = bool(config.ema.decay) and config.ema.role == role.name
    return weights + (2 + has_ema) * held + FP32 * len(trained)


def _saving_seconds(config: Config, roles: RoleManager, plan: Plan) -> float:
    """Returns the seconds for which a save holds training up: until everything is written, or, for an asynchronous one,
    until the rank with the largest shard has copied it to the host."""
    if not plan.gpu.has_rates:
        return math.nan
    if config.checkpoint.mode == "async":
        trained = [plan.roles[role.name] for role in roles.trainable if role.name in plan.roles]
        return sum(role.states.lasting for role in trained) / plan.gpu.host_bytes
    num_nodes = -(-plan.layout.default.world_size // GPUS_PER_NODE)
    return sum(_saved_bytes(role, config) for role in roles.trainable) / (num_nodes * DISK_BYTES)
