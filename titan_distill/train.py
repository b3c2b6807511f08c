"""Entry point of a run: load the configuration, assemble the parts, train.

Whatever is wrong with the input is said in one sentence with exit code 2, before the first step; a failure after that
keeps its traceback, because it is ours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from titan_distill.attention.dense import order_backends
from titan_distill.checkpoint.initial_weights import is_reference, resolve_reference, weights_digest
from titan_distill.checkpoint.manager import CheckpointManager, RunInfo
from titan_distill.checkpoint.manifest import AdaptedBase, FrozenRole
from titan_distill.checkpoint.state import TrainState
from titan_distill.config.config import Config
from titan_distill.config.layouts import check_world, needs_group, role_parallelism
from titan_distill.config.loading import check_paths, help_text, load_config
from titan_distill.config.text import to_toml
from titan_distill.data.datasets import open_dataset
from titan_distill.data.loader import SampleLoader
from titan_distill.diffusion.noise import NOISE_VERSION, KeyedNoise
from titan_distill.fault_tolerance.exit_codes import (
    EXIT_BAD_INPUT,
    EXIT_COME_AGAIN,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
)
from titan_distill.fault_tolerance.ranks import RankFailure, Ranks
from titan_distill.fault_tolerance.signals import Stop
from titan_distill.fault_tolerance.watchdog import LostRankError, Watchdog, record_collectives
from titan_distill.methods.base import Head, TrainingMethod, method_class
from titan_distill.models.base import ModelFamily, model_family
from titan_distill.models.head import FeatureHead, build_head
from titan_distill.observability.banner import banner, closing
from titan_distill.observability.metrics import MetricsLogger
from titan_distill.observability.profiling import build_profiler
from titan_distill.observability.quiet import quiet_libraries
from titan_distill.observability.timing import PhaseTimer
from titan_distill.optimizer import build_optimizer, build_scheduler
from titan_distill.parallelisms.float8 import check_hardware
from titan_distill.parallelisms.fsdp import FsdpOptions
from titan_distill.parallelisms.lora import is_adapter
from titan_distill.parallelisms.mesh import Layouts, World, check_local_ranks, default_device, num_ranks, start_world
from titan_distill.parallelisms.tensor import check_async_communication
from titan_distill.planner.hardware import GPUS
from titan_distill.planner.plan import can_plan, fake_world, make_plan
from titan_distill.planner.report import memory_table
from titan_distill.roles import Ema, RoleHandle, RoleManager
from titan_distill.trainer import NonFiniteError, Trainer
from titan_distill.validation.validator import Validator

CONFIG_FILE = "--job.config_file"
CHECK = "--check"
"""Only check the input and exit: run_train.sh asks this before torchrun, which would turn one sentence into a traceback
a rank."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job. Returns the process's exit code, one of ``exit_codes``."""
    argv = sys.argv[1:] if argv is None else list(argv)
    _set_up_logging()
    with Stop() as stop:
        try:
            trainer = start(argv, stop)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_BAD_INPUT
        except KeyboardInterrupt:
            print("interrupted before the first step")
            return EXIT_INTERRUPTED
        return EXIT_DONE if trainer is None else train(trainer)


def start(argv: list[str], stop: Stop) -> Trainer | None:
    """Checks the command line and builds the run that it describes; None when it asks for less than a run."""
    if "--help" in argv or "-h" in argv:
        print(help_text(_config_file(argv)))
        return None
    config = load_config([argument for argument in argv if argument != CHECK])
    run_layout = check_world(config, num_ranks())
    if not config.job.dry_run:
        check_local_ranks()
        check_paths(config)
        config = spell_out_references(config)
        check_hardware(config.float8, default_device())
        if config.parallelism.async_tensor:
            check_async_communication(default_device())
    model_family(config.recipe.family)(config).check_layouts(run_layout.roles)
    if config.job.dry_run:
        print(dry_run(config))
        return None
    if CHECK in argv:
        return None
    record_collectives(config.job.output_folder / "logs", config.comm.init_timeout_seconds)
    world = start_world(config.comm.init_timeout_seconds, force_group=needs_group(config))
    watchdog = Watchdog(world.rank, world.size, config.comm.init_timeout_seconds)
    return assemble(config, world, watchdog, stop)


