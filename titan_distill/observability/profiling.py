"""A `torch.profiler` trace of a few steps, one file per rank, to open in Perfetto or `chrome://tracing`.

The step before the trace warms the profiler up: its first events are slow, and would be read as the model's. Profiling
itself costs time, so the throughput of the traced steps means nothing.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from titan_distill.config.sections import ProfilingConfig
from titan_distill.parallelisms.mesh import World

log = logging.getLogger(__name__)


class NoProfile(ExitStack):
    """The profiler of a run that is not profiled: it records nothing."""

    def step(self) -> None:
        """Marks the end of a step."""


Profiler = profile | NoProfile
"""Context manager around the training loop, whose `step()` is called after every step."""


def build_profiler(config: ProfilingConfig, folder: Path, world: World, first_step: int = 0) -> Profiler:
    """Builds the profiler that `config` describes, which writes below `folder`. `first_step` is the number of
    steps that the run has already done, as `config.start_step` is that of the steps before the trace."""
    wait = config.start_step - first_step
    if config.enabled and wait < 0:
        log.warning(
            "no profile: this run resumes after step %d, but profiling.start_step = %d", first_step, config.start_step
        )
    if not config.enabled or wait < 0:
        return NoProfile()
    path = folder / f"step-{config.start_step:08d}.rank{world.rank}.json.gz"

    def export(finished: profile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(path))
        log.info("profile written to %s", path)

    warmup = min(1, wait)
    return profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (world.device.type == "cuda"),
        schedule=schedule(wait=wait - warmup, warmup=warmup, active=config.num_steps, repeat=1),
        on_trace_ready=export,
        record_shapes=True,
    )
