"""The resume oracle: a run that stopped and went on is the run that never stopped.

On one layout bit for bit: sample ids, losses, learning rates, cadence, and at the end every parameter, moment and
average. From any layout to any other, what is loaded is bit for bit what was saved, and the steps after it agree
within the rounding of sums. dmd2 with a student's update every third step, saved where critic-only steps follow; every
other method once, from one process to ranks that share weights or tokens.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bucket_data import BUCKETS, write_buckets
from mutants import is_caught
from resume_mutants import MUTANTS
from resume_worker import run_jobs
from runs import HELPERS, REPOSITORY, largest, read_metrics, record_pairs, run_worker, tiny_argv
from safetensors.torch import load_file
from torch import Tensor

from titan_distill.parallelisms.mesh import start_world
from titan_distill.train import main

BOUND = 1e-5
# Adam's first steps divide a gradient by its own size, however small: rounding weighs more in them.
STATE_BOUND = 1e-4
CURVES = ("loss/", "grad_norm/", "dmd/", "scm/")
EXACT_KEYS = ("lr/", "samples_seen", "vsa_sparsity")
# Three latent frames of 6 × 6 tokens: four tiles, three of them ragged.
COMMON = (
    "--pipeline_config.num_frames 9 --method_config.update_ratio 3 --lr_scheduler.warmup_steps 2 --ema.decay 0.8 "
    "--ema.start_step 1"
)


@dataclass(frozen=True)
class Experiment:
    """A job, its number of steps, and the step after which it is saved."""

    name: str
    overrides: str = ""
    saves_at: int = 4
    steps: int = 8
    global_batch: int = 4
    method: str = "dmd2"
    common: str = COMMON


@dataclass(frozen=True)
class Layout:
    name: str
    ranks: int
    overrides: str = ""
    data_ranks: int = 1
    """Ranks, or groups of them, that train on different samples."""


@dataclass(frozen=True)
class Trial:
    """`experiment` saved by the layout `source` and resumed by `target`."""

    experiment: Experiment
    source: Layout
    target: Layout
    mutant: str | None = None

    @property
    def is_exact(self) -> bool:
        return self.source == self.target and self.mutant is None

    @property
    def name(self) -> str:
        return f"{self.experiment.name}: {self.source.name} → {self.mutant or self.target.name}"


@dataclass(frozen=True)
class Job:
    """One stretch of training, as resume_worker reads it."""

    name: str
    ranks: int
    arguments: tuple[str, ...]
    saves_at: int | None = None
    mutant: str | None = None


CADENCE = Experiment("cadence")
# Training goes on while the save reads what it was.
ASYNC = Experiment("async", "--checkpoint.mode async")
# A step updates the student or the critic: saved after the first, the critic's optimizer has not stepped.
NOT_YET = Experiment("critic not yet", "--method_config.exclusive true", saves_at=1, steps=5)
# Of four tiles, a query reads 4, then 3, then 2.
SPARSE = Experiment(
    "sparse",
    "--roles.student.attention sparse --sparse_attention.sparsity 0.75 --sparse_attention.schedule_rate 0.25 "
    "--sparse_attention.schedule_interval 2 --sparse_attention.crossover 0.25",
    saves_at=2,
    steps=6,
)

# Averages, warm-ups and cadences in full motion when the run is saved.
OTHERS = {
    method: Experiment(method, overrides, 3, 6, 2, method, "--lr_scheduler.warmup_steps 2")
    for method, overrides in {
        "finetune": "--ema.decay 0.8 --ema.start_step 1",
        "kd": "--data.path {folder}/pairs --method_config.teacher_steps 4",
        "cm": "--ema.decay 0.8 --ema.start_step 1",
        "scm": "--method_config.tangent_warmup 4",
        "rcm": "--method_config.tangent_warmup 2 --method_config.update_ratio 2",
        "dmd2_gan": "--method_config.adversarial_weight 1",
        "self_forcing": "--roles.student.init_from tests/assets/tiny_wan/transformer --pipeline_config.num_frames 9 "
        "--method_config.denoising_steps [1000.0,500.0]",
        "ode_init": "--data.path {folder}/pairs --method_config.teacher_steps 4",
    }.items()
}

# Saved between batches of different shapes, after samples of an epoch were left over.
BUCKETED = Experiment(
    "buckets",
    f"--data.path {{folder}}/buckets {BUCKETS} --ema.decay 0.8 --ema.start_step 1",
    saves_at=5,
    steps=10,
    method="finetune",
    common="--lr_scheduler.warmup_steps 2",
)

P, TEACHER, CRITIC = "--parallelism.", "--roles.teacher.parallelism.", "--roles.critic.parallelism."
ONE = Layout("one process", 1)
FSDP_2 = Layout("fsdp 2", 2, data_ranks=2)
TENSOR_2 = Layout("tensor 2", 2, f"{P}tensor 2")
ULYSSES_2 = Layout("ulysses 2", 2, f"{P}sequence 2")
GATHER_2 = Layout("all-gather 2", 2, f"{P}sequence 2 {P}sequence_method all_gather")
BY_ROLE = Layout("teacher and critic tensor 2, student fsdp 2", 2, f"{TEACHER}tensor 2 {CRITIC}tensor 2", 2)
GATHER_3 = Layout("all-gather 3", 3, f"{P}sequence 3")
FSDP_4 = Layout("fsdp 4", 4, data_ranks=4)
HSDP_4 = Layout("hsdp 2 × 2", 4, f"{P}dp_replicate 2", 4)
FSDP_TENSOR = Layout("fsdp 2 × tensor 2", 4, f"{P}tensor 2", 2)
TENSOR_ULYSSES = Layout("tensor 2 × ulysses 2", 4, f"{P}tensor 2 {P}sequence 2")
CRITIC_4 = Layout("critic tensor 4, student fsdp 4", 4, f"{CRITIC}tensor 4", 4)

SHORT = tuple(
    Trial(replace(experiment, global_batch=2), source, target)
    for experiment, source, target in (
        (CADENCE, ONE, ONE),
        (CADENCE, ONE, BY_ROLE),
        (NOT_YET, ONE, TENSOR_2),
        (SPARSE, ONE, FSDP_2),
        (OTHERS["finetune"], ONE, ONE),
        (OTHERS["kd"], ONE, ULYSSES_2),
        (OTHERS["cm"], ONE, FSDP_2),
        (OTHERS["scm"], ONE, ULYSSES_2),
        (OTHERS["rcm"], ONE, FSDP_2),
        (OTHERS["self_forcing"], ONE, ULYSSES_2),
    )
)
LONG = (
    *(Trial(CADENCE, layout, layout) for layout in (FSDP_2, BY_ROLE, GATHER_3, HSDP_4, TENSOR_ULYSSES)),
    Trial(CADENCE, ONE, FSDP_2),
    Trial(CADENCE, FSDP_2, ONE),
    Trial(CADENCE, FSDP_2, BY_ROLE),
    Trial(CADENCE, FSDP_2, TENSOR_2),
    Trial(CADENCE, TENSOR_2, FSDP_2),
    Trial(CADENCE, TENSOR_2, ULYSSES_2),
    Trial(CADENCE, ULYSSES_2, TENSOR_2),
    Trial(CADENCE, ONE, GATHER_3),
    Trial(CADENCE, GATHER_3, FSDP_4),
    Trial(CADENCE, FSDP_4, GATHER_2),
    Trial(CADENCE, FSDP_2, HSDP_4),
    Trial(CADENCE, HSDP_4, FSDP_TENSOR),
    Trial(CADENCE, HSDP_4, ONE),
    Trial(CADENCE, TENSOR_ULYSSES, GATHER_3),
    Trial(CADENCE, TENSOR_ULYSSES, BY_ROLE),
    Trial(CADENCE, BY_ROLE, TENSOR_ULYSSES),
    Trial(CADENCE, ONE, CRITIC_4),
    Trial(CADENCE, CRITIC_4, FSDP_2),
    Trial(BUCKETED, ONE, ONE),
    Trial(BUCKETED, ONE, FSDP_2),
    Trial(BUCKETED, FSDP_2, TENSOR_2),
    Trial(BUCKETED, ULYSSES_2, ONE),
    Trial(BUCKETED, FSDP_2, FSDP_2),
    Trial(ASYNC, ONE, ONE),
    Trial(ASYNC, FSDP_2, FSDP_2),
    Trial(ASYNC, BY_ROLE, ONE),
    Trial(NOT_YET, ONE, ONE),
    Trial(NOT_YET, BY_ROLE, ONE),
    Trial(NOT_YET, ONE, HSDP_4),
    Trial(OTHERS["self_forcing"], ULYSSES_2, FSDP_2),
    Trial(OTHERS["ode_init"], ONE, FSDP_2),
    Trial(SPARSE, ONE, ONE),
    Trial(SPARSE, TENSOR_2, ULYSSES_2),
    Trial(SPARSE, ULYSSES_2, ONE),
    Trial(SPARSE, ONE, TENSOR_ULYSSES),
    *(Trial(OTHERS[method], ONE, ULYSSES_2) for method in ("cm", "rcm", "dmd2_gan")),
    *(Trial(OTHERS[method], ONE, FSDP_2) for method in ("kd", "scm", "dmd2_gan")),
)
MUTATED = tuple(Trial(CADENCE, ONE, ONE, mutant) for mutant in MUTANTS)
# The first of them waits for all of them to be trained.
NIGHTLY = (pytest.mark.nightly, pytest.mark.timeout(3600))
CASES = [
    *(pytest.param(trial, id=trial.name) for trial in SHORT),
    *(pytest.param(trial, id=trial.name, marks=NIGHTLY) for trial in LONG),
]


def source_job(trial: Trial, folder: Path) -> Job:
    """The run that saves and goes on without stopping."""
    return _job(trial.experiment, trial.source, "source", folder, trial.experiment.saves_at)


def unsaved_job(trial: Trial, folder: Path) -> Job:
    """The run that never stopped and never saved: saving must leave no trace in the run that saves."""
    return _job(trial.experiment, trial.source, "unsaved", folder, None)


def resumed_job(trial: Trial, folder: Path) -> Job:
    step = f"checkpoints/step-{trial.experiment.saves_at:08d}"
    resume = ("--checkpoint.resume_from", str(folder / source_job(trial, folder).name / step))
    job = _job(trial.experiment, trial.target, f"from {trial.source.name} {trial.mutant}", folder, None)
    return replace(job, arguments=(*job.arguments, *resume), mutant=trial.mutant)


def _job(experiment: Experiment, layout: Layout, part: str, folder: Path, saves_at: int | None) -> Job:
    name = "".join(c if c.isalnum() else "_" for c in f"{experiment.name}-{layout.name}-{part}")
    arguments = tiny_argv(
        experiment.method, folder / name,
        "--training.steps", str(experiment.steps), "--training.global_batch_size", str(experiment.global_batch),
        "--training.local_batch_size", str(experiment.global_batch // layout.data_ranks),
        "--checkpoint.enabled", str(saves_at is not None).lower(),
        *experiment.common.split(), *experiment.overrides.format(folder=folder).split(), *layout.overrides.split(),
    )  # fmt: skip
    return Job(name, layout.ranks, tuple(arguments), saves_at)


def launches(trials: tuple[Trial, ...], folder: Path) -> list[list[Job]]:
    """All jobs, a launch of ranks each list: nothing is resumed before it was saved, and ranks start few times.

    On the way up from one rank to four each launch trains its sources and resumes what fewer ranks saved; on the way
    down what more ranks saved.
    """
    up: dict[int, dict[str, Job]] = defaultdict(dict)
    down: dict[int, dict[str, Job]] = defaultdict(dict)
    for trial in trials:
        for job in (source_job(trial, folder), *([unsaved_job(trial, folder)] if trial.is_exact else ())):
            up[job.ranks][job.name] = job
    for trial in trials:
        job = resumed_job(trial, folder)
        (up if trial.source.ranks <= job.ranks else down)[job.ranks][job.name] = job
    ordered = [up[ranks] for ranks in sorted(up)] + [down[ranks] for ranks in sorted(down, reverse=True)]
    return [list(jobs.values()) for jobs in ordered]


def launch(jobs: list[Job], folder: Path) -> None:
    """Runs jobs of equally many ranks; those of one rank in this process, which is much sooner ready."""
    num_ranks = jobs[0].ranks
    table: list[dict[str, Any]] = [vars(job) for job in jobs]
    if num_ranks == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(REPOSITORY)
            run_jobs(start_world(300), table, folder)
        return
    file = folder / "jobs.json"
    file.write_text(json.dumps(table))
    run_worker(num_ranks, HELPERS / "resume_worker.py", file, folder, timeout=1800)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[Trial, ...]], Path]:
    """The folder with the finished jobs of some trials; trains all of them when it is first asked for."""

    @functools.cache
    def folder_of(trials: tuple[Trial, ...]) -> Path:
        folder = tmp_path_factory.mktemp("resume")
        record_pairs(folder / "pairs", num_pairs=4, num_steps=4)
        write_buckets(folder / "buckets")
        for jobs in launches(trials, folder):
            launch(jobs, folder)
        return folder

    return folder_of


@dataclass(frozen=True)
class Differences:
    """Largest relative differences between the run that never stopped and the one that was resumed."""

    losses: float
    gradient_norms: float
    end: float
    """L2, over the tensors of a kind (weights, averages, each moment), of the worst kind."""

    def __bool__(self) -> bool:
        return largest((self.losses, self.gradient_norms, self.end)) != 0

    @property
    def is_rounding(self) -> bool:
        return largest((self.losses, self.gradient_norms)) <= BOUND and self.end <= STATE_BOUND


def differences(expected: Path, found: Path, saves_at: int) -> Differences:
    """Compares all steps after `saves_at` and the final state.

    Values without rounding must be equal: sample ids, which losses there are at which step, learning rates,
    sparsity, and all counters.
    """
    ids, found_ids = (json.loads(Path(f"{run}.ids.json").read_text()) for run in (expected, found))
    assert found_ids[-len(ids[saves_at:]) :] == ids[saves_at:], "sample ids"
    lines, found_lines = read_metrics(expected)[saves_at:], read_metrics(found)[-len(ids[saves_at:]) :]
    found_at: dict[str, list[float]] = defaultdict(list)
    for line, other in zip(lines, found_lines, strict=True):
        assert line["step"] == other["step"]
        assert {key for key in line if key.startswith(CURVES)} == {key for key in other if key.startswith(CURVES)}
        for key, value in line.items():
            if key.startswith(CURVES):
                kind = "norm" if key.startswith("grad_norm/") else "loss"
                found_at[kind].append(abs(other[key] - value) / abs(value))
            elif key.startswith(EXACT_KEYS):
                assert other[key] == value, f"{key} at step {line['step']}"
    end = _state_distance(load_file(f"{expected}.end.safetensors"), load_file(f"{found}.end.safetensors"))
    return Differences(largest(found_at["loss"]), largest(found_at["norm"]), end)


def _state_distance(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    assert expected.keys() == found.keys()
    distances: dict[str, float] = defaultdict(float)
    sizes: dict[str, float] = defaultdict(float)
    for name, tensor in expected.items():
        kind = name.partition("/")[0]
        if kind == "random":
            continue
        if tensor.ndim == 0:
            assert torch.equal(found[name], tensor), name
        distances[kind] += float((found[name] - tensor).double().square().sum())
        sizes[kind] += float(tensor.double().square().sum())
    return largest((distances[kind] / sizes[kind]) ** 0.5 for kind in distances if sizes[kind])


def _assert_bitwise(expected: Path, found: Path) -> None:
    tensors, others = load_file(expected), load_file(found)
    assert tensors.keys() == others.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])] == []


def check(source: Path, resumed: Path, saves_at: int) -> None:
    assert differences(source, resumed, saves_at).is_rounding


@pytest.mark.parametrize("trial", CASES)
def test_a_resumed_run_is_the_run_that_never_stopped(
    trial: Trial, folder_of: Callable[[tuple[Trial, ...]], Path]
) -> None:
    folder = folder_of(SHORT if trial in SHORT else LONG + MUTATED)
    source, resumed = folder / source_job(trial, folder).name, folder / resumed_job(trial, folder).name
    saves_at = trial.experiment.saves_at
    _assert_bitwise(Path(f"{source}.saved.safetensors"), Path(f"{resumed}.loaded.safetensors"))
    if trial.is_exact:
        assert not differences(source, resumed, saves_at)
        assert not differences(folder / unsaved_job(trial, folder).name, resumed, saves_at)
    check(source, resumed, saves_at)


@pytest.mark.parametrize("trial", [pytest.param(trial, id=trial.mutant, marks=NIGHTLY) for trial in MUTATED])
def test_the_oracle_catches(trial: Trial, folder_of: Callable[[tuple[Trial, ...]], Path]) -> None:
    """In how training goes on, not only in what was loaded."""
    folder = folder_of(LONG + MUTATED)
    source, resumed = folder / source_job(trial, folder).name, folder / resumed_job(trial, folder).name
    assert is_caught(lambda: check(source, resumed, trial.experiment.saves_at))


def test_the_trials_hold_what_they_are_for(folder_of: Callable[[tuple[Trial, ...]], Path]) -> None:
    """A role that has not stepped has no moments in the checkpoint; the sparsity grows over the save."""
    folder = folder_of(SHORT)
    of_experiment = {trial.experiment.name: trial for trial in SHORT}
    not_yet = load_file(f"{folder / source_job(of_experiment['critic not yet'], folder).name}.saved.safetensors")
    assert (not_yet["num_updates/student"], not_yet["num_updates/critic"]) == (1, 0)
    assert not any(name.startswith("exp_avg/critic") for name in not_yet)
    sparse = read_metrics(folder / resumed_job(of_experiment["sparse"], folder).name)
    assert [line["vsa_sparsity_executed"] for line in sparse] == [0.25, 0.25, 0.5, 0.5]
    pairs = {(trial.source, trial.target) for trial in SHORT + LONG if trial.experiment.name == "cadence"}
    assert len([pair for pair in pairs if pair[0] != pair[1]]) >= 10


def test_a_finished_run_is_extended_and_keeps_its_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps to the end and three more are five steps in one go, bit for bit; W&B shows one run of five steps."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    constant = ("--lr_scheduler.decay", "constant", "--lr_scheduler.min_lr_ratio", "0", *COMMON.split())
    tracked = ("--metrics.wandb", "true", "--checkpoint.resume_from", "latest")
    long, extended = tmp_path / "long", tmp_path / "extended"
    assert main(tiny_argv("dmd2", long, *constant, "--training.steps", "5")) == 0
    for steps in ("2", "5"):
        assert main(tiny_argv("dmd2", extended, *constant, *tracked, "--training.steps", steps)) == 0

    assert [_comparable(line) for line in read_metrics(extended)] == [_comparable(line) for line in read_metrics(long)]
    first, second = extended.glob("wandb/offline-run-*")
    run_id = (extended / "wandb_run_id").read_text()
    assert first.name.endswith(f"-{run_id}")
    assert second.name.endswith(f"-{run_id}")


def _comparable(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key.startswith(("step", *CURVES, *EXACT_KEYS))}
