"""Entry point of a run: load the configuration, resolve it, assemble the parts, train.

Wrong input ends in one sentence with exit code 2, before the first step. A failure after that keeps its traceback,
because it is a fault of this code; the other ranks, which fail because one is lost, print none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from titan_distill.fault_tolerance.signals import Stop, listen_early
from titan_distill.fault_tolerance.utf8 import restart_in_utf8

if __name__ == "__main__":
    restart_in_utf8()
    listen_early()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns with a C++ stack of a node that has left

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from titan_distill.attention.dense import order_backends
from titan_distill.checkpoint import discovery
from titan_distill.checkpoint.initial_weights import weights_digest
from titan_distill.checkpoint.manager import CheckpointManager, RunInfo
from titan_distill.checkpoint.manifest import AdaptedBase, DataRecord, FrozenRole, read_manifest
from titan_distill.checkpoint.resuming import Resume, find_resume
from titan_distill.checkpoint.state import TrainState
from titan_distill.config.config import Config
from titan_distill.config.degrees import needs_group
from titan_distill.config.loading import help_text, in_one_sentence, load_config, to_toml
from titan_distill.config.parsing import COMMAND_LINE
from titan_distill.config.paths import of_key
from titan_distill.config.sections import DataConfig
from titan_distill.config.text import redacted, to_dict
from titan_distill.data.loader import DATA_PATH, SampleLoader, open_dataset
from titan_distill.data.rows import BadRowError, RowDataset
from titan_distill.diffusion.noise import NOISE_VERSION, KeyedNoise
from titan_distill.fault_tolerance.exit_codes import (
    EXIT_BAD_INPUT,
    EXIT_COME_AGAIN,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_UNHEALTHY,
)
from titan_distill.fault_tolerance.failures import report
from titan_distill.fault_tolerance.outputs import probe_folder
from titan_distill.fault_tolerance.ranks import RankFailure, Ranks
from titan_distill.fault_tolerance.run_folder import Run, check_folder, open_run, read_run, resumes
from titan_distill.fault_tolerance.run_lock import RunLock, check_free
from titan_distill.fault_tolerance.watchdog import LostRankError, Watchdog, record_collectives
from titan_distill.methods.base import Head, TrainingMethod
from titan_distill.methods.held_out import HELD_OUT, HeldOutLoss, check_held_out, held_out_section
from titan_distill.methods.unreached import unreached_schedules
from titan_distill.models.base import ModelFamily
from titan_distill.models.head import FeatureHead, build_head
from titan_distill.observability.banner import banner, closing, interrupted, stopped
from titan_distill.observability.metrics import MetricsLogger
from titan_distill.observability.profiling import build_profiler
from titan_distill.observability.quiet import quiet_libraries
from titan_distill.observability.starts import record_start
from titan_distill.observability.timing import PhaseTimer
from titan_distill.observability.trackers import check_trackers
from titan_distill.optimizer import build_optimizer, build_scheduler
from titan_distill.parallelisms.float8 import check_hardware
from titan_distill.parallelisms.fsdp import FsdpOptions
from titan_distill.parallelisms.lora import is_adapter
from titan_distill.parallelisms.mesh import (
    Layouts,
    World,
    check_local_ranks,
    check_rendezvous,
    default_device,
    is_main_process,
    num_ranks,
    start_world,
)
from titan_distill.parallelisms.tensor import check_async_communication
from titan_distill.planner.hardware import of_machine, planned_gpu
from titan_distill.planner.plan import fake_world
from titan_distill.planner.recorded import RunPlan
from titan_distill.resolve import ResolvedRun, resolve
from titan_distill.roles import Ema, RoleHandle, RoleManager
from titan_distill.trainer import NonFiniteError, Trainer
from titan_distill.validation.report.doctor import Doctor
from titan_distill.validation.scorers import check_prompts
from titan_distill.validation.validator import Validator

CHECK = "--check"
"""Option that only checks the input. run_train.sh gives it to one process before it starts all of them."""
HELP = ("--help", "-h")
IN_USE = "wait for it, stop it, or choose another --job.name"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job. Returns the process's exit code, one of `exit_codes`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    quiet_libraries()
    with Stop() as stop, ExitStack() as held:
        try:
            trainer = start(argv, stop, held)
        except ValueError as error:
            report(error)
            return EXIT_BAD_INPUT
        except RankFailure as error:
            report(error)
            return EXIT_FAILED
        except (KeyboardInterrupt, LostRankError) as error:
            if stop.is_interrupted:
                print("interrupted before the first step")
                return EXIT_INTERRUPTED
            report(error, is_consequence=True)
            return EXIT_FAILED
        return EXIT_DONE if trainer is None else train(trainer)


def start(argv: list[str], stop: Stop, held: ExitStack) -> Trainer | None:
    """Builds the run of a command line. Returns None for a command line that asks for less: help, a check, a dry
    run. `held` gets the lock of the output folder."""
    words = [word for word in argv if word not in (CHECK, *HELP)]
    if any(word in argv for word in HELP):
        print(help_text(words))
        return None
    config = load_config(words)
    run = resolve(config, num_ranks(), without_files=config.job.dry_run)
    if is_main_process():
        for sentence in (*config.validation.clipped(), *unreached_schedules(config, run.method)):
            print(f"warning: {sentence}")
    if config.job.dry_run:
        print(dry_run(run))
        return None
    check_machine(config)
    dataset: RowDataset[Any] | None = None
    if is_main_process():
        check_output(config)
        dataset = open_inputs(run)
        if CHECK in argv and (resume := find_resume(run.config)):
            resume.check_data(_data_record(dataset), run.config)
    if CHECK in argv:
        return None
    check_rendezvous()
    lock = held.enter_context(open_folder(config, redacted(argv))) if is_main_process() else None
    record_collectives(config.job.output_folder / "logs", config.comm.init_timeout_seconds)
    world = start_world(config.comm.init_timeout_seconds, force_group=needs_group(config))
    watchdog = Watchdog(world.rank, world.size, config.comm.init_timeout_seconds)
    with ExitStack() as guard:
        guard.enter_context(watchdog)
        trainer = assemble(run, world, watchdog, stop, lock, dataset)
        guard.pop_all()  # `train` goes on with the watchdog
    return trainer


def check_output(config: Config) -> None:
    """Raises ValueError for trackers that cannot start, and an output folder that is another run's or not writable."""
    check_trackers(config.metrics)
    folder = config.job.output_folder
    probe_folder(folder, "job.output_dir" if config.job.output_dir else "job.name")
    check_free(folder, IN_USE)
    check_folder(folder, config.checkpoint.resume_from, overwrite=config.job.overwrite)


