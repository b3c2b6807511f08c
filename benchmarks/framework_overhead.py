"""Overhead of the framework over a bare loop: `python -m benchmarks.framework_overhead`.

Both do the same work on the small Wan: the forwards, the backward, the clip and the AdamW step of a DMD2 student update
and of a critic update. One is `Trainer.run_update`, with roles, adapter, keyed noise, fp64 losses, phase timers and
finiteness checks. The other is the loop that one would write by hand for exactly these shapes. They run in turn, update
by update, with the same rollout exit, so that a drifting machine hurts both alike; what counts is the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import write_result
from titan_distill.config.loading import load_config
from titan_distill.methods.dmd2 import Dmd2
from titan_distill.parallelisms.mesh import World
from titan_distill.resolve import resolve
from titan_distill.train import assemble
from titan_distill.trainer import Trainer

GUIDANCE = 4.0


class BareLoop:
    """DMD2 on three transformers, with nothing around it."""

    def __init__(self, trainer: Trainer) -> None:
        self.student, self.critic, self.teacher = (
            trainer.roles[name].transformer for name in ("student", "critic", "teacher")
        )
        method = trainer.method
        assert isinstance(method, Dmd2)
        self.sigmas = method.sigmas
        self.shape, self.shift = trainer.adapter.latent_shape, trainer.adapter.flow_shift
        self.negative = trainer.adapter.negative_condition(1)["text"]
        self.optimizers = {
            module: torch.optim.AdamW(module.parameters(), lr=1e-7, betas=(0.0, 0.999), fused=True)
            for module in (self.student, self.critic)
        }

    def student_update(self, text: Tensor, exit_index: int) -> None:
        x0 = self.rollout(text, exit_index)
        with torch.no_grad():
            sigma = self.random_sigma(len(text))
            x = (1 - sigma) * x0 + sigma * torch.randn_like(x0)
            fake = x - sigma * self.critic(x, 1000 * sigma.flatten(), text)
            both = torch.cat([text, self.negative.expand_as(text)])
            v = self.teacher(torch.cat([x, x]), 1000 * torch.cat([sigma, sigma]).flatten(), both)
            conditional, unconditional = v.chunk(2)
            real = x - sigma * (unconditional + GUIDANCE * (conditional - unconditional))
            g = (fake - real) / (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)
        self.step(self.student, 0.5 * (x0 - (x0 - g).detach()).square().mean())

    def critic_update(self, text: Tensor, exit_index: int) -> None:
        with torch.no_grad():
            x0 = self.rollout(text, exit_index)
        sigma, noise = self.random_sigma(len(text)), torch.randn_like(x0)
        x = (1 - sigma) * x0 + sigma * noise
        self.step(self.critic, (self.critic(x, 1000 * sigma.flatten(), text) - (noise - x0)).square().mean())

    def rollout(self, text: Tensor, exit_index: int) -> Tensor:
        x = torch.randn(len(text), *self.shape)
        with torch.no_grad():
            for sigma, following in zip(self.sigmas[:exit_index], self.sigmas[1:], strict=False):
                x0 = x - sigma * self.student(x, torch.full((len(text),), 1000 * sigma), text)
                x = (1 - following) * x0 + following * torch.randn_like(x)
        sigma = self.sigmas[exit_index]
        return x - sigma * self.student(x, torch.full((len(text),), 1000 * sigma), text)

    def random_sigma(self, num_samples: int) -> Tensor:
        u = torch.rand(num_samples, 1, 1, 1, 1)
        return (self.shift * u / (1 + (self.shift - 1) * u)).clamp(0.02, 0.98)

    def step(self, module: nn.Module, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 10.0)
        self.optimizers[module].step()
        self.optimizers[module].zero_grad()


def measure(trainer: Trainer, num_pairs: int) -> dict[str, dict[str, float]]:
    """Median seconds of both, and the median of the pairwise ratios, for student and critic updates."""
    bare, method = BareLoop(trainer), trainer.method
    batch = trainer.adapter.prepare_batch(next(trainer.loader))
    results = {}
    for role in ("student", "critic"):
        ours, theirs = [], []
        update = next(update for update in method.updates(0) if update.role == role)
        for step in range(num_pairs + 2):
            trainer.state.step = step
            exit_index = method.noise.index(f"dmd2/{role}/exit", step, 4)
            by_hand: Callable[[Tensor, int], None] = getattr(bare, f"{role}_update")
            pair = [
                (ours, lambda update=update: trainer.run_update(update, batch)),
                (theirs, lambda run=by_hand, index=exit_index: run(batch.text_embeddings, index)),
            ]
            for seconds, run in pair if step % 2 else reversed(pair):
                started = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - started)
        ours, theirs = ours[2:], theirs[2:]  # the first two warm up
        results[role] = {
            "framework_seconds": statistics.median(ours),
            "bare_seconds": statistics.median(theirs),
            "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        }
    return results


def main() -> None:
    """Measures and prints; with --out also writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            [
                "--job.config_file", "train_configs/tiny_wan_dmd2.toml", "--job.output_dir", folder,
                "--validation.enabled", "false", "--checkpoint.enabled", "false",
            ]
        )  # fmt: skip
        trainer = assemble(resolve(config, 1), World(rank=0, size=1, device=torch.device("cpu")))
        results = measure(trainer, arguments.pairs)
    for role, values in results.items():
        print(f"{role:<8} " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
    if arguments.out:
        write_result(arguments.out, {"command": f"framework_overhead --pairs {arguments.pairs}", "updates": results})


if __name__ == "__main__":
    main()
