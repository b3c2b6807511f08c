"""Layouts and resumes do not change training from first frames: per-frame times and masked losses on shared tokens.

DMD2 on latents and finetuning on videos that are encoded on the way, each against one process from the same weights:
losses and gradient norms at every step, all weights at the end. One launch of two ranks runs all rows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import tiny_ti2v
import torch
from resume_worker import run_jobs
from runs import HELPERS, largest, read_metrics, run_worker
from safetensors.torch import load_file
from tiny_media import write_video

from titan_distill.parallelisms.mesh import World

EXACT = 1e-5
STEPS, SAVED = 4, 2
# 3 × 2 × 5 tokens: two tiles, the second one narrower, for two ranks.
WIDTH, LATENT_SHAPE = 160, (48, 3, 4, 10)
DMD2, FINETUNE = "dmd2", "finetune"


@dataclass(frozen=True)
class Job:
    name: str
    arguments: list[str]
    saves_at: int | None = None
    mutant: None = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs lie when all have been run."""
    folder = tmp_path_factory.mktemp("layouts")
    tiny_ti2v.write_pipeline(folder / "pipeline")
    tiny_ti2v.write_data(folder / "data.parquet", shape=LATENT_SHAPE)
    lines = ["video,prompt"]
    for index in range(5):
        write_video(folder / f"{index}.mp4", 9 + index, size=(64, 96 + 32 * index))
        lines.append(f"{index}.mp4,ramp {index % 3}")
    (folder / "videos.csv").write_text("\n".join(lines))
    one = [_job(folder, method, "one process") for method in (DMD2, FINETUNE)]
    sequence = "--parallelism.sequence 2"
    two = [
        *(_job(folder, method, "fsdp 2", local_batch=2) for method in (DMD2, FINETUNE)),
        *(_job(folder, method, "sequence 2", sequence) for method in (DMD2, FINETUNE)),
        # Frame times travel with the samples to a teacher that serves both data groups.
        _job(folder, DMD2, "teacher on both", "--roles.teacher.parallelism.sequence 2", local_batch=2),
        _job(folder, DMD2, "saved", f"{sequence} --checkpoint.enabled true", saves_at=SAVED),
        _job(
            folder, DMD2, "resumed",
            f"--checkpoint.resume_from {folder}/dmd2_saved/checkpoints/step-{SAVED:08d}", local_batch=2,
        ),
    ]  # fmt: skip
    run_jobs(World(rank=0, size=1, device=torch.device("cpu")), [asdict(job) for job in one], folder)
    (folder / "two.json").write_text(json.dumps([asdict(job) for job in two]))
    run_worker(2, HELPERS / "resume_worker.py", folder / "two.json", folder, timeout=200)
    return folder


def _job(
    folder: Path, method: str, name: str, overrides: str = "", *, local_batch: int = 4, saves_at: int | None = None
) -> Job:
    name = f"{method} {name}".replace(" ", "_")
    data = folder / ("data.parquet" if method == DMD2 else "videos.csv")
    arguments = tiny_ti2v.arguments(
        method, folder / "pipeline", data, folder / name,
        # With this seed both ranks' shares of the first batch hold other kinds of samples.
        "--job.seed", "1", "--pipeline_config.width", str(WIDTH), "--training.steps", str(STEPS),
        "--optimizer.lr", "2e-4", "--training.local_batch_size", str(local_batch), *overrides.split(),
        *(("--method_config.update_ratio", "2") if method == DMD2 else ()),
    )  # fmt: skip
    return Job(name, arguments, saves_at)


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        *((DMD2, layout) for layout in ("fsdp 2", "sequence 2", "teacher on both", "resumed")),
        *((FINETUNE, layout) for layout in ("fsdp 2", "sequence 2")),
    ],
)
def test_layout_does_not_change_training_from_first_frames(folder: Path, method: str, layout: str) -> None:
    expected = {line["step"]: line for line in read_metrics(folder / f"{method}_one_process")}
    name = f"{method}_{layout.replace(' ', '_')}"
    found = {line["step"]: line for line in read_metrics(folder / name)}
    assert list(found) == list(range(SAVED + 1 if layout == "resumed" else 1, STEPS + 1))
    differences = [
        abs(found[step][key] - value) / abs(value)
        for step in found
        for key, value in expected[step].items()
        if key.startswith(("loss/", "grad_norm/", "dmd/"))
    ]
    assert len(differences) >= 2 * len(found) and largest(differences) <= EXACT
    weights, others = (load_file(folder / f"{run}.end.safetensors") for run in (f"{method}_one_process", name))
    names = [key for key in weights if key.startswith("weights/")]
    distance = sum((weights[key] - others[key]).double().square().sum() for key in names)
    size = sum(weights[key].double().square().sum() for key in names)
    assert isinstance(distance, torch.Tensor) and float((distance / size).sqrt()) <= EXACT