@contextmanager
def open_folder(config: Config, command: Sequence[str]) -> Iterator[RunLock]:
    """Locks the output folder and makes it this run's. For one process per run. Raises as `check_output`."""
    folder, resume_from = config.job.output_folder, config.checkpoint.resume_from
    with RunLock(folder, remedy=IN_USE) as lock:
        is_own = resumes(folder, resume_from)
        parent, step = (None, 0) if not resume_from or is_own else _parent(Path(resume_from))
        open_run(
            folder,
            resume_from,
            overwrite=config.job.overwrite,
            command=command,
            parent=parent,
            parent_step=step,
            adopted=_saved_by(folder, resume_from) if is_own and read_run(folder) is None else "",
        )
        yield lock


def _parent(resume_from: Path) -> tuple[Run | None, int]:
    """Returns the run that saved a checkpoint of another folder, and the checkpoint's step."""
    with of_key("checkpoint.resume_from", resume_from):
        checkpoint = discovery.resolve(resume_from)
    return read_run(checkpoint.parent.parent), read_manifest(checkpoint).step


def _saved_by(folder: Path, resume_from: str) -> str:
    """Returns the id of the run that saved the checkpoint to resume from; "" for none, or one of version 0.1."""
    checkpoint = discovery.find(folder / "checkpoints", resume_from)
    return read_manifest(checkpoint).run if checkpoint else ""


def check_machine(config: Config) -> None:
    """Raises ValueError for a configuration that this machine cannot run."""
    check_local_ranks()
    check_hardware(config.float8, default_device())
    if config.parallelism.async_tensor:
        check_async_communication(default_device())


