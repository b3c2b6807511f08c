"""The shipped image-to-video job of the small Wan, through its launcher and at its whole length (nightly)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import REPOSITORY, TINY_SHAPES, TINY_WAN

from titan_distill.commands.generate import load_role
from titan_distill.data.parquet import ParquetDataset
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.models.wan.adapter import WanAdapter
from titan_distill.models.wan.state_dict import load_weights
from titan_distill.validation.sampling import Sampling

NUM_CLIPS = 12


@pytest.mark.nightly
def test_the_small_wan_learns_to_go_on_from_a_picture(tmp_path: Path) -> None:
    """A picture and a prompt leave little open: the rest of the clip that the picture is from. Its distance to what is
    made shrinks to less than half of what the text-to-video weights make of the held frame."""
    done = subprocess.run(
        ["./run_train.sh", "--job.config_file", "train_configs/tiny_wan_ti2v.toml", "--job.output_dir", str(tmp_path)],
        cwd=REPOSITORY, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    after, before = distances_to_the_clips(checkpoint)
    assert after < 0.5 * before


def distances_to_the_clips(checkpoint: Path) -> tuple[float, float]:
    """Mean squared distance, in latents after the first frame, with the weights of the checkpoint and with those from
    which it started."""
    cpu = torch.device("cpu")
    _, adapter, role, request = load_role(checkpoint, "student", cpu, raw_weights=False)
    assert isinstance(adapter, WanAdapter)
    data = ParquetDataset(TINY_SHAPES / "latents.parquet")
    rows = [data[index] for index in range(0, len(data), len(data) // NUM_CLIPS)][:NUM_CLIPS]
    clips = torch.stack([row.vae_latent.float() for row in rows if row.vae_latent is not None])
    condition = adapter.with_first_frame(adapter.encode_prompts([row.caption for row in rows]), clips[:, :, :1])

    def distance() -> float:
        sampling = Sampling(adapter, KeyedNoise(0), cpu)
        made = sampling.run(replace(request, num_steps=24), role, condition, range(NUM_CLIPS))
        assert torch.equal(made[:, :, 0], clips[:, :, 0])
        return float((made - clips)[:, :, 1:].square().mean())

    after = distance()
    load_weights(role.transformer, TINY_WAN / "transformer")  # type: ignore[arg-type]
    return after, distance()
