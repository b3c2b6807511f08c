"""`titan-distill plan`: the memory, FLOPs and traffic of a job, before anybody waits for GPUs.

It builds the roles on the meta device, with the layouts and the code of the run, and allocates nothing. When the job
does not fit, it plans every change that may help and lists the cheapest first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

from titan_distill.commands.calibrate import calibrate
from titan_distill.config.config import Config
from titan_distill.config.loading import load_config
from titan_distill.config.parsing import ConfigError
from titan_distill.config.role_sections import ParallelismConfig
from titan_distill.parallelisms.mesh import World, default_device
from titan_distill.planner.hardware import CPU, GPUS, Gpu, of_machine, planned_gpu
from titan_distill.planner.hours import Hours, hours
from titan_distill.planner.memory import GIB
from titan_distill.planner.plan import Plan, fake_world, make_plan
from titan_distill.planner.report import report, table
from titan_distill.planner.suggestions import Change, arguments, changes, describe
from titan_distill.resolve import resolve
from titan_distill.roles import RoleHandle, RoleManager
from titan_distill.train import build_layouts, build_roles

MAX_COMBINED = 4
"""Largest number of changes to combine if no single change makes the job fit."""


@dataclass(frozen=True)
class PlanOptions:
    """Plan a job on NGPU ranks: validity, tokens, memory, FLOPs, traffic and seconds, without a GPU.

    Set the number of ranks in the environment: NGPU=64 titan-distill plan train_configs/X.toml. Overrides of the
    configuration follow the file: --parallelism.tensor 2.
    """

    config: tyro.conf.Positional[Path]
    """TOML file of the job."""
    gpu: Literal["H100", "H200", "A100", "B200", "CPU"] | None = None
    """Hardware to plan for. Default: this machine's GPU, or an H100 where there is none. No rates of CPUs are assumed,
    so a plan for one has no hours without --calibrate."""
    calibrate: bool = False
    """Plan for this machine and time three steps, a part of a validation and a save of the job on it, in a temporary
    folder beside its output. Needs the job's weights and data."""


def plan(options: PlanOptions, overrides: Sequence[str]) -> None:
    """Plan a job's memory, FLOPs and traffic without a GPU."""
    argv = ["--job.config_file", str(options.config), *overrides]
    config = load_config(argv)
    num_ranks, gpu = _num_ranks(config, options), _gpu(options)
    measured = calibrate(argv, config, num_ranks) if options.calibrate else None
    with planner(num_ranks, gpu) as planned:
        first = planned.plan(config)
        found = planned.hours(config, first)
        print(f"{config.job.name}: {config.recipe.method} on {num_ranks} × {first.gpu.name}\n")
        print(report(first, found if measured is None else found.with_measured(measured)))
        if not first.fits:
            print(f"\n{planned.remedies(argv, first)}")


@contextmanager
def planner(num_ranks: int, gpu: Gpu) -> Iterator[Planner]:
    """A planner for runs of `num_ranks` ranks. The process must have no process group."""
    with fake_world(num_ranks) as world:
        yield Planner(world, gpu)


@dataclass
class Planner:
    """Plans similar configurations of one run. A role that does not differ is built only once."""

    world: World
    gpu: Gpu
    _built: dict[tuple[str, ParallelismConfig], RoleHandle] = field(default_factory=dict)

    def plan(self, config: Config) -> Plan:
        """Plans a run. Raises ConfigError for a layout that its models or the number of ranks rule out."""
        run = resolve(config, self.world.size, without_files=True)
        keys = {name: (name, role.parallelism) for name, role in config.roles.items()}
        missing = [name for name, key in keys.items() if key not in self._built]
        for handle in build_roles(run, build_layouts(run, self.world), self.world.device, missing):
            self._built[keys[handle.name]] = handle
        return make_plan(run, RoleManager([self._built[key] for key in keys.values()]), self.gpu)

    def hours(self, config: Config, plan: Plan) -> Hours:
        """Returns the hours of a run that has just been planned."""
        roles = [self._built[name, role.parallelism] for name, role in config.roles.items()]
        return hours(resolve(config, self.world.size, without_files=True), RoleManager(roles), plan)

    def remedies(self, argv: Sequence[str], first: Plan) -> str:
        """Returns a table of the changes that lower the memory, cheapest first. If no single change makes the job fit,
        the table has combined changes."""
        helpful = self._helpful(argv, first)
        helpful.sort(key=lambda option: (not option[1].fits, option[1].seconds if first.gpu.has_rates else 0.0))
        rows = [
            (
                describe(change),
                f"{(first.peak - other.peak) / GIB:.1f}",
                f"{other.peak / GIB:.1f}",
                f"{other.seconds - first.seconds:+.1f}" if first.gpu.has_rates else "",
                "fits" if other.fits else "",
            )
            for change, other in helpful
        ]
        names = ("change", "saves GiB", "peak", "s per step", "")
        shown = table("REMEDIES  planned one by one, cheapest first", names, rows)
        return shown if any(other.fits for _, other in helpful) else f"{shown}\n\n{self._combined(argv, first)}"

    def _combined(self, argv: Sequence[str], plan: Plan) -> str:
        lines = []
        for _ in range(MAX_COMBINED):
            options = [] if plan.fits else self._helpful(argv, plan)
            if not options:
                break
            change, plan = min(options, key=lambda option: (not option[1].fits, _regret(option[1], plan)))
            argv = [*argv, *arguments(change)]
            lines.append(f"  {describe(change)}: {plan.peak / GIB:.1f} GiB, {plan.seconds:.1f} s per step")
        verdict = "together enough:" if plan.fits else "not even together enough; start more ranks:"
        return "\n".join([verdict, *lines])

    def _helpful(self, argv: Sequence[str], plan: Plan) -> list[tuple[Change, Plan]]:
        """Valid changes that lower the peak, each with its plan."""
        found = []
        for change in changes(load_config(argv), plan):
            try:
                other = self.plan(load_config([*argv, *arguments(change)]))
            except ConfigError:  # the job's models or the number of ranks rule it out
                continue
            if other.peak < plan.peak:
                found.append((change, other))
        return found


def _gpu(options: PlanOptions) -> Gpu:
    if options.calibrate:
        if options.gpu is not None:
            raise ConfigError(f"--gpu {options.gpu} contradicts --calibrate, which plans for this machine; remove one")
        return of_machine(default_device())
    if options.gpu is None:
        return planned_gpu()
    return of_machine(torch.device("cpu")) if options.gpu == CPU else GPUS[options.gpu]


def _regret(other: Plan, plan: Plan) -> float:
    """Returns the sort key of a change: added seconds per byte saved. Among changes that cost no time, the larger
    saving is first."""
    saved = plan.peak - other.peak
    return (other.seconds - plan.seconds) / saved if other.seconds > plan.seconds else -saved


def _num_ranks(config: Config, options: PlanOptions) -> int:
    asked = os.environ.get("NGPU") or os.environ.get("WORLD_SIZE")
    if asked is None and options.calibrate:
        return max(1, torch.cuda.device_count())  # as run_train.sh
    if asked is None:
        layout = config.parallelism
        if layout.dp_shard == -1:
            raise ConfigError("the number of ranks is not known: set NGPU, or parallelism.dp_shard in place of -1")
        return layout.dp_replicate * layout.dp_shard * layout.sequence * layout.tensor
    if not asked.isdecimal() or int(asked) < 1:
        raise ConfigError(f"NGPU = {asked!r} is not a number of ranks; set it to a positive integer")
    return int(asked)
