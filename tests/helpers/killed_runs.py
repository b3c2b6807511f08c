"""Runs of the toy family that save every step and are killed, and what must hold of the folder they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import fault_points
import toy_family
import toy_run
from runs import HELPERS, REPOSITORY

from titan_distill.checkpoint import discovery, storage
from titan_distill.checkpoint.manager import CheckpointManager, RunInfo
from titan_distill.checkpoint.manifest import read_manifest, verify_hashes, verify_sizes

ASSETS = REPOSITORY / "tests" / "assets"
KEEP = 2


class Job:
    """One run in `folder`, started again and again with `--checkpoint.resume_from latest`."""

    def __init__(self, folder: Path, num_steps: int, num_ranks: int = 1) -> None:
        self.folder, self.num_steps, self.num_ranks = folder, num_steps, num_ranks
        self.checkpoints, self.log = folder / "run" / "checkpoints", folder / "log"
        self.data = toy_family.write_data(folder / "toy.parquet")

    def arguments(self, mode: str) -> list[str]:
        return [
            "--job.config_file", str(ASSETS / "toy_finetune.toml"),
            "--job.output_dir", str(self.folder / "run"), "--data.path", str(self.data),
            "--job.imports", "toy_family,fault_points",
            "--training.steps", str(self.num_steps), "--training.local_batch_size", "4",
            "--checkpoint.enabled", "true", "--checkpoint.interval", "1", "--checkpoint.keep", str(KEEP),
            "--checkpoint.mode", mode, "--checkpoint.resume_from", "latest", "--metrics.log_interval", "1",
        ]  # fmt: skip

    def start(self, mode: str, fault: str = "") -> subprocess.Popen[bytes]:
        """Through run_train.sh; output goes to `log`."""
        environment = {
            **os.environ, "PYTHONPATH": str(HELPERS), "PYTHON": sys.executable, "NGPU": str(self.num_ranks),
            "CUDA_VISIBLE_DEVICES": "", fault_points.VARIABLE: fault,
        }  # fmt: skip
        command = [str(REPOSITORY / "run_train.sh"), *self.arguments(mode)]
        with self.log.open("wb") as log:
            return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)

    def kill(self, run: subprocess.Popen[bytes]) -> None:
        """Everything at once, as when a machine loses its power; torchrun's workers have sessions of their own."""
        for pid in [*_descendants(run.pid), run.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.wait()

    def newest(self) -> int:
        """By name alone: what a rename has published. 0 when there is nothing."""
        steps = [path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*") if ".tmp" not in path.name]
        return max((int(step) for step in steps), default=0)

    def check_folder(self) -> None:
        """Whatever is named like a checkpoint is complete, down to the last bit, and discovery agrees."""
        named = discovery.step_folders(self.checkpoints)
        assert list(discovery.complete_steps(self.checkpoints)) == named
        for path in named:
            manifest = read_manifest(path)
            verify_sizes(path, manifest.files)
            verify_hashes(path, manifest)
            storage.read_metadata(path)

    def check_resumed(self, step: int) -> None:
        """The last run took up where `step` was published."""
        shown = self.log.read_text()
        name = discovery.step_name(step)
        assert not step or f"Resuming from {self.checkpoints / name}\n" in shown, f"not {name}: {shown[-3000:]}"

    def check_like_uninterrupted(self) -> None:
        """The newest checkpoint holds, byte for byte, what an undisturbed run holds at that step; one rank."""
        step = self.newest()
        (self.folder / "reference").mkdir()
        reference = toy_run.toy_trainer(
            self.folder / "reference", "finetune",
            "--training.steps", str(self.num_steps), "--training.local_batch_size", "4",
        )  # fmt: skip
        while reference.state.step < step:
            reference.train_step()
        manager = CheckpointManager(self.folder / "reference" / "checkpoints", 1, RunInfo("toy", ""))
        expected = manager.save(reference.roles, reference.state)
        found = self.checkpoints / discovery.step_name(step)
        assert read_manifest(found).files["__0_0.distcp"] == read_manifest(expected).files["__0_0.distcp"]


def _descendants(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    children = [int(child) for child in found.stdout.split()]
    return [descendant for child in children for descendant in [child, *_descendants(child)]]
