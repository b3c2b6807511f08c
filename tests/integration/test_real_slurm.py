"""scripts/slurm/train.sbatch under a real SLURM: munged, slurmctld and two slurmd on this machine, one rank per node.

scripts/slurm/install_test_cluster installs the packages and scripts/slurm/test_cluster starts the daemons. An
interrupted run has the metrics of an undisturbed one, bit for bit. docs/multi_node.md says what was seen here.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import toy_family
from forked import train_forked
from runs import REPOSITORY, read_metrics
from test_two_nodes import saved_steps

SCRIPT = REPOSITORY / "scripts" / "slurm" / "train.sbatch"
TEST_CLUSTER = REPOSITORY / "scripts" / "slurm" / "test_cluster"
TOY = REPOSITORY / "tests" / "assets" / "toy_finetune.toml"
ENDLESS = 1_000_000
NUM_REFERENCE_STEPS = 200

missing = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name, path="/usr/sbin:/usr/bin") is None]
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        bool(missing), reason=f"no {', '.join(missing)}; scripts/slurm/install_test_cluster installs it"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd and /etc/hosts need root"),
]


@dataclass
class Job:
    """A submitted job."""

    number: str
    """Job id."""
    folder: Path
    """Output folder of the run."""
    log: Path
    """The job's own output."""

    def field(self, name: str) -> str:
        """A field that `scontrol show job` prints, such as JobState."""
        shown = subprocess.run(["scontrol", "--oneliner", "show", "job", self.number], capture_output=True, text=True)
        return dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word).get(name, "")

    def wait_for(self, what: Callable[[], Any], seconds: float = 480) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"{self.field('JobState')} {self.field('ExitCode')}\n{self.output()}"
            time.sleep(0.3)

    def wait_for_state(self, state: str, seconds: float = 480) -> None:
        self.wait_for(lambda: self.field("JobState") == state, seconds)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: (self.folder / "metrics.jsonl").exists() and len(read_metrics(self.folder)) >= step)

    def wait_until_requeued_and_go_on(self, seconds: float = 240) -> int:
        """Waits for the requeue and starts the job at once, not after SLURM's two minutes. Returns the steps done."""
        self.wait_for(lambda: self.field("Restarts") == "1" and self.field("JobState") == "PENDING", seconds)
        self.wait_for(lambda: not self.processes(), 40)
        time.sleep(2)  # a start in the second of the end before is a failure to SLURM
        num_steps = len(read_metrics(self.folder)) if (self.folder / "metrics.jsonl").exists() else 0
        control("update", f"JobId={self.number}", "StartTime=now")
        return num_steps

    def cancel(self) -> None:
        subprocess.run(["scancel", self.number], check=True)
        self.wait_for_state("CANCELLED")
        self.wait_for(lambda: not self.processes(), 40)

    def processes(self) -> dict[int, dict[str, str]]:
        """Environment of each process that SLURM or another one of the job has started, by process id."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has just ended
                words = path.read_text(errors="replace").split("\0")
                environment = dict(word.split("=", 1) for word in words if "=" in word)
                if environment.get("SLURM_JOB_ID") == self.number:
                    found[int(path.parent.name)] = environment
        return found

    def process_of(self, **variables: str) -> int:
        """The oldest process of the job whose environment has these variables."""
        return min(pid for pid, environment in self.processes().items() if variables.items() <= environment.items())

    def output(self) -> str:
        """Everything that the job and its ranks have printed."""
        paths = [self.log, *(self.folder / "logs").rglob("*.log")]
        return "\n".join(path.read_text(errors="replace") for path in paths if path.exists())


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([TEST_CLUSTER, "up", folder], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PYTHON", sys.executable)
        family = str(Path(toy_family.__file__).parent)
        patch.setenv("PYTHONPATH", os.pathsep.join([family, os.environ.get("PYTHONPATH", "")]))
        yield
    subprocess.run([TEST_CLUSTER, "down", folder], check=True)


@pytest.fixture(autouse=True)
def end_jobs() -> Iterator[None]:
    yield
    subprocess.run(["scancel", "--user", str(os.geteuid())], check=True)
    deadline = time.monotonic() + 60
    while subprocess.check_output(["squeue", "--noheader"]) and time.monotonic() < deadline:
        time.sleep(0.5)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of a run that nobody disturbs, without SLURM."""
    folder = tmp_path_factory.mktemp("undisturbed")
    argv = ["--job.config_file", str(TOY), *arguments(folder, NUM_REFERENCE_STEPS)]
    codes = train_forked(2, argv, folder)
    assert codes == [0, 0], (folder / "rank0.txt").read_text(encoding="utf-8")
    return metrics(folder / "run")


