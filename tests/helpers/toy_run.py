"""Building real trainers on the toy family, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import toy_family

from titan_distill import registry
from titan_distill.commands.ode_pairs import OdePairsOptions, ode_pairs
from titan_distill.config.loading import load_config
from titan_distill.methods.base import method_class
from titan_distill.parallelisms.mesh import World
from titan_distill.registry import names
from titan_distill.resolve import resolve
from titan_distill.train import assemble
from titan_distill.trainer import Trainer

ASSETS = Path(__file__).parents[1] / "assets"
METHODS = [name for name in names(registry.METHODS) if method_class(name).__module__.startswith("titan_distill.")]
"""All methods of the package; those that tests register are not among them."""
JOBS = sorted(path.stem.removeprefix("toy_") for path in ASSETS.glob("toy_*.toml"))
"""Jobs of the toy family: one for each method, and others."""


def toy_pairs(folder: Path, prompts: Path, **options: Any) -> Path:
    """Recorded trajectories of the toy teacher, in `folder / "pairs"`."""
    job = ASSETS / "toy_knowledge_distillation.toml"
    options = {"num_pairs": 64, "batch_size": 64, "dtype": "float32"} | options
    ode_pairs(OdePairsOptions(job, prompts, folder / "pairs", **options))
    return folder / "pairs"


def toy_trainer(folder: Path, method: str, *overrides: str, with_latents: bool = True) -> Trainer:
    """A trainer as `train.main` assembles it, writing below `folder`."""
    data = folder / "toy.parquet"
    if not data.exists():
        toy_family.write_data(data, with_latents=with_latents)
    if method == "knowledge_distillation":
        data = toy_pairs(folder, data)
    defaults = ["--job.config_file", str(ASSETS / f"toy_{method}.toml"), "--data.path", str(data)]
    config = load_config([*defaults, "--job.output_dir", str(folder / "run"), *overrides])
    return assemble(resolve(config, 1), World(rank=0, size=1, device=torch.device("cpu")))
