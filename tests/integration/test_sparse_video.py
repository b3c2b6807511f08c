"""Dense weights in a sparse role at sparsity 0 make the same video as in a dense one: sampled, decoded, compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import REPOSITORY, tiny_argv

from titan_distill.config.loading import load_config
from titan_distill.diffusion.noise import KeyedNoise
from titan_distill.diffusion.requests import SampleRequest
from titan_distill.parallelisms.mesh import World
from titan_distill.resolve import resolve
from titan_distill.train import assemble
from titan_distill.validation.sampling import Sampling


@pytest.mark.parametrize("crossover", ["0.0", "0.5"])
def test_sparsity_zero_is_the_dense_model(crossover: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    overrides = ("sparsity", "0.0"), ("schedule_rate", "0.0"), ("schedule_interval", "1"), ("crossover", crossover)
    argv = [text for key, value in overrides for text in (f"--sparse_attention.{key}", value)]
    trainer = assemble(
        resolve(load_config(tiny_argv("sparse", tmp_path, *argv)), 1), World(rank=0, size=1, device=torch.device("cpu"))
    )
    adapter = trainer.adapter
    adapter.start_step(trainer.roles, 0)
    condition = adapter.encode_prompts(["a red circle moving left slowly"])
    sampling = Sampling(adapter, KeyedNoise(0), torch.device("cpu"))
    latents = [
        sampling.run(SampleRequest(role, role, "euler", 3), trainer.roles[role], condition, [0])
        for role in ("teacher", "student")
    ]
    torch.testing.assert_close(latents[1], latents[0], rtol=1e-5, atol=1e-5)
    dense, sparse = (adapter.decode_latents(x).int() for x in latents)
    assert (dense - sparse).abs().max() <= 1  # a value on the edge between two bytes may round either way
    assert torch.equal(dense, sparse) or crossover == "0.0"
