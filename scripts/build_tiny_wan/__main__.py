"""Builds the small real Wan from nothing: `python scripts/build_tiny_wan`, about two hours on 2 cores.

Stages, each of which needs the ones before it: `vae` and `text_encoder` (frozen parts of a diffusers folder in
tests/assets/tiny_wan), `data` (drawn clips as parquet: 192 shipped in tests/assets/tiny_shapes, more in
outputs/tiny_wan_data for the teacher), `teacher` (the transformer, trained and exported by this project's own
commands).
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from data import write_data, write_pipeline_index
from text_encoder import train_text_encoder
from vae import train_vae, use_fast_norm

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = ROOT / "tests/assets/tiny_wan"
ASSETS = ROOT / "tests/assets/tiny_shapes"


@dataclass(frozen=True)
class BuildConfig:
    """Options of the build."""

    stage: Literal["vae", "text_encoder", "data", "teacher", "all"] = "all"
    """One stage, or all of them in order."""
    minutes: float = 60.0
    """Wall-clock minutes for the VAE; below 20 its colours are wrong."""
    vae_start_at: float = 0.0
    """Above 0: train the VAE in the folder on from this share of the schedule, with `minutes` for the rest."""
    num_clips: int = 1440
    """Drawn clips for training the teacher, in outputs/tiny_wan_data (not committed)."""
    num_shipped_clips: int = 192
    """Drawn clips in tests/assets/tiny_shapes."""
    num_threads: int = 2
    """CPU threads."""
    seed: int = 0
    """Seed of weights and drawings. The VAE's budget is in minutes, so it is not bitwise reproducible."""


def main(config: BuildConfig) -> None:
    """Run the chosen stages."""
    torch.set_num_threads(config.num_threads)
    use_fast_norm()
    for stage in STAGES if config.stage == "all" else (config.stage,):
        print(f"stage {stage}", flush=True)
        STAGES[stage](config)


def _data(config: BuildConfig) -> None:
    write_pipeline_index(PIPELINE)
    sizes = {"num_shipped": config.num_shipped_clips, "num_local": config.num_clips}
    write_data(ASSETS, PIPELINE, ROOT / "outputs/tiny_wan_data", **sizes, seed=config.seed)


def _teacher(config: BuildConfig) -> None:
    """Trains the transformer with the project's own trainer, and puts its averaged weights into the pipeline folder."""
    run = ROOT / "outputs/tiny_wan_teacher"
    exported = run / "exported"
    shutil.rmtree(exported, ignore_errors=True)
    for command in (
        "titan_distill.train --job.config_file train_configs/tiny_wan_teacher.toml",
        f"titan_distill.cli checkpoint export --checkpoint {run}/checkpoints/latest --dtype float16 --out {exported}",
    ):
        subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, check=True)
    shutil.rmtree(PIPELINE / "transformer", ignore_errors=True)
    shutil.copytree(exported / "transformer", PIPELINE / "transformer")


STAGES: dict[str, Callable[[BuildConfig], None]] = {
    "vae": lambda c: train_vae(PIPELINE / "vae", minutes=c.minutes, seed=c.seed, start_at=c.vae_start_at),
    "text_encoder": lambda c: train_text_encoder(PIPELINE, seed=c.seed),
    "data": _data,
    "teacher": _teacher,
}


if __name__ == "__main__":
    main(tyro.cli(BuildConfig))