def arguments(folder: Path, steps: int) -> list[str]:
    data = folder / "toy.parquet"
    if not data.exists():
        toy_family.write_data(data)
    return [
        "--data.path", str(data), "--job.output_dir", str(folder / "run"), "--training.steps", str(steps),
        "--training.local_batch_size", "4", "--checkpoint.enabled", "true", "--checkpoint.interval", "1000000",
    ]  # fmt: skip


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What training computed at each step, without times and memory."""
    computed = ("step", "samples_seen", "loss/", "grad_norm/", "lr/")
    return [{key: line[key] for key in line if key.startswith(computed)} for line in read_metrics(folder)]


def submit(
    folder: Path,
    *overrides: str,
    steps: int = ENDLESS,
    options: tuple[str, ...] = (),
    script: Path = SCRIPT,
    submitted_from: Path = REPOSITORY,
) -> Job:
    """Submits a job of the toy family that writes to `folder / "run"`, on both nodes unless the options say other."""
    log = folder / "job-%A_%a.txt" if any(option.startswith("--array") for option in options) else folder / "job.txt"
    submitted = subprocess.run(
        ["sbatch", "--parsable", "--nodes", "2", "--cpus-per-task", "1", "--output", str(log), *options,
         str(script), str(TOY), *arguments(folder, steps), *overrides],
        cwd=submitted_from, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return Job(submitted.stdout.strip(), folder / "run", log)


def control(*command: str) -> None:
    subprocess.run(["scontrol", *command], check=True)


def assert_goes_on_exactly(job: Job, num_steps: int, undisturbed: list[dict[str, Any]]) -> None:
    """The job, started again after `num_steps`, takes the steps that an undisturbed run takes."""
    assert num_steps + 5 <= NUM_REFERENCE_STEPS, "the machine was too fast for this test's few steps"
    job.wait_for_step(num_steps + 5)
    job.cancel()
    seen = metrics(job.folder)[:NUM_REFERENCE_STEPS]
    assert len(seen) >= num_steps + 5
    assert seen == undisturbed[: len(seen)]


def assert_stopped_quietly(job: Job) -> None:
    assert "stopped as asked after step" in job.output()
    assert "Traceback" not in job.output() and "frame #" not in job.output(), job.output()
    assert "Terminating StepId" not in job.output(), "srun took the stop for a crash"


def test_two_nodes_train_to_the_end(tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    job = submit(tmp_path, steps=20)
    job.wait_for_state("COMPLETED")
    assert job.field("ExitCode") == "0:0"
    assert metrics(job.folder) == undisturbed[:20]
    job.wait_for(lambda: not job.processes(), 10)


def test_wrong_input_is_exit_code_2(tmp_path: Path) -> None:
    job = submit(tmp_path, "--training.stepz", "4")
    job.wait_for_state("FAILED")
    assert job.field("ExitCode") == "2:0" and job.log.read_text().startswith("error: ")


@pytest.mark.parametrize("attempt", range(3))
def test_usr1_is_a_save_a_requeue_and_an_exact_continuation(
    attempt: int, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    """Several times: the order in which the nodes leave is a race."""
    job = submit(tmp_path)
    job.wait_for_step(3 + 2 * attempt)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job.number], check=True)
    num_steps = job.wait_until_requeued_and_go_on()
    assert max(saved_steps(job.folder)) == num_steps
    assert_stopped_quietly(job)
    assert_goes_on_exactly(job, num_steps, undisturbed)


@pytest.mark.parametrize("seconds", [0, 2, 5, 10])
def test_usr1_while_the_ranks_start_is_a_requeue(seconds: float, tmp_path: Path) -> None:
    job = submit(tmp_path)
    job.wait_for(lambda: any("SLURM_STEP_ID" in environment for environment in job.processes().values()))
    time.sleep(seconds)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job.number], check=True)
    job.wait_until_requeued_and_go_on()
    assert "Traceback" not in job.output() and "frame #" not in job.output(), job.output()
    job.wait_for_step(3)
    job.cancel()


def test_a_signal_to_one_rank_is_a_requeue(tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    job = submit(tmp_path)
    job.wait_for_step(3)
    os.kill(job.process_of(RANK="1"), signal.SIGUSR1)
    num_steps = job.wait_until_requeued_and_go_on()
    assert_stopped_quietly(job)
    assert_goes_on_exactly(job, num_steps, undisturbed)


def test_a_time_limit_is_a_requeue(tmp_path: Path) -> None:
    """SLURM counts time limits in minutes and warns up to one earlier than asked."""
    job = submit(tmp_path, options=("--time", "3", "--signal", "B:USR1@60"))
    job.wait_for_step(1)
    num_steps = job.wait_until_requeued_and_go_on(seconds=300)
    assert max(saved_steps(job.folder)) == num_steps
    assert_stopped_quietly(job)
    job.wait_for_step(num_steps + 5)
    job.cancel()
    seen = metrics(job.folder)
    (tmp_path / "whole").mkdir()
    argv = ["--job.config_file", str(TOY), *arguments(tmp_path / "whole", num_steps + 5)]
    assert train_forked(2, argv, tmp_path, timeout=400) == [0, 0]
    assert seen[: num_steps + 5] == metrics(tmp_path / "whole" / "run")


def test_scontrol_requeue_goes_on_from_what_is_saved(tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    job = submit(tmp_path, "--checkpoint.interval", "5")
    job.wait_for(lambda: saved_steps(job.folder))
    control("requeue", job.number)
    job.wait_until_requeued_and_go_on()
    assert_goes_on_exactly(job, max(saved_steps(job.folder)), undisturbed)


def test_scancel_saves_and_stays_cancelled(tmp_path: Path) -> None:
    job = submit(tmp_path)
    job.wait_for_step(3)
    job.cancel()
    assert job.field("Restarts") == "0"
    assert max(saved_steps(job.folder)) == len(read_metrics(job.folder))
    assert_stopped_quietly(job)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_rank_ends_all_nodes_and_the_job_fails(rank: str, tmp_path: Path) -> None:
    job = submit(tmp_path)
    job.wait_for_step(3)
    pid = job.process_of(RANK=rank)
    os.kill(pid, signal.SIGKILL)
    job.wait_for_state("FAILED")
    assert job.field("ExitCode") == "1:0" and job.field("Restarts") == "0"
    job.wait_for(lambda: not job.processes(), 40)
    shown = job.output()
    assert "Traceback" not in shown and "frame #" not in shown, shown
    last = read_metrics(job.folder)[-1]["step"]
    found = re.findall(
        rf"error: rank {rank} \(.*, pid {pid}\) was ended by SIGKILL .* after step (\d+); .*/node-{rank}/", shown
    )
    assert [int(step) in (last - 1, last) for step in found] == [True], shown
    told = [line for line in job.log.read_text().splitlines() if line.startswith("error: ")]
    assert len(told) <= 2, "one paragraph from each node's launcher"


@pytest.mark.parametrize("which", ["node 0", "node 1", "batch script"])
def test_a_killed_slurmstepd_is_a_save_and_a_requeue(
    which: str, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    job = submit(tmp_path)
    job.wait_for_step(3)
    is_batch = which == "batch script"
    first = job.process_of(SLURM_PROCID="0") if is_batch else job.process_of(SLURM_NODEID=which[-1], SLURM_STEP_ID="0")
    os.kill(slurmstepd_of(first), signal.SIGKILL)
    num_steps = job.wait_until_requeued_and_go_on()
    assert f"{which} has lost its slurmstepd" in job.log.read_text()
    assert max(saved_steps(job.folder)) == num_steps
    assert_goes_on_exactly(job, num_steps, undisturbed)


def slurmstepd_of(pid: int) -> int:
    """The slurmstepd that a process descends from."""
    while "slurmstepd" not in Path(f"/proc/{pid}/comm").read_text():
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid


def test_a_second_job_in_the_folder_is_refused_and_the_first_trains_on(tmp_path: Path) -> None:
    one_node, one_rank = ("--nodes", "1"), ("--training.local_batch_size", "8")
    first = submit(tmp_path, *one_rank, options=one_node)
    first.wait_for_step(3)
    second = submit(tmp_path, *one_rank, options=(*one_node, "--output", str(tmp_path / "second.txt")))
    second.wait_for_state("FAILED")
    assert second.field("ExitCode") == "2:0"
    told = (tmp_path / "second.txt").read_text()
    assert told.startswith("error: ") and told.count("\n") == 1 and f"SLURM job {first.number}; wait for it" in told
    num_steps = len(read_metrics(first.folder))
    first.wait_for_step(num_steps + 5)
    first.cancel()
    steps = [line["step"] for line in read_metrics(first.folder)]
    assert steps == list(range(1, len(steps) + 1)) and saved_steps(first.folder) == [len(steps)]


def test_a_job_array_trains_each_task_in_its_own_folder(tmp_path: Path) -> None:
    one_node = ("--array", "0-1", "--nodes", "1")
    one_rank = ("--training.local_batch_size", "8", "--job.output_dir", str(tmp_path / "run-%a"), "--job.seed", "%a")
    job = submit(tmp_path, *one_rank, steps=10, options=one_node)
    job.wait_for(lambda: not subprocess.check_output(["squeue", "--noheader", "--jobs", job.number]))
    first, second = metrics(tmp_path / "run-0"), metrics(tmp_path / "run-1")
    assert len(first) == len(second) == 10
    assert first[0]["loss/student"] != second[0]["loss/student"], "their seeds differ"


def test_a_job_without_the_submitting_environment_trains(tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    """A script of one's own sets the environment and hands over to the shipped one."""
    script = tmp_path / "mine.sbatch"
    names = ("PYTHON", "PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    exports = [f"export {name}={os.environ[name]}" for name in names if name in os.environ]
    script.write_text("\n".join(["#!/usr/bin/env bash", *exports, f'exec bash {SCRIPT} "$@"\n']))
    options = ("--export", "NONE", "--ntasks-per-node", "1", "--requeue", "--open-mode", "append")
    job = submit(tmp_path, options=options, script=script)
    job.wait_for_step(3)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job.number], check=True)
    num_steps = job.wait_until_requeued_and_go_on()
    assert_goes_on_exactly(job, num_steps, undisturbed)


def test_a_job_submitted_from_another_folder_trains(tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    """The package is installed, or on PYTHONPATH as here; relative paths start at the folder of submission."""
    (tmp_path / "elsewhere").mkdir()
    job = submit(tmp_path, "--job.output_dir", "mine", steps=10, submitted_from=tmp_path / "elsewhere")
    job.wait_for_state("COMPLETED")
    assert metrics(tmp_path / "elsewhere" / "mine") == undisturbed[:10]
