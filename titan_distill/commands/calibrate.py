"""`titan-distill plan --calibrate`: the seconds of a job's parts, timed on this machine.

The job itself runs, in processes of its own and in a temporary folder beside its output: one step to warm up and three
to time, one batch of each sample set of its validation with few solver steps, and one save. Three corrections make this
the mean of a whole run:

- The steps are late ones in which as many roles as possible are updated, and each role's update is timed on its own: a
  student that is updated every fifth step costs a fifth of its update per step.
- Updates whose rollouts end at random are scaled by FLOPs: from those counted in the timed steps to those that the
  method declares on average.
- Forward passes and videos of a validation are timed apart, and multiplied by their numbers in a whole one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from titan_distill.fault_tolerance.signals import Stop, listen_early
from titan_distill.fault_tolerance.utf8 import restart_in_utf8

if __name__ == "__main__":
    restart_in_utf8()
    listen_early()

import torch

from titan_distill.config.config import Config
from titan_distill.diffusion.requests import SampleRequest, ValidationRequest
from titan_distill.fault_tolerance.exit_codes import EXIT_BAD_INPUT, EXIT_DONE
from titan_distill.methods.base import TrainingMethod
from titan_distill.observability.quiet import quiet_libraries
from titan_distill.parallelisms.mesh import num_ranks as ranks_of_run
from titan_distill.planner.hardware import of_machine
from titan_distill.planner.hours import Seconds
from titan_distill.planner.plan import can_plan, make_plan
from titan_distill.resolve import resolve
from titan_distill.train import start
from titan_distill.trainer import Trainer

NUM_STEPS = 3
"""Steps to time."""
NUM_LATE_STEPS = 1000
"""Last steps of the run among which they are chosen."""
NUM_PASSES = 2
"""Solver steps of each sample set."""
ALONE = (
    *("--checkpoint.resume_from", "", "--job.overwrite", "false", "--profiling.enabled", "false"),
    *("--metrics.tensorboard", "false", "--metrics.wandb", "false"),
)
"""Overrides that keep the timed run from the job's other runs."""


def calibrate(argv: Sequence[str], config: Config, num_ranks: int) -> Seconds:
    """Times the job of a command line on `num_ranks` ranks of this machine.

    Raises ValueError with the run's own sentence for input that it refuses, such as missing weights.
    """
    parent = config.job.output_folder.parent
    parent.mkdir(parents=True, exist_ok=True)  # the disk of the job's checkpoints
    print(f"timing {NUM_STEPS} steps of {config.job.name} on this machine", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=".calibration-", dir=parent) as scratch:
        result = Path(scratch) / "seconds.json"
        launcher = ["titan_distill.launch", "--standalone", "--nproc-per-node", str(num_ranks), "-m"]
        module = [*(launcher if num_ranks > 1 else []), "titan_distill.commands.calibrate"]
        command = [sys.executable, "-m", *module, str(result), *argv, "--job.output_dir", f"{scratch}/run", *ALONE]
        # As in run_train.sh: the ranks would fight for the cores.
        threads = max(1, (os.cpu_count() or 1) // num_ranks)
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ}
        environment.pop("WORLD_SIZE", None)  # a plan's own number of ranks
        done = subprocess.run(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", check=False
        )
        if done.returncode != EXIT_DONE:
            raise ValueError(f"--calibrate ran the job, which failed: {_sentence(done.stderr)}")
        return Seconds(**json.loads(result.read_text(encoding="utf-8")))


