"""A `torch.profiler` trace of a few steps, one file a rank, to open in Perfetto or `chrome://tracing`.

The step before the trace warms the profiler up: its first events are slow, and would be read as the model's. Profiling
costs time itself, so the throughput of those steps means nothing.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, schedule

if TYPE_CHECKING:
    from titan_distill.config.sections import ProfilingConfig
    from titan_distill.parallelisms.mesh import World

log = logging.getLogger(__name__)


class Profiler:
    """Context manager around the loop; call `step()` after every step. Does nothing when profiling is off."""

    def __init__(self, config: ProfilingConfig, folder: Path, world: World, first_step: int = 0) -> None:
        """`first_step` is the step that the run starts at, 0-based like `config.start_step`."""
        self._path = folder / f"step-{config.start_step:08d}.rank{world.rank}.json.gz"
        self._profile: profile | None = None
        if not config.enabled:
            return
        wait = config.start_step - first_step
        if wait < 0:
            log.warning(
                "no profile: this run resumes at step %d, after profiling.start_step = %d",
                first_step,
                config.start_step,
            )
            return
        warmup = min(1, wait)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (world.device.type == "cuda")
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=wait - warmup, warmup=warmup, active=config.num_steps, repeat=1),
            on_trace_ready=self._export,
            record_shapes=True,
        )

    def __enter__(self) -> Profiler:
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.__exit__(kind, error, trace)

    def step(self) -> None:
        """Says that a step is over."""
        if self._profile is not None:
            self._profile.step()

    def _export(self, finished: torch.profiler.profile) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self._path))
        log.info("profile written to %s", self._path)
