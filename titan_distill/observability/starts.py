"""Record of a start: the resolved configuration as `config.toml`, and a line of `starts.jsonl` for the run's page."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import asdict

import torch

from titan_distill.config.changes import changes
from titan_distill.config.config import Config
from titan_distill.config.degrees import Degrees
from titan_distill.config.loading import load_config, to_toml
from titan_distill.config.text import to_dict
from titan_distill.fault_tolerance.run_folder import is_restart, versions
from titan_distill.fault_tolerance.starts import Start, append_start
from titan_distill.parallelisms.mesh import World


def record_start(config: Config, world: World, degrees: Mapping[str, Degrees], step: int) -> None:
    """Writes both files. `step` is the number of steps done; `degrees` has each role's layout by the role's name."""
    folder = config.job.output_folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    is_gpu = world.device.type == "cuda"
    start = Start(
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        step=step,
        is_restart=is_restart(),
        num_ranks=world.size,
        device=torch.cuda.get_device_name(world.device) if is_gpu else world.device.type,
        versions=versions(),
        config_file=config.job.config_file,
        changes=_changes(config),
        layouts={name: asdict(layout) for name, layout in degrees.items()},
    )
    append_start(folder, start)


def _changes(config: Config) -> list[tuple[str, str, str]] | None:
    """Returns the keys that differ from the job's file; None if there is no file, or one that is no job by itself."""
    if not config.job.config_file:
        return None
    try:
        written = load_config(["--job.config_file", config.job.config_file])
    except ValueError:
        return None
    return [(change.key, change.before, change.now) for change in changes(to_dict(written, skip_origins=True), config)]
