"""Parts that train: throughput at real sizes with random weights, and the golden curves."""

from __future__ import annotations

import functools
import json
import math
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import golden, throughput
from benchmarks.gpu_suite.worker import Cases, Context, Row
from titan_distill.checkpoint.manager import CheckpointManager, RunInfo
from titan_distill.config.loading import load_config
from titan_distill.trainer import Trainer

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "train_configs"
NUM_EXPENSIVE = 30

MAY_WAIT = ("_sum_over_ranks",)
"""Methods of the trainer in which the host waits for the device, once per update. Reading the timer waits, too, which
PyTorch does not count."""
WAITED = "called a synchronizing CUDA operation"
"""What PyTorch says where the host waits and must not."""

ONE_SAMPLE = ("--training.global_batch_size", "1", "--training.local_batch_size", "1", "--parallelism.dp_shard", "1")
WITHOUT_HIDDEN = ("--activation_checkpoint.store_hidden", "false")
"""Override of `wan1.3b_finetune` for one GPU: what the feed-forward keeps does not fit."""
FULL = ("--activation_checkpoint.mode", "full", "--activation_checkpoint.selective_interval", "none")

TOY = ("--compile.enabled", "false", "--training.global_batch_size", "2", "--training.local_batch_size", "1")
"""A rehearsal's overrides: compilation takes ten seconds per graph on a CPU."""


def finetune(context: Context) -> Cases:
    """1.3B at 32,760 tokens, compiled, in both modes of recomputation.

    First as shipped: all but one of a block's matrix products are kept. Two steps of warm-up, three steps, and one
    under the profiler. Then full recomputation: one step and two. The latter is profiled if the former failed, for
    lack of memory say.
    """
    if context.rehearse:
        return {"compiled": functools.partial(train, context, "tiny_wan_finetune", TOY, 1, 1, True)}
    done = context.scratch / "finetuned"
    shipped, full = (*ONE_SAMPLE, *WITHOUT_HIDDEN), (*ONE_SAMPLE, *FULL)

    def first() -> Iterator[Row]:
        yield from train(context, "wan1.3b_finetune", shipped, 2, 3, True)
        done.touch()

    def second() -> Iterator[Row]:
        yield from train(context, "wan1.3b_finetune", full, 1, 2, not done.exists())

    return {"compiled": first, "compiled, full recomputation": second}


def distillation(context: Context) -> Cases:
    """DMD2 14B to 1.3B with the teacher in host memory: one critic and one student update after as many to warm up."""
    overrides = ("--method_config.update_ratio", "1")
    if context.rehearse:
        return {"one update each": functools.partial(train, context, "tiny_wan_dmd2", (*TOY, *overrides), 1, 1)}
    overrides = (*overrides, *ONE_SAMPLE, "--compile.enabled", "false")
    return {"one update each": functools.partial(train, context, "wan14b_to_1.3b_1gpu", overrides, 1, 1)}


def training_rest(context: Context) -> Cases:
    """A sparse step and a float8 step, not compiled, and a checkpoint of 1.3B saved and loaded."""
    if context.rehearse:
        return {
            "sparse": functools.partial(train, context, "tiny_wan_sparse", TOY, 1, 1),
            "checkpoint": functools.partial(save_and_load, context, "tiny_wan_finetune", TOY),
        }
    overrides = (*ONE_SAMPLE, "--compile.enabled", "false")
    at_once = ("--sparse_attention.sparsity", "0.9", "--sparse_attention.schedule_rate", "0.9")
    at_once = (*at_once, "--sparse_attention.schedule_interval", "1")
    float8 = ("--float8.enabled", "true", *FULL)
    return {
        "sparse 0.9": functools.partial(train, context, "wan1.3b_sparse", (*overrides, *at_once), 1, 2),
        "float8": functools.partial(train, context, "wan1.3b_finetune", (*overrides, *float8), 1, 2),
        "checkpoint": functools.partial(save_and_load, context, "wan1.3b_finetune", (*overrides, *WITHOUT_HIDDEN)),
    }


def golden_curves(context: Context) -> Cases:
    """Each golden job on this device against the CPU's curve, and whether it ran what it is named for."""
    names = golden.NAMES[:1] if context.rehearse else golden.NAMES
    return {name: functools.partial(check_golden, name, context.device) for name in names}


def check_golden(name: str, device: str) -> Iterator[Row]:
    """Rows of `benchmarks.golden.check`; a curve that differs is a failure."""
    for row in golden.check(name, device):
        differs = {} if row["passed"] else {"failure": "wrong", "text": json.dumps(row)}
        yield row | differs


def train(
    context: Context, config: str, overrides: Sequence[str], warmup: int, steps: int, profiled: bool = False
) -> Iterator[Row]:
    """Rows of one run, whose measured steps fail where the host waits for the device. That costs a row that names the
    place, and the run starts anew without the watch: nothing that is measured depends on it."""
    arguments = (context, config, overrides, warmup, steps, profiled)
    try:
        yield from train_watched(*arguments, watch=no_host_waits)
        return
    except RuntimeError as error:
        if WAITED not in str(error):
            raise
        text = traceback.format_exc()[-4000:]
    yield {"failure": "the host waited", "text": text}
    yield from train_watched(*arguments)


