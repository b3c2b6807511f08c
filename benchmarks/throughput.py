"""How fast a configuration trains: ``python -m benchmarks.throughput CONFIG --steps N [--section.key VALUE ...]``.

The run is the trainer's own, assembled as ``titan_distill.train`` does, for the layout, precision, compilation and
cadence that CONFIG asks for. Only what speed does not depend on is made up, so that no weights and no data are needed:

- roles with a ``flavor`` start from random weights, whatever ``init_from`` names (roles with a ``path`` need it);
- the data are a few random rows of the configured latent and text sizes, in a parquet file that the loader reads;
- the negative prompt is a random embedding; there is no VAE, text encoder, validation or checkpoint.

It runs alone or on many ranks, one result for all: ``torchrun --nproc-per-node 8 -m benchmarks.throughput CONFIG ...``.

Two kinds of FLOPs are told apart. *Dense-equivalent* ones are what the mathematics needs with dense attention: they
compare runs by the work they get done, and MFU is their share of the GPU's peak. *Executed* ones are what the devices
compute, recomputation of activations included; HFU is their share. Both come from formulas (observability/flops.py) and
from the forwards that really ran, so random rollout exits and update ratios are counted as they fell.

Seconds of a phase are the device's; a forward inside no phase of the method (finetuning has none) is called "forward".
A phase's rate is that of rank 0. Times between phases (noise, losses, metrics) are the difference to the step's.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.machine import machine, write_result
from titan_distill.config.config import Config
from titan_distill.config.degrees import needs_group
from titan_distill.config.loading import load_config, to_toml
from titan_distill.config.sections import ValidationConfig
from titan_distill.data.loader import Batch
from titan_distill.data.parquet import LatentRow, write_rows
from titan_distill.methods.base import method_class
from titan_distill.models.base import Adapter, Condition, ModelFamily, model_family
from titan_distill.observability.flops import BACKWARD_FORWARDS, Work, peak_flops
from titan_distill.observability.metrics import memory_gib
from titan_distill.observability.timing import PhaseTimer
from titan_distill.parallelisms.mesh import Layouts, World, check_local_ranks, num_ranks, start_world
from titan_distill.registry import register_model
from titan_distill.resolve import resolve
from titan_distill.roles import RoleHandle, RoleManager
from titan_distill.train import EXIT_BAD_INPUT, assemble
from titan_distill.trainer import Trainer

NUM_ROWS = 8
BACKWARD, STEP = "backward", "step"


class NamedTimer(PhaseTimer):
    """A PhaseTimer that can be asked which phase is open."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.phases: list[str] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.phases.append(phase)
        with super().__call__(phase):
            yield
        self.phases.pop()


Entry = tuple[str, str, Work]
"""Phase, role, and what the role's network did in it."""