def train(trainer: Trainer) -> int:
    """Trains to the last step, or to the step at which the run is asked to stop. Returns the exit code."""
    first_step = trainer.state.step
    try:
        with trainer.watchdog or nullcontext():
            finished = trainer.run()
    except (NonFiniteError, RankFailure, BadRowError) as error:
        report(error)
        return EXIT_BAD_INPUT if isinstance(error, BadRowError) else EXIT_FAILED
    except (KeyboardInterrupt, LostRankError) as error:
        if not trainer.stop.is_interrupted:
            report(error, is_consequence=True)
            return EXIT_FAILED
        # Ctrl-C reaches all ranks. A rank that waits for another in a collective fails when that one leaves.
        saved = next(discovery.complete_steps(trainer.config.job.output_folder / discovery.CHECKPOINTS), None)
        print(interrupted(trainer.state.step, saved))
        return EXIT_INTERRUPTED
    finally:
        trainer.metrics.close()
    if not dist.is_initialized() or dist.get_rank() == 0:
        latest, step = trainer.metrics.latest, trainer.state.step
        print(
            closing(trainer.config, latest)
            if finished
            else stopped(trainer.config, step, first_step, trainer.stop.is_doctors)
        )
    if dist.is_initialized():
        # gloo aborts when a rank leaves while others still talk to it. Rank 0's trackers may still upload.
        trainer.ranks.wait()
        dist.destroy_process_group()
    return EXIT_DONE if finished else EXIT_UNHEALTHY if trainer.stop.is_doctors else EXIT_COME_AGAIN


def dry_run(run: ResolvedRun) -> str:
    """Builds every role on the meta device, as rank 0 of a fake process group, and describes the run and its memory.
    Needs neither weights nor data."""
    with fake_world(run.layout.default.world_size) as world:
        roles = build_roles(run, build_layouts(run, world), world.device)
        described = banner(run.config, roles, world, run.layout.roles, run.layout.num_micro_batches)
        plan = RunPlan.of(run, roles, planned_gpu())
        opened = "not opened: weights, data, prompts; a start checks them first"
        return "\n\n".join([described, *([] if plan is None else [plan.tables]), opened])


def assemble(
    run: ResolvedRun,
    world: World,
    watchdog: Watchdog | None = None,
    stop: Stop | None = None,
    lock: RunLock | None = None,
    dataset: RowDataset[Any] | None = None,
) -> Trainer:
    """Builds all parts of a run, with `dataset` if `open_inputs` has opened it on this rank already. Raises ValueError,
    in one sentence, for input that does not fit together."""
    config, folder = run.config, run.config.job.output_folder
    ranks = Ranks(config.comm.validation_timeout_seconds)
    # Before the weights, which take longer, and before config.toml is replaced.
    dataset = open_inputs(run) if dataset is None else dataset
    resume = ranks.on_rank_zero(lambda: _check_resume(config, dataset))
    if resume is not None:
        dataset.order_version = resume.order_version
    layouts = build_layouts(run, world)
    roles = build_roles(run, layouts, world.device)
    adapter = run.family.build_adapter(world.device, layouts)
    timer, stop = PhaseTimer(world.device), stop or Stop()
    method = run.method(config.method_config, roles, adapter, KeyedNoise(config.job.seed), timer)
    add_optimizers(config, roles, method)
    checkpoints, state = _resume(run, resume, roles, dataset, world.device, lock)
    plan = RunPlan.of(run, roles, of_machine(world.device)) if world.is_main else None
    if world.is_main:  # now that all is read: a refused resume leaves the file of the run as it is
        record_start(config, world, run.layout.roles, state.step)
        if plan is not None:
            plan.write(folder)
    if watchdog is not None:
        watchdog.step = state.step
    validator = None
    if config.validation.enabled:
        makes_videos = run.family.video_size() is not None
        validator = Validator(config, adapter, folder / "validation", layouts, ranks, makes_videos=makes_videos)
    rows = _open_rows(run, held_out_section(config), HELD_OUT) if config.validation.data else None
    adapter.release_text_encoder()
    trainer = Trainer(
        config=config,
        roles=roles,
        method=method,
        adapter=adapter,
        loader=SampleLoader.of_run(config, dataset, layouts.data_rank, layouts.num_data_groups, state.samples_seen),
        validator=validator,
        checkpoints=checkpoints,
        metrics=MetricsLogger(
            config,
            is_main=world.is_main,
            start_step=state.step,
            timer=timer,
            counter=adapter.work,
            planned_gib=None if plan is None else plan.memory_gib,
        ),
        timer=timer,
        profiler=build_profiler(config.profiling, folder / "profile", world, first_step=state.step),
        state=state,
        layouts=layouts,
        ranks=ranks,
        step_ranks=Ranks(config.comm.init_timeout_seconds),
        doctor=Doctor(config, method.signals, layouts, timer, stop, is_main=world.is_main, start_step=state.step),
        held_out=None if rows is None else HeldOutLoss(config, rows, method, adapter, layouts, ranks),
        watchdog=watchdog,
        stop=stop,
    )
    if world.is_main:
        print(banner(config, roles, world, run.layout.roles, run.layout.num_micro_batches))
    if plan is not None:
        print(plan.line)
        trainer.metrics.expect(plan.pauses)
    return trainer