def _sentence(output: str) -> str:
    """Returns the sentence with which a run has failed."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1]


def main(argv: Sequence[str] | None = None) -> int:
    """Times the job of a command line, whose first word is the file for the result. Returns the exit code."""
    result, *words = sys.argv[1:] if argv is None else argv
    quiet_libraries()
    with Stop() as stop, ExitStack() as held:
        try:
            trainer = start(words, stop, held)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_BAD_INPUT
        assert trainer is not None, "neither help nor a dry run is asked for"
        with trainer.watchdog or nullcontext():
            seconds = measure(trainer)
        trainer.metrics.close()
        if trainer.ranks.rank == 0:
            Path(result).write_text(json.dumps(asdict(seconds)), encoding="utf-8")
        trainer.ranks.wait()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return EXIT_DONE


def measure(trainer: Trainer) -> Seconds:
    """Times the parts of a run that has not begun. Collective."""
    baselines, validation = _validations(trainer)
    step = _step(trainer)
    checkpoint = None
    if trainer.checkpoints is not None:
        started = _now(trainer)
        trainer.checkpoints.save(trainer.roles, trainer.state)
        trainer.checkpoints.before_change()
        checkpoint = _now(trainer) - started
        trainer.checkpoints.wait()
    return Seconds(step, baselines, validation, checkpoint)


def timed_steps(method: TrainingMethod, num_steps: int) -> list[int]:
    """Returns the steps to time: the last ones in which most roles are updated, and one for any role that has no update
    in them."""
    late = range(max(0, num_steps - NUM_LATE_STEPS), num_steps)
    due = {step: {update.role for update in method.updates(step)} for step in late}
    chosen = sorted(late, key=lambda step: (len(due[step]), step))[-NUM_STEPS:]
    for step in reversed(late):
        if not due[step] <= set().union(*(due[other] for other in chosen)):
            chosen.append(step)
    return sorted(chosen)


def _step(trainer: Trainer) -> float:
    """Returns the mean seconds of a step over the whole run."""
    training = trainer.config.training
    steps = timed_steps(trainer.method, training.steps)
    seconds: dict[str, list[float]] = defaultdict(list)
    flops: dict[str, float] = defaultdict(float)
    work = trainer.adapter.work
    for index, step in enumerate([steps[-1], *steps]):  # the first warms up
        trainer.state.step = step
        started = _now(trainer)
        if work is not None:
            work.drain()
        for name, _ in trainer.run_step():
            ended = _now(trainer)
            if index:
                seconds[name].append(ended - started)
                flops[name] += work.drain().hardware_flops if work is not None else 0.0
            started = ended
        trainer.state.samples_seen += training.global_batch_size
    num_updates = trainer.method.num_updates(trainer.config.method_config, training.steps)
    declared = _declared_flops(trainer)
    total = sum(seconds["step"]) / len(seconds["step"])
    for role, number in num_updates.items():
        if number and seconds[role]:
            counted = flops[role] / len(seconds[role])
            scale = declared[role] / counted if role in declared and counted else 1.0
            total += number / training.steps * scale * sum(seconds[role]) / len(seconds[role])
    return total


def _declared_flops(trainer: Trainer) -> dict[str, float]:
    """Returns the FLOPs of one update on this rank by role, as the method declares them."""
    run = resolve(trainer.config, ranks_of_run())
    if not can_plan(run, trainer.roles):
        return {}
    found: dict[str, float] = defaultdict(float)
    for phase in make_plan(run, trainer.roles, of_machine(trainer.layouts.device)).phases:
        passes = phase.passes
        found[passes.update] += phase.executed_flops / passes.updates_per_step / ranks_of_run()
    return found


def _validations(trainer: Trainer) -> tuple[float | None, float | None]:
    """Returns the seconds of the validation before the first step and of a later one; None without any."""
    started = _now(trainer)
    if trainer.held_out is not None:
        trainer.held_out.measure(0, trainer.roles)
    held_out, whole = _now(trainer) - started, trainer.validator
    if whole is None:
        return (held_out, held_out) if trainer.held_out is not None else (None, None)
    request = trainer.method.validation_request()
    samples = request.samples
    part = whole.of_first_prompts(trainer.config.validation.batch_size * trainer.layouts.num_data_groups)
    part.validate(0, ValidationRequest((_shortened(samples[0]),)), trainer.roles)  # warms up
    part = part.of_first_prompts(len(part.prompts))
    short = tuple(_shortened(replace(sample, baseline=True)) for sample in samples)
    part.validate(0, ValidationRequest(short, request.reference), trainer.roles)
    baselines = [sample for sample in samples if sample.baseline] or samples
    later = [sample for sample in samples if not sample.baseline]
    first, other = (
        part.meter.seconds({sample.label: whole.work(sample, trainer.roles) for sample in each})
        for each in (baselines, later)
    )
    assert first is not None and other is not None, "every role has been sampled"
    return first + held_out, other + held_out


def _shortened(sample: SampleRequest) -> SampleRequest:
    if sample.sigmas is None:
        return replace(sample, num_steps=min(NUM_PASSES, sample.num_steps))
    return replace(sample, num_steps=len(sample.sigmas[:NUM_PASSES]), sigmas=sample.sigmas[:NUM_PASSES])


def _now(trainer: Trainer) -> float:
    if trainer.layouts.device.type == "cuda":
        torch.cuda.synchronize(trainer.layouts.device)
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
