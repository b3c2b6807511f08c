"""Low-rank adapters and two experts train the same curve on any layout, and across a checkpoint in the middle.

Samples of a batch are for different experts. With two ranks and one sample in each micro-batch, a rank often has none
for one of them; the last micro-batch may have none on any rank. The layout matrix asks this of two experts in the
ordinary tier; here each is alone, too, and saved by one layout for another.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_worker import run_jobs
from runs import HELPERS, REPOSITORY, read_metrics, run_worker, tiny_argv
from safetensors.torch import load_file

from titan_distill.parallelisms.mesh import World

STEPS, SAVED = 5, 3
BOUND = 1e-5
# Adam's first steps divide a gradient by its own size, however small: rounding weighs more in them.
STATE_BOUND = 1e-4
CURVES = ("loss/", "grad_norm/", "dmd/")
COMMON = (
    "--pipeline_config.num_frames 9 --pipeline_config.width 32 --method_config.update_ratio 2 --ema.start_step 1 "
    "--lr_scheduler.warmup_steps 2"
)
ADAPTERS = "--roles.student.lora.rank 4 --roles.student.lora.alpha 8 --roles.critic.lora.rank 2"
pytestmark = pytest.mark.nightly
VARIANTS = {
    "adapters": ("dmd2", ADAPTERS),
    "experts": ("a14b", ""),
    "adapted experts": ("a14b", f"{ADAPTERS} --roles.student.lora.target_modules to_q,to_v"),
}
LAYOUTS = {"fsdp 2": ("--training.local_batch_size 1", None), "sequence 2": ("--parallelism.sequence 2", SAVED)}
RESUMED = "fsdp 2 after sequence 2"


def job(variant: str, layout: str, overrides: str, folder: Path, saves_at: int | None) -> dict[str, Any]:
    config, more = VARIANTS[variant]
    name = f"{variant} {layout}".replace(" ", "_")
    steps = ("--training.steps", str(STEPS))
    words = f"{COMMON} {more} {overrides}".split()
    return {
        "name": name,
        "arguments": tiny_argv(config, folder / name, *steps, *words),
        "saves_at": saves_at,
        "mutant": None,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    os.chdir(REPOSITORY)
    alone = [job(variant, "alone", "", folder, None) for variant in VARIANTS]
    run_jobs(World(0, 1, torch.device("cpu")), alone, folder)
    table = folder / "jobs.json"
    table.write_text(json.dumps([job for variant in VARIANTS for job in jobs_of(variant, folder)]))
    run_worker(2, HELPERS / "resume_worker.py", table, folder, timeout=550)
    return folder


def jobs_of(variant: str, folder: Path) -> list[dict[str, Any]]:
    """On two ranks: each layout, and a resume in one of what the other saved."""
    jobs = [job(variant, layout, overrides, folder, at) for layout, (overrides, at) in LAYOUTS.items()]
    saved = folder / jobs[-1]["name"] / "checkpoints" / f"step-{SAVED:08d}"
    resume = f"{LAYOUTS['fsdp 2'][0]} --checkpoint.resume_from {saved}"
    return [*jobs, job(variant, RESUMED, resume, folder, None)]


@pytest.mark.parametrize("layout", [*LAYOUTS, RESUMED])
@pytest.mark.parametrize("variant", VARIANTS)
def test_layout_does_not_change_training(folder: Path, variant: str, layout: str) -> None:
    reference, run = (folder / f"{variant} {name}".replace(" ", "_") for name in ("alone", layout))
    expected, found = read_metrics(reference)[-len(read_metrics(run)) :], read_metrics(run)
    assert len(found) == (STEPS - SAVED if layout == RESUMED else STEPS)
    for line, other in zip(expected, found, strict=True):
        for key, value in line.items():
            if key.startswith(CURVES):
                assert abs(other[key] - value) <= BOUND * abs(value), (key, line["step"])
    states, others = (load_file(f"{path}.end.safetensors") for path in (reference, run))
    assert states.keys() == others.keys()
    for kind in ("weights", "ema", "exp_avg"):
        names = [name for name in states if name.startswith(f"{kind}/") and states[name].ndim]
        assert names
        distance = sum(float((others[name] - states[name]).double().square().sum()) for name in names)
        assert distance <= STATE_BOUND**2 * sum(float(states[name].double().square().sum()) for name in names)


def test_the_experts_train_apart(folder: Path) -> None:
    """They start alike, so a routing that uses one for all would leave the other where it was, or both alike."""
    ends = load_file(f"{folder / 'adapted_experts_alone'}.end.safetensors")
    name = "blocks.0.attn1.to_q.lora_B.default.weight"
    for role in ("student", "critic"):
        first, second = (ends[f"weights/{role}/{module}.{name}"] for module in ("transformer", "transformer_2"))
        assert not torch.equal(first, second)
    assert f"ema/student/transformer_2.{name}" in ends