def build_layouts(run: ResolvedRun, world: World) -> Layouts:
    """Builds the meshes of the data and of every role. Collective, because process groups are."""
    return Layouts(world, run.layout.default, run.layout.roles, run.layout.in_turn)


def build_roles(
    run: ResolvedRun, layouts: Layouts, device: torch.device, names: Collection[str] | None = None
) -> RoleManager:
    """Builds, shards and loads the networks of the roles in `names` (default: all). Optimizers come later, when the
    method has said how often it updates a role."""
    order_backends(device)
    names = run.config.roles if names is None else names
    heads = {name: head for name, head in run.method.heads(run.config.method_config).items() if name in names}
    modules = {
        name: run.family.build_modules(name, run.config.roles[name], layouts.role(name), device)
        for name in names
        if name not in heads
    }
    run.family.check_latent_spaces(modules)
    for name, head in heads.items():
        modules[name] = {"transformer": _build_head(run, name, head, modules[head.of], layouts, device)}
    return RoleManager([_handle(run.config, name, modules[name]) for name in names])


def _handle(config: Config, name: str, modules: dict[str, nn.Module]) -> RoleHandle:
    role = config.roles[name]
    clip = config.training.max_grad_norm if role.max_grad_norm is None else role.max_grad_norm
    handle = RoleHandle(name, modules, role.trainable, max_grad_norm=clip, adapters_only=role.lora.enabled)
    if role.lora.enabled and not any(is_adapter(parameter) for parameter, _ in handle.network.named_parameters()):
        raise ValueError(f"roles.{name}.lora: the family {config.recipe.family!r} has no LoRA adapters; set rank to 0")
    return handle


def _build_head(
    run: ResolvedRun, name: str, head: Head, read: Mapping[str, nn.Module], layouts: Layouts, device: torch.device
) -> nn.Module:
    if len(read) > 1:
        raise ValueError(
            f"roles.{name} reads the features of {head.of}, which has {len(read)} experts and thus no one network for "
            f"all noise levels; give roles.{head.of} a single network"
        )
    (network,) = read.values()
    width = run.family.feature_width(network, head.depths)
    offload = run.config.roles[name].parallelism.cpu_offload
    options = FsdpOptions(getattr(torch, run.config.training.dtype), cpu_offload=offload)
    return build_head(width, len(head.depths), layouts.role(name), device, options, run.config.job.seed)


def add_optimizers(config: Config, roles: RoleManager, method: TrainingMethod) -> None:
    """Adds optimizer, learning-rate schedule and EMA to every trained role. A schedule lasts as long as the role has
    updates."""
    num_updates = method.num_updates(config.method_config, config.training.steps)
    for role in roles.trainable:
        optimizer = build_optimizer(role.parameters(), config.roles[role.name].optimizer)
        role.optimizers["transformer"] = optimizer
        role.schedulers["transformer"] = build_scheduler(optimizer, config.lr_scheduler, num_updates[role.name])
        if config.ema.decay and config.ema.role == role.name:
            role.ema = Ema(role.network, config.ema.decay, config.ema.start_step)


def open_inputs(run: ResolvedRun) -> RowDataset[Any]:
    """Opens the training data and reads its first rows, the held-out rows and the prompts of validation. Raises
    ConfigError, in seconds, for any that do not fit the run."""
    config = run.config
    with in_one_sentence(config.job.config_file or COMMAND_LINE):
        dataset = _open_rows(run, config.data)
        if config.validation.data:
            check_held_out(config, _open_rows(run, held_out_section(config), HELD_OUT), dataset)
        if config.validation.enabled:
            check_prompts(config)
    return dataset


