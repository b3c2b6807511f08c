"""The plan of a run that starts, for its banner and for `plan.json` in its folder.

The page of the run shows the plan beside what it measures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from titan_distill.fault_tolerance.files import atomic
from titan_distill.observability.progress import CHECKPOINT, VALIDATION
from titan_distill.planner.hardware import Gpu
from titan_distill.planner.hours import Hours, hours, summary
from titan_distill.planner.memory import GIB
from titan_distill.planner.plan import Plan, can_plan, make_plan
from titan_distill.planner.report import hours_table, memory_table, planned_line
from titan_distill.resolve import ResolvedRun
from titan_distill.roles import RoleManager

PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class RunPlan:
    """Plan of a run that is built."""

    plan: Plan
    hours: Hours

    @classmethod
    def of(cls, run: ResolvedRun, roles: RoleManager, gpu: Gpu) -> RunPlan | None:
        """Plans a run whose `roles` are built. None for a family whose costs are not known."""
        if not can_plan(run, roles):
            return None
        plan = make_plan(run, roles, gpu)
        return cls(plan, hours(run, roles, plan))

    @property
    def tables(self) -> str:
        """The tables that a dry run shows."""
        return f"{memory_table(self.plan)}\n\n{hours_table(self.plan, self.hours)}"

    @property
    def line(self) -> str:
        """The line of the banner."""
        return planned_line(self.plan, self.hours)

    @property
    def memory_gib(self) -> float:
        """Peak memory of the fullest rank."""
        return self.plan.peak / GIB

    @property
    def pauses(self) -> dict[str, float | None]:
        """Seconds of the pauses between steps by name, for the progress display."""
        return {CHECKPOINT: self.hours.seconds.checkpoint, VALIDATION: self.hours.seconds.validation}

    def write(self, folder: Path) -> None:
        """Writes `plan.json`."""
        with atomic(folder / PLAN_NAME) as temporary:
            temporary.write_text(json.dumps(summary(self.plan, self.hours), indent=1), encoding="utf-8")
