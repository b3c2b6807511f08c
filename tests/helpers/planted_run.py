"""A run's folder with known contents, written by the writers that a run uses: metrics, videos, request, starts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from titan_distill.diffusion.requests import REQUEST_NAME, SampleRequest, ValidationRequest
from titan_distill.fault_tolerance.run_folder import new_run, write_run
from titan_distill.fault_tolerance.starts import Start, append_start
from titan_distill.observability.metrics import MetricsFile
from titan_distill.validation.video import write_mp4

REQUEST = ValidationRequest(
    (
        SampleRequest("teacher", "teacher", "unipc", 48, guidance_scale=3.0, baseline=True),
        SampleRequest("teacher_few_steps", "teacher", "unipc", 4, guidance_scale=3.0, baseline=True),
        SampleRequest("student_before", "student", "sde", 4, (1.0, 0.9, 0.8, 0.5), baseline=True),
        SampleRequest("student", "student", "sde", 4, (1.0, 0.9, 0.8, 0.5)),
    ),
    reference="teacher",
)
LEVELS = {"teacher": 220, "teacher_few_steps": 160, "student_before": 40, "student": 130}
"""Brightness of each set's videos; frame t is darker by 2 t."""
PROMPTS = ("a <b>red</b> circle", "a blue square", "rain", "two </script> lines", "a fifth prompt")
CONFIG = """
[job]
name = "{name}"
[recipe]
method = "dmd2"
family = "wan"
[training]
steps = {steps}
[validation]
num_prompts = 96
[roles.teacher]
trainable = false
[roles.student]
trainable = true
"""
NUM_FRAMES, FPS = 9, 8


def plant_run(
    folder: Path, *, name: str = "planted", steps: int = 20, before: float = 0.4, now: float = 0.1, size: int = 64
) -> Path:
    """Writes the folder: `steps` steps with a resume in the middle, and validations at the first and the last."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG.format(name=name, steps=steps), encoding="utf-8")
    write_run(folder, new_run(["--job.config_file", "x.toml"]))
    layouts = {"teacher": {"tensor": 4}, "student": {"dp_replicate": 2, "dp_shard": 2}}
    for step, num_ranks in ((0, 2), (steps // 2, 4)):
        versions = {"torch": "2.13.0"}
        changed = [("training.steps", "600", str(steps))]
        append_start(folder, Start("2026-11-28", step, False, num_ranks, "cpu", versions, "x.toml", changed, layouts))
    metrics = MetricsFile(folder / "metrics.jsonl", 0)
    known = {
        "validation/student_before/sliced_wasserstein_excess": before,
        "validation/teacher_few_steps/sliced_wasserstein_excess": 0.26,
        "validation/teacher/accuracy": 0.97,
        "validation/teacher_few_steps/accuracy": 0.92,
        "validation/student_before/accuracy": 0.71,
    }
    metrics.write(0, known)
    for step in range(1, steps + 1):
        losses = {f"loss/{role}": 1.0 / step for role in ("student", "critic")}
        times = {"time/data": 0.5, "time/backward": 1.5}
        metrics.write(step, {**losses, "lr/student": 1e-4, "memory_gib": 2.0, **times})
    metrics.write(
        steps, {**known, "validation/student/sliced_wasserstein_excess": now, "validation/student/accuracy": 0.9}
    )
    metrics.close()
    for step in (0, steps):
        shown = folder / "validation" / f"step-{step:08d}"
        shown.mkdir(parents=True)
        captions = "".join(f"{index:03d} {text}\n" for index, text in enumerate(PROMPTS))
        (shown / "captions.txt").write_text(captions, encoding="utf-8")
        (shown / REQUEST_NAME).write_text(json.dumps(asdict(REQUEST)), encoding="utf-8")
        for label in LEVELS:
            if step or label != "student":
                for index in range(len(PROMPTS)):
                    write_mp4(shown / f"{index:03d}-{label}.mp4", planted_video(label, size), FPS)
    return folder


def planted_video(label: str, size: int) -> np.ndarray:
    """A video of one brightness per frame."""
    video = np.zeros((NUM_FRAMES, size, size, 3), np.uint8)
    for frame in range(NUM_FRAMES):
        video[frame] = LEVELS[label] - 2 * frame
    return video