def _open_rows(run: ResolvedRun, data: DataConfig, key: str = DATA_PATH) -> RowDataset[Any]:
    method_config, family = run.config.method_config, run.family
    return open_dataset(
        data,
        tensors=(*run.method.extra_tensors(method_config), *family.extra_tensors()),
        video_size=family.video_size(),
        needs_latents=family.needs_latents or run.method.needs_latents(method_config),
        checks=(*family.row_checks(), *run.method.row_checks(run.config)),
        encoders=family.encoder_digests(),
        buckets=family.buckets(),
        statistics=family.latent_statistics(),
        key=key,
    )


def _check_resume(config: Config, dataset: RowDataset[Any]) -> Resume | None:
    """Returns the checkpoint to resume from, if there is one, and logs what has changed since. Raises ValueError for a
    change of configuration or data that a resume refuses."""
    resume = find_resume(config)
    if resume is not None:
        resume.check_data(_data_record(dataset), config)
        resume.log_changes()
    return resume


def _data_record(dataset: RowDataset[Any]) -> DataRecord:
    return DataRecord(len(dataset), dataset.digest, dataset.order_version)


def _resume(
    run: ResolvedRun,
    resume: Resume | None,
    roles: RoleManager,
    dataset: RowDataset[Any],
    device: torch.device,
    lock: RunLock | None,
) -> tuple[CheckpointManager | None, TrainState]:
    """Loads the checkpoint to resume from, if there is one. Returns the manager for further saves (None if they are
    disabled) and the first state."""
    state = TrainState(step=0, samples_seen=0, seed=run.config.job.seed)
    if not (run.config.checkpoint.enabled or resume):
        return None, state
    checkpoints = _checkpoint_manager(run, roles, dataset, device, lock)
    if resume is not None:
        state = checkpoints.load(resume.path, roles)
    return checkpoints if run.config.checkpoint.enabled else None, state


def _checkpoint_manager(
    run: ResolvedRun, roles: RoleManager, dataset: RowDataset[Any], device: torch.device, lock: RunLock | None
) -> CheckpointManager:
    config, checkpoint = run.config, run.config.checkpoint
    stored = {name: weights for name, role in config.roles.items() if (weights := role.path or role.init_from)}
    info = RunInfo(
        family=config.recipe.family,
        config_digest=_experiment_digest(config),
        pipeline_config=dataclasses.asdict(config.pipeline_config),
        architectures={role.name: _architecture(run.family, role.transformer) for role in roles.trainable},
        frozen={
            name: FrozenRole(weights, weights_digest(weights))
            for name, weights in stored.items()
            if not config.roles[name].trainable
        },
        bases={
            name: AdaptedBase(weights, weights_digest(weights), config.roles[name].lora.scale)
            for name, weights in stored.items()
            if config.roles[name].lora.enabled
        },
        run=owner.id if (owner := read_run(config.job.output_folder)) else "",
        noise_version=NOISE_VERSION,
        config=to_dict(config, skip_origins=True),
        data=_data_record(dataset),
    )
    return CheckpointManager(
        config.job.output_folder / "checkpoints",
        checkpoint.keep,
        info,
        mode=checkpoint.mode,
        device=device,
        timeout_seconds=config.comm.init_timeout_seconds,
        lock=lock,
    )


def _architecture(family: ModelFamily, module: nn.Module) -> dict[str, Any]:
    return module.architecture() if isinstance(module, FeatureHead) else family.architecture(module)


def _experiment_digest(config: Config) -> str:
    """SHA-256 of the configuration without the keys that steer a run and do not define the experiment."""
    job = dataclasses.replace(config.job, output_dir="", dry_run=False)
    checkpoint = dataclasses.replace(config.checkpoint, resume_from="", mode="sync")
    experiment = dataclasses.replace(config, job=job, checkpoint=checkpoint)
    return hashlib.sha256(to_toml(experiment).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(record(main)())  # torchrun's summary, or ours, shows what failed, whichever ranks' output is shown