class MeasuredAdapter(Adapter):
    """A family's adapter that makes up the negative prompt and keeps a ledger of what the networks do."""

    def __init__(self, inner: Adapter, negative: Batch | None = None) -> None:
        self.inner, self.negative = inner, negative
        self.latent_shape, self.flow_shift, self.work = inner.latent_shape, inner.flow_shift, inner.work
        self.timer: NamedTimer | None = None
        self.ledger: list[Entry] = []

    def negative_condition(self, batch_size: int) -> Condition:
        assert self.negative is not None
        condition = self.inner.text_condition(self.negative)
        return {name: value.expand(batch_size, *value.shape[1:]) for name, value in condition.items()}

    def predict_velocity(self, role: RoleHandle, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        assert self.timer is not None and self.work is not None
        phase = self.timer.phases[-1] if self.timer.phases else "forward"
        if self.timer.phases:
            velocity = self.inner.predict_velocity(role, x, sigma_B, condition)
        else:
            with self.timer(phase):
                velocity = self.inner.predict_velocity(role, x, sigma_B, condition)
        total = self.work.drain()
        if not (torch.is_grad_enabled() and role.trainable):
            self.ledger.append((phase, role.name, total))
            return velocity
        forward = total.model_flops / (1 + BACKWARD_FORWARDS)
        backward = Work(total.model_flops - forward, total.hardware_flops - forward)
        self.ledger += [(phase, role.name, Work(forward, forward)), (BACKWARD, role.name, backward)]
        return velocity

    def start_step(self, roles: RoleManager, step: int) -> dict[str, float]:
        return self.inner.start_step(roles, step)

    def prepare_batch(self, batch: Batch) -> Batch:
        return self.inner.prepare_batch(batch)

    def share_batch(self, batch: Batch) -> Batch:
        return self.inner.share_batch(batch)

    def text_condition(self, batch: Batch) -> Condition:
        return self.inner.text_condition(batch)

    def held(self, x: Tensor, sigma_B: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        return self.inner.held(x, sigma_B, condition)

    def loss_mask(self, condition: Condition) -> Tensor | None:
        return self.inner.loss_mask(condition)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return self.inner.decode_latents(latents)

    def encode_video(self, videos: Tensor) -> Tensor:
        return self.inner.encode_video(videos)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        return self.inner.encode_prompts(prompts)


def measured_family(name: str) -> str:
    """Registers ``name``'s family with measuring adapters, and returns what it is called."""
    family: Any = model_family(name)

    class MeasuredFamily(family):
        def build_adapter(self, *arguments: Any) -> Adapter:
            return MeasuredAdapter(super().build_adapter(*arguments))

    register_model(f"measured_{name}")(MeasuredFamily)
    return f"measured_{name}"


def synthetic_config(config: Config, folder: Path, num_steps: int) -> Config:
    """``config`` for ``num_steps`` steps that read and write below ``folder`` only."""
    pipeline = config.pipeline_config
    if "path" in {field.name for field in dataclasses.fields(pipeline)}:
        pipeline = replace(pipeline, path="")
    return replace(
        config,
        job=replace(config.job, output_dir=str(folder / "run")),
        recipe=replace(config.recipe, family=measured_family(config.recipe.family)),
        roles={name: replace(role, init_from="") for name, role in config.roles.items()},
        pipeline_config=pipeline,
        data=replace(config.data, path=str(folder / "data.parquet"), num_workers=0, fps=None),
        training=replace(config.training, steps=num_steps),
        validation=ValidationConfig(enabled=False),
        checkpoint=replace(config.checkpoint, enabled=False, resume_from=""),
        metrics=replace(config.metrics, log_interval=num_steps, tensorboard=False, wandb=False),
        profiling=replace(config.profiling, enabled=False),
    )


def write_data(config: Config) -> None:
    """Random rows, equal on all ranks, with latents where the method wants them."""
    family = model_family(config.recipe.family)(config)
    needs_latents = family.needs_latents or method_class(config.recipe.method).needs_latents(config.method_config)
    latent_shape = family.build_adapter(torch.device("cpu"), Layouts.alone(torch.device("cpu"))).latent_shape
    text_shape = (config.data.max_text_tokens, _text_width(config, family))
    generator = torch.Generator().manual_seed(config.job.seed)
    rows = (
        LatentRow(
            id=str(index),
            caption=f"random {index}",
            text_embedding=torch.randn(text_shape, generator=generator),
            vae_latent=torch.randn(latent_shape, generator=generator) if needs_latents else None,
        )
        for index in range(NUM_ROWS)
    )
    write_rows(config.data.path, rows)


def _text_width(config: Config, family: ModelFamily) -> int:
    name, role = next(iter(config.roles.items()))
    return family.latent_space(family.build_module(name, role, None, torch.device("meta")))["text width"]


def build(config: Config, world: World) -> tuple[Trainer, MeasuredAdapter, NamedTimer]:
    """A trainer as a run's, with a timer and an adapter that can be asked."""
    write_data(config)
    trainer = assemble(resolve(config, world.size), world)
    assert isinstance(trainer.adapter, MeasuredAdapter)
    timer = NamedTimer(world.device)
    trainer.timer = trainer.method.timer = trainer.adapter.timer = timer
    first = trainer.adapter.prepare_batch(next(trainer.loader))
    trainer.adapter.negative = first.split(1)[0]
    return trainer, trainer.adapter, timer


@contextmanager
def started(config: Config, num_steps: int) -> Iterator[tuple[World, Trainer, MeasuredAdapter, NamedTimer]]:
    """The ranks and the trainer of a run of `num_steps` steps, until the block ends."""
    world = start_world(config.comm.init_timeout_seconds, force_group=needs_group(config))
    try:
        with tempfile.TemporaryDirectory() as folder:
            # One step more than will run: the metrics of the last one would take the timer's seconds.
            yield world, *build(synthetic_config(config, Path(folder), num_steps + 1), world)
        if dist.is_initialized():
            dist.barrier()
    finally:  # a process may go on to another run after one that failed
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass
class Measured:
    """What this rank saw of the measured steps. What belongs to no update is kept under ``STEP``."""

    seconds: float = 0.0
    num_updates: Counter[str] = field(default_factory=Counter)
    phase_seconds: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    """By update and phase."""
    entries: list[tuple[str, Entry]] = field(default_factory=list)
    """With the update they belong to."""

    def add(self, update: str, timer: NamedTimer, ledger: list[Entry]) -> None:
        """Takes what one update left in the timer and in the ledger."""
        self.num_updates[update] += 1
        for name, seconds in timer.drain().items():
            self.phase_seconds[update, name.removeprefix("time/")] += seconds
        self.entries += [(update, entry) for entry in ledger]
        ledger.clear()

    def work(self, update: str, phase: str) -> dict[str, Work]:
        """By role."""
        found: dict[str, list[Work]] = defaultdict(list)
        for entry_update, (entry_phase, role, work) in self.entries:
            if (entry_update, entry_phase) == (update, phase):
                found[role].append(work)
        return {role: total(works) for role, works in found.items()}


def total(works: Iterable[Work]) -> Work:
    """The sum."""
    works = list(works)
    return Work(sum(work.model_flops for work in works), sum(work.hardware_flops for work in works))


def measure(
    trainer: Trainer,
    adapter: MeasuredAdapter,
    timer: NamedTimer,
    num_warmup: int,
    num_steps: int,
    within: AbstractContextManager[None] | None = None,
) -> Measured:
    """Runs the trainer's updates as ``train_step`` does, and keeps what each of them took.

    The measured steps run within ``within``, which may watch them.
    """
    measured = Measured()
    for step in range(num_warmup):
        run_step(trainer, adapter, timer, step, measured)
    measured = Measured()
    _wait_for_all(timer)
    if timer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(timer.device)
    started = time.perf_counter()
    with within or nullcontext():
        for step in range(num_warmup, num_warmup + num_steps):
            run_step(trainer, adapter, timer, step, measured)
    _wait_for_all(timer)
    measured.seconds = time.perf_counter() - started
    return measured


def run_step(trainer: Trainer, adapter: MeasuredAdapter, timer: NamedTimer, step: int, measured: Measured) -> None:
    """Runs the updates that are due at `step`, and adds what they took to `measured`."""
    trainer.state.step = step
    for part, _ in trainer.run_step():
        measured.add(part, timer, adapter.ledger)


def _wait_for_all(timer: NamedTimer) -> None:
    with timer("wait"):
        _over_ranks(torch.zeros(1, device=timer.device), dist.ReduceOp.SUM)
    timer.drain()


def _over_ranks(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values, operation)
    return values


def report(config: Config, world: World, trainer: Trainer, measured: Measured, num_steps: int) -> dict[str, Any]:
    """The result as JSON-able values. Collective: work is summed over ranks and memory is the largest rank's."""
    assert trainer.adapter.work is not None
    own = total(work for _, (_, _, work) in measured.entries)
    flops = torch.tensor([own.hardware_flops, own.model_flops], dtype=torch.float64, device=world.device)
    executed, dense = _over_ranks(flops, dist.ReduceOp.SUM).tolist()
    memory = _over_ranks(torch.tensor(memory_gib(world.device), device=world.device), dist.ReduceOp.MAX)
    num_tokens = num_steps * config.training.global_batch_size * trainer.adapter.work.tokens_per_sample
    rate = measured.seconds * 1e12 * world.size
    peak = peak_flops(world.device)
    result = {
        "name": config.job.name,
        "config_digest": hashlib.sha256(to_toml(config).encode()).hexdigest(),
        "ranks": world.size,
        "steps": num_steps,
        "updates": {name: count for name, count in measured.num_updates.items() if name != STEP},
        "seconds_per_step": measured.seconds / num_steps,
        "tokens_per_second": num_tokens / measured.seconds,
        "tokens_per_second_per_rank": num_tokens / measured.seconds / world.size,
        "executed_tflops_per_rank": executed / rate,
        "dense_equivalent_tflops_per_rank": dense / rate,
        "peak_tflops": None if peak is None else peak / 1e12,
        "mfu": None if peak is None else dense / rate * 1e12 / peak,
        "hfu": None if peak is None else executed / rate * 1e12 / peak,
        "memory_gib": float(memory),
        "phases": phase_rows(measured, peak),
    }
    if peak is None:
        result["no_mfu_because"] = f"the peak of {_device_name(world.device)} is not in observability/flops.py"
    return result


def phase_rows(measured: Measured, peak: float | None) -> list[dict[str, Any]]:
    """One row an update and phase: seconds and work of one such update, rates, and the roles whose networks ran."""
    rows = []
    for (update, phase), seconds in measured.phase_seconds.items():
        works, count = measured.work(update, phase), measured.num_updates[update]
        row: dict[str, Any] = {"update": update, "phase": phase, "roles": sorted(works), "seconds": seconds / count}
        if works:
            work = total(works.values())
            row |= {
                "executed_tflop": work.hardware_flops / count / 1e12,
                "dense_equivalent_tflop": work.model_flops / count / 1e12,
                "executed_tflops": work.hardware_flops / seconds / 1e12,
                "dense_equivalent_tflops": work.model_flops / seconds / 1e12,
                "mfu": None if peak is None else work.model_flops / seconds / peak,
            }
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """The result for people."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    lines = [
        f"{result['name']}: {result['ranks']} ranks, {result['steps']} steps ({result['updates']})",
        f"  {result['seconds_per_step']:.3f} s/step · {result['tokens_per_second']:,.0f} tokens/s "
        f"({result['tokens_per_second_per_rank']:,.0f} a rank) · {result['memory_gib']:.2f} GiB",
        f"  TFLOP/s a rank: {result['executed_tflops_per_rank']:.4g} executed (HFU {share(result['hfu'])}), "
        f"{result['dense_equivalent_tflops_per_rank']:.4g} dense-equivalent (MFU {share(result['mfu'])})",
        f"  {'update':<10}{'phase':<12}{'network':<10}{'s':>10}{'TFLOP':>12}{'TFLOP/s':>10}{'MFU':>9}",
    ]
    for row in result["phases"]:
        work = f"{row['executed_tflop']:>12.4g}{row['executed_tflops']:>10.4g}" if row["roles"] else ""
        mfu = f"{share(row.get('mfu')):>9}" if row["roles"] else ""
        lines.append(
            f"  {row['update']:<10}{row['phase']:<12}{', '.join(row['roles']):<10}{row['seconds']:>10.4f}{work}{mfu}"
        )
    if reason := result.get("no_mfu_because"):
        lines.append(f"  no MFU: {reason}")
    return "\n".join(lines)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else machine()["processor"]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; with --out also writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int, required=True, help="steps to measure; a multiple of the method's cadence")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, with compilation and allocation")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.steps < 1 or arguments.warmup < 0:
        parser.error("--steps must be at least 1 and --warmup at least 0")
    try:
        config = load_config(["--job.config_file", str(arguments.config), *overrides])
        resolve(config, num_ranks(), without_files=True)
        check_local_ranks()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    with started(config, arguments.warmup + arguments.steps) as (world, trainer, adapter, timer):
        measured = measure(trainer, adapter, timer, arguments.warmup, arguments.steps)
        result = report(config, world, trainer, measured, arguments.steps)
        if world.is_main:
            print(table(result))
            if arguments.out:
                command = " ".join(["throughput", str(arguments.config), "--steps", str(arguments.steps), *overrides])
                write_result(arguments.out, {"command": command, "warmup_steps": arguments.warmup, **result})


if __name__ == "__main__":
    main()