def spell_out_references(config: Config) -> Config:
    """``init_from = ".../latest#student:ema"`` becomes the step that it means now, for ``config.toml`` to keep.

    Raises ValueError for a reference that leads nowhere, or to another family's weights.
    """
    roles = dict(config.roles)
    for name, role in roles.items():
        if is_reference(role.init_from):
            found = resolve_reference(role.init_from)
            if found.manifest.family != config.recipe.family:
                raise ValueError(
                    f"roles.{name}.init_from = {role.init_from!r} is of family {found.manifest.family!r}, but "
                    f"recipe.family is {config.recipe.family!r}; choose a checkpoint of the same family"
                )
            roles[name] = dataclasses.replace(role, init_from=found.text)
    config = dataclasses.replace(config, roles=roles)
    return model_family(config.recipe.family)(config).spelled_out()


def train(trainer: Trainer) -> int:
    """Trains to the end, or to the step at which it is told to stop. Returns the exit code."""
    first_step = trainer.state.step
    try:
        with trainer.watchdog or nullcontext():
            finished = trainer.run()
    except (NonFiniteError, RankFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except (KeyboardInterrupt, LostRankError):
        if not trainer.stop.is_interrupted:
            raise
        # Ctrl-C reaches all ranks; one that waited for another in a collective is told of that one's leaving.
        print(f"interrupted at step {trainer.state.step}; --checkpoint.resume_from latest goes on from the last save")
        return EXIT_INTERRUPTED
    finally:
        trainer.metrics.close()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(closing(trainer.config, trainer.metrics.latest) if finished else _how_to_go_on(trainer, first_step))
    if dist.is_initialized():
        # A rank that leaves while others still talk to it makes gloo abort; rank 0's trackers may still upload.
        trainer.ranks.wait()
        dist.destroy_process_group()
    return EXIT_DONE if finished else EXIT_COME_AGAIN


def _how_to_go_on(trainer: Trainer, first_step: int) -> str:
    step, checkpoints = trainer.state.step, trainer.config.checkpoint
    if step == first_step:
        return f"stopped as asked before step {step + 1}: nothing new to save; the same command starts it again"
    if not checkpoints.enabled:
        return f"stopped as asked after step {step}; nothing is saved, because checkpoint.enabled = false"
    return (
        f"stopped as asked after step {step}, which is saved: the same command with --checkpoint.resume_from latest "
        "goes on from there"
    )


def _set_up_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    quiet_libraries()


def dry_run(config: Config) -> str:
    """Builds every role on the meta device, as rank 0 of a fake process group, and describes the run and its memory;
    needs neither weights nor data."""
    family = model_family(config.recipe.family)(config)
    with fake_world(num_ranks()) as world:
        roles = build_roles(config, family, build_layouts(config, world), world.device)
        _check_latent_space(family, roles)
        run_layout = check_world(config, world.size)
        described = banner(config, roles, world, run_layout.roles, run_layout.num_micro_batches)
        if not can_plan(config, roles):
            return described
        plan = make_plan(config, run_layout, roles, GPUS["H100"])
        return f"{described}\n\n{memory_table(plan)}"


def assemble(config: Config, world: World, watchdog: Watchdog | None = None, stop: Stop | None = None) -> Trainer:
    """Builds all parts of a run. Raises ValueError, in one sentence, for input that does not fit together."""
    folder = config.job.output_folder
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    method_type = method_class(config.recipe.method)
    family = model_family(config.recipe.family)(config)
    tensors = (*method_type.extra_tensors(config.method_config), *family.extra_tensors())
    needs_latents = family.needs_latents or method_type.needs_latents(config.method_config)
    dataset = open_dataset(config.data, tensors=tensors, video_size=family.video_size(), needs_latents=needs_latents)
    layouts = build_layouts(config, world)
    roles = build_roles(config, family, layouts, world.device)
    _check_latent_space(family, roles)
    adapter = family.build_adapter(world.device, layouts)
    timer = PhaseTimer(world.device)
    method = method_type(config.method_config, roles, adapter, KeyedNoise(config.job.seed), timer)
    add_optimizers(config, roles, method)

    checkpoints = None
    if config.checkpoint.enabled or config.checkpoint.resume_from:
        checkpoints = _checkpoint_manager(config, family, roles, world.device)
    state = TrainState(step=0, samples_seen=0, seed=config.job.seed)
    if config.checkpoint.resume_from:
        assert checkpoints is not None
        found = checkpoints.find(config.checkpoint.resume_from)
        if found is not None:
            state = checkpoints.load(found, roles)
        if state.seed != config.job.seed:
            raise ValueError(
                f"job.seed = {config.job.seed}, but the checkpoint was trained with seed {state.seed}, which keys its "
                f"noise and data order; set it to {state.seed}"
            )
        if state.step > config.training.steps:
            raise ValueError(
                f"training.steps = {config.training.steps}, but the checkpoint has done {state.step} already; raise it"
            )

    loader = SampleLoader(
        dataset,
        global_batch_size=config.training.global_batch_size,
        data_rank=layouts.data_rank,
        data_world_size=layouts.num_data_groups,
        seed=config.job.seed,
        max_text_tokens=config.data.max_text_tokens,
        samples_seen=state.samples_seen,
        num_workers=config.data.num_workers,
    )
    ranks = Ranks(config.comm.validation_timeout_seconds)
    validator = None
    if config.validation.enabled:
        makes_videos = family.video_size() is not None
        validator = Validator(config, adapter, folder / "validation", layouts, ranks, makes_videos=makes_videos)
    metrics = MetricsLogger(config, is_main=world.is_main, start_step=state.step, timer=timer, counter=adapter.work)
    if world.is_main:
        run_layout = check_world(config, world.size)
        print(banner(config, roles, world, run_layout.roles, run_layout.num_micro_batches))
    return Trainer(
        config=config,
        roles=roles,
        method=method,
        adapter=adapter,
        loader=loader,
        validator=validator,
        checkpoints=checkpoints if config.checkpoint.enabled else None,
        metrics=metrics,
        timer=timer,
        profiler=build_profiler(config.profiling, folder / "profile", world, first_step=state.step),
        state=state,
        layouts=layouts,
        ranks=ranks,
        watchdog=watchdog,
        stop=stop or Stop(),
    )


def build_layouts(config: Config, world: World) -> Layouts:
    """Who does what together, for the data and for every role. Making process groups is collective."""
    run = check_world(config, world.size)
    return Layouts(world, run.default, run.roles)


def build_roles(config: Config, family: ModelFamily, layouts: Layouts, device: torch.device) -> RoleManager:
    """Networks of all roles, laid out and loaded; optimizers come later, when the method has said how often it
    steps."""
    order_backends(device)
    heads = method_class(config.recipe.method).heads(config.method_config)
    modules = {
        name: family.build_modules(name, role, layouts.role(name), device)
        for name, role in config.roles.items()
        if name not in heads
    }
    for name, head in heads.items():
        modules[name] = {"transformer": _head(config, family, layouts, device, name, head, modules[head.of])}
    handles = []
    for name, role in config.roles.items():
        clip = config.training.max_grad_norm if role.max_grad_norm is None else role.max_grad_norm
        handle = RoleHandle(name, modules[name], role.trainable, max_grad_norm=clip)
        handle.adapters_only = role.lora.enabled
        if role.lora.enabled and not any(is_adapter(parameter) for parameter, _ in handle.network.named_parameters()):
            raise ValueError(f"roles.{name}.lora: the family {config.recipe.family!r} has no adapters; set rank to 0")
        handles.append(handle)
    return RoleManager(handles)


def _head(
    config: Config,
    family: ModelFamily,
    layouts: Layouts,
    device: torch.device,
    name: str,
    head: Head,
    read: Mapping[str, nn.Module],
) -> nn.Module:
    if len(read) > 1:
        raise ValueError(
            f"roles.{name} reads the features of {head.of}, which has {len(read)} experts and thus no one network for "
            f"all noise levels; give roles.{head.of} a single network"
        )
    (network,) = read.values()
    width = family.feature_width(network, head.depths)
    offload = role_parallelism(config, name).cpu_offload
    options = FsdpOptions(getattr(torch, config.training.dtype), cpu_offload=offload)
    return build_head(width, len(head.depths), layouts.role(name), device, options, config.job.seed)


def add_optimizers(config: Config, roles: RoleManager, method: TrainingMethod) -> None:
    """Optimizer, schedule and EMA of every trained role. The schedule's length is the role's own number of updates."""
    num_updates = Counter(update.role for step in range(config.training.steps) for update in method.updates(step))
    for role in roles.trainable:
        optimizer = build_optimizer(role.parameters(), config.optimizer_for(role.name))
        role.optimizers["transformer"] = optimizer
        role.schedulers["transformer"] = build_scheduler(optimizer, config.lr_scheduler, num_updates[role.name])
        if config.ema.decay and config.ema.role == role.name:
            role.ema = Ema(role.network, config.ema.decay, config.ema.start_step)


def _config_file(argv: Sequence[str]) -> str | None:
    chosen = None  # the last one counts, as in load_config
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if argument == CONFIG_FILE:
            chosen = following
        elif argument.startswith(f"{CONFIG_FILE}="):
            chosen = argument.removeprefix(f"{CONFIG_FILE}=")
    return chosen


def _checkpoint_manager(
    config: Config, family: ModelFamily, roles: RoleManager, device: torch.device
) -> CheckpointManager:
    info = RunInfo(
        family=config.recipe.family,
        config_digest=_experiment_digest(config),
        pipeline_config=dataclasses.asdict(config.pipeline_config),
        architectures={role.name: _architecture(family, role.transformer) for role in roles.trainable},
        frozen={
            name: FrozenRole(weights, weights_digest(weights))
            for name, role in config.roles.items()
            if not role.trainable and (weights := role.path or role.init_from)
        },
        bases={
            name: AdaptedBase(weights, weights_digest(weights), role.lora.scale)
            for name, role in config.roles.items()
            if role.lora.enabled and (weights := role.path or role.init_from)
        },
        noise_version=NOISE_VERSION,
    )
    folder, checkpoint = config.job.output_folder / "checkpoints", config.checkpoint
    timeout = config.comm.init_timeout_seconds
    return CheckpointManager(
        folder, checkpoint.keep, info, mode=checkpoint.mode, device=device, timeout_seconds=timeout
    )


def _architecture(family: ModelFamily, module: nn.Module) -> dict[str, Any]:
    return module.architecture() if isinstance(module, FeatureHead) else family.architecture(module)


def _experiment_digest(config: Config) -> str:
    """SHA-256 of the configuration without the keys that steer a run and do not define the experiment."""
    job = dataclasses.replace(config.job, output_dir="", dry_run=False)
    checkpoint = dataclasses.replace(config.checkpoint, resume_from="", mode="sync")
    experiment = dataclasses.replace(config, job=job, checkpoint=checkpoint)
    return hashlib.sha256(to_toml(experiment).encode()).hexdigest()


def _check_latent_space(family: ModelFamily, roles: RoleManager) -> None:
    networks = [role for role in roles if not isinstance(role.transformer, FeatureHead)]
    spaces = {role.name: family.latent_space(role.transformer) for role in networks}
    (first, expected), *others = spaces.items()
    for name, space in others:
        for key, value in space.items():
            if value != expected[key]:
                raise ValueError(
                    f"roles.{name} works on latents with {key} = {value}, but roles.{first} with {key} = "
                    f"{expected[key]}; all roles of a run must share one latent space"
                )


if __name__ == "__main__":
    sys.exit(record(main)())  # torchrun's summary then shows what failed, whichever ranks' output it shows
