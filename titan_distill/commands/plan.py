"""``titan-distill plan``: what a job will need, before anybody waits for GPUs.

Roles are built on the meta device with the layouts of the run, by the code that the run will use, and nothing is
allocated. Where the plan does not fit, every change that might help is planned, too, and the cheapest come first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from titan_distill.config.config import Config
from titan_distill.config.layouts import check_world, role_parallelism
from titan_distill.config.loading import load_config
from titan_distill.config.parsing import ConfigError
from titan_distill.config.sections import EmaConfig, ParallelismConfig
from titan_distill.models.base import model_family
from titan_distill.planner.hardware import GPUS, Gpu
from titan_distill.planner.memory import GIB
from titan_distill.planner.plan import Plan, fake_world, make_plan
from titan_distill.planner.report import report, table
from titan_distill.planner.suggestions import Change, changes
from titan_distill.roles import RoleHandle, RoleManager
from titan_distill.train import build_layouts, build_roles

if TYPE_CHECKING:
    from titan_distill.parallelisms.mesh import World

MAX_COMBINED = 4
"""Changes to combine where none is enough alone."""


@dataclass(frozen=True)
class PlanOptions:
    """Plan a job on NGPU ranks: validity, tokens, memory, FLOPs, traffic and seconds, without a GPU.

    Set the number of ranks in the environment: NGPU=64 titan-distill plan train_configs/X.toml. Overrides of the
    configuration follow the file: --parallelism.tensor 2.
    """

    config: tyro.conf.Positional[Path]
    """The job's TOML file."""
    gpu: Literal["H100", "H200", "A100", "B200"] = "H100"
    """The GPU to plan for."""


def plan(options: PlanOptions, overrides: Sequence[str]) -> None:
    """Plan a job's memory, work and traffic without a GPU."""
    config = load_config(["--job.config_file", str(options.config), *overrides])
    num_ranks = _num_ranks(config)
    with planner(num_ranks, GPUS[options.gpu]) as replan:
        first = replan.plan(config)
        print(f"{config.job.name}: {config.recipe.method} on {num_ranks} × {first.gpu.name}\n")
        print(report(first))
        if not first.fits:
            print(f"\n{replan.remedies(config, first)}")


@contextmanager
def planner(num_ranks: int, gpu: Gpu) -> Iterator[Planner]:
    """A planner for runs of ``num_ranks``; the process must have no process group."""
    with fake_world(num_ranks) as world:
        yield Planner(world, gpu)


@dataclass
class Planner:
    """Plans configurations that differ little, and builds no role twice."""

    world: World
    gpu: Gpu
    _built: dict[tuple[str, ParallelismConfig], RoleHandle] = field(default_factory=dict)

    def plan(self, config: Config) -> Plan:
        """Raises ConfigError for a layout that can't be."""
        layout = check_world(config, self.world.size)
        family = model_family(config.recipe.family)(config)
        try:
            family.check_layouts(layout.roles)
        except ValueError as error:
            raise ConfigError(f"{config.job.config_file}: {error}") from error
        keys = {name: (name, role_parallelism(config, name)) for name in config.roles}
        missing = {name: role for name, role in config.roles.items() if keys[name] not in self._built}
        layouts = build_layouts(config, self.world)
        few = replace(config, roles=missing, ema=EmaConfig())  # the averaged role may not be among them
        for handle in build_roles(few, family, layouts, self.world.device):
            self._built[keys[handle.name]] = handle
        return make_plan(config, layout, RoleManager([self._built[key] for key in keys.values()]), self.gpu)

    def remedies(self, config: Config, first: Plan) -> str:
        """A table of what helps, cheapest first; where nothing is enough alone, what is enough together."""
        options = self._options(config, first)
        helpful = [option for option in options if option[1].peak < first.peak]
        helpful.sort(key=lambda option: (not option[1].fits, option[1].seconds))
        rows = [
            (
                change.text,
                f"{(first.peak - other.peak) / GIB:.1f}",
                f"{other.peak / GIB:.1f}",
                f"{other.seconds - first.seconds:+.1f}",
                "fits" if other.fits else "",
            )
            for change, other in helpful
        ]
        names = ("change", "saves GiB", "peak", "s a step", "")
        shown = table("REMEDIES  planned one by one, cheapest first", names, rows)
        return shown if any(other.fits for _, other in helpful) else f"{shown}\n\n{self._combined(config, first)}"

    def _combined(self, config: Config, plan: Plan) -> str:
        lines = []
        for _ in range(MAX_COMBINED):
            options = [option for option in self._options(config, plan) if option[1].peak < plan.peak]
            if plan.fits or not options:
                break
            change, plan = min(options, key=lambda option: (not option[1].fits, _regret(option[1], plan)))
            config = change.config
            lines.append(f"  {change.text}: {plan.peak / GIB:.1f} GiB, {plan.seconds:.1f} s a step")
        verdict = "together enough:" if plan.fits else "not even together enough; start more ranks:"
        return "\n".join([verdict, *lines])

    def _options(self, config: Config, plan: Plan) -> list[tuple[Change, Plan]]:
        return [(change, other) for change in changes(config, plan) if (other := self._if_valid(change.config))]

    def _if_valid(self, config: Config) -> Plan | None:
        """None for a candidate that its models or the number of ranks rule out: that is no remedy."""
        try:
            return self.plan(config)
        except ConfigError:
            return None


def _regret(other: Plan, plan: Plan) -> float:
    """Added seconds for each byte saved; among changes that cost nothing, the larger saving."""
    saved = plan.peak - other.peak
    return (other.seconds - plan.seconds) / saved if other.seconds > plan.seconds else -saved


def _num_ranks(config: Config) -> int:
    asked = os.environ.get("NGPU") or os.environ.get("WORLD_SIZE")
    if asked is None:
        layout = config.parallelism
        if layout.dp_shard == -1:
            raise ConfigError("the number of ranks is not known: set NGPU, or parallelism.dp_shard in place of -1")
        return layout.dp_replicate * layout.dp_shard * layout.sequence * layout.tensor
    if not asked.isdecimal() or int(asked) < 1:
        raise ConfigError(f"NGPU = {asked!r} is no number of ranks; set it to a positive integer")
    return int(asked)