def train_watched(
    context: Context,
    config: str,
    overrides: Sequence[str],
    warmup: int,
    steps: int,
    profiled: bool,
    watch: Callable[[Trainer], AbstractContextManager[None]] | None = None,
) -> Iterator[Row]:
    """Rows of one run: seconds to build it, the throughput's result, and the kernels of a profiled step."""
    loaded = load_config(["--job.config_file", str(CONFIGS / f"{config}.toml"), *overrides])
    began = time.monotonic()
    try:
        with throughput.started(loaded, warmup + steps + profiled) as (world, trainer, adapter, timer):
            yield {"seconds_to_build": round(time.monotonic() - began, 2)}
            within = None if watch is None else watch(trainer)
            measured = throughput.measure(trainer, adapter, timer, warmup, steps, within)
            result = throughput.report(loaded, world, trainer, measured, steps)
            phases = result.pop("phases")
            waits = "not watched" if watch is None else f"in {', '.join(MAY_WAIT)} only"
            others = {"config": config, "overrides": " ".join(overrides), "warmup_steps": warmup, "host_waits": waits}
            yield result | others
            yield from phases
            yield {"seconds_in_all": round(time.monotonic() - began, 2)}
            if profiled:
                yield from profile_step(context, trainer, adapter, timer, warmup + steps)
    finally:
        torch.compiler.reset()


@contextmanager
def no_host_waits(trainer: Trainer, set_mode: Callable[[str], object] | None = None) -> Iterator[None]:
    """Makes CUDA raise where the host waits for the device within the block, but in the methods `MAY_WAIT`.

    `set_mode` takes "error" and "default"; by default it is `torch.cuda.set_sync_debug_mode`, or nothing on a CPU.
    """
    if set_mode is None:
        set_mode = torch.cuda.set_sync_debug_mode if trainer.timer.device.type == "cuda" else str

    def allowed(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any) -> Any:
            set_mode("default")
            try:
                return method(*arguments)
            finally:
                set_mode("error")

        return call

    for name in MAY_WAIT:
        setattr(trainer, name, allowed(getattr(trainer, name)))
    set_mode("error")
    try:
        yield
    finally:
        set_mode("default")
        for name in MAY_WAIT:
            delattr(trainer, name)


def profile_step(
    context: Context,
    trainer: Trainer,
    adapter: throughput.MeasuredAdapter,
    timer: throughput.NamedTimer,
    step: int,
) -> Iterator[Row]:
    """Runs one step under the profiler: rows of its kernels, and `profile.json.gz`."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (context.device == "cuda")
    with profile(activities=activities) as profiler:
        throughput.run_step(trainer, adapter, timer, step, throughput.Measured())
    yield from expensive_kernels(profiler, context.device)
    profiler.export_chrome_trace(str(context.scratch / "profile.json.gz"))
    shutil.move(context.scratch / "profile.json.gz", context.out / "profile.json.gz")


def expensive_kernels(profiler: profile, device: str) -> Iterator[Row]:
    """Yield the kernels that took most time in the profiled step, with their share of all kernels' time."""
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    # Operators carry the time of the kernels they start: only events of the device itself are counted.
    # Annotations of FSDP and of the optimizer appear on the device as well; they enclose kernels and are none.
    events = [
        event
        for event in profiler.key_averages()
        if device == "cpu" or (event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation)
    ]
    total = sum(getattr(event, key) for event in events)
    for rank, event in enumerate(sorted(events, key=lambda event: -getattr(event, key))[:NUM_EXPENSIVE], 1):
        microseconds = getattr(event, key)
        row = {"rank": rank, "kernel": event.key[:200], "calls": event.count, "ms": microseconds / 1e3}
        yield row | {"share": microseconds / total}


def save_and_load(context: Context, config: str, overrides: Sequence[str]) -> Iterator[Row]:
    """Seconds and GB/s of a synchronous save of a trained role with its moments, and of loading it."""
    loaded = load_config(["--job.config_file", str(CONFIGS / f"{config}.toml"), *overrides])
    with throughput.started(loaded, 2) as (_, trainer, adapter, timer):
        throughput.run_step(trainer, adapter, timer, 0, throughput.Measured())  # moments come into being
        yield from time_checkpoint(trainer, context.scratch / "checkpoints")


def time_checkpoint(trainer: Trainer, folder: Path) -> Iterator[Row]:
    with CheckpointManager(folder, 1, RunInfo(family="wan", config_digest="")) as checkpoints:
        began = time.monotonic()
        saved = checkpoints.save(trainer.roles, trainer.state)
        seconds = time.monotonic() - began
        gigabytes = math.fsum(file.stat().st_size for file in saved.iterdir()) / 1e9
        yield {"save_seconds": seconds, "gigabytes": gigabytes, "gb_per_second": gigabytes / seconds}
        began = time.monotonic()
        checkpoints.load(saved, trainer.roles)
        seconds = time.monotonic() - began
        yield {"load_seconds": seconds, "gb_per_second": gigabytes / seconds}
