"""Shipped jobs against the published recipes: a value is theirs, or its line says that it is not and why."""

from __future__ import annotations

import math
import re
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from runs import REPOSITORY

from titan_distill.config.config import Config
from titan_distill.config.loading import load_config
from titan_distill.config.text import to_dict

FOLDER = REPOSITORY / "train_configs"
JOBS = sorted(path.stem for path in FOLDER.glob("*.toml"))
REAL = [job for job in JOBS if not job.startswith("tiny_")]
DMD2 = ["wan14b_to_1.3b", "wan14b_to_1.3b_8gpu", "wan14b_to_1.3b_1gpu"]
NO_CLIP = math.inf

# Key -> published value. "offset" scales are given as the standard form states them.
SELF_FORCING = {
    "training.steps": 600,
    "training.global_batch_size": 64,
    "training.max_grad_norm": 10.0,
    "optimizer.betas": [0.0, 0.999],
    "optimizer.weight_decay": 0.01,
    "roles.student.optimizer.lr": 2e-6,
    "roles.critic.optimizer.lr": 4e-7,
    "lr_scheduler.warmup_steps": 0,
    "method_config.denoising_steps": [1000.0, 750.0, 500.0, 250.0],
    "method_config.warp": True,
    "method_config.update_ratio": 5,
    "method_config.guidance_scale": 4.0,
    "method_config.min_step": 20.0,
    "method_config.max_step": 980.0,
    "pipeline_config.flow_shift": 5.0,
    "ema.decay": 0.99,
    "ema.start_step": 200,
}
PAIRS = {"method_config.guidance_scale": 6.0, "method_config.teacher_steps": 48, "pipeline_config.flow_shift": 8.0}
RCM = {
    "method_config.consistency_weight": 50.0,
    "method_config.critic_loss": "trigflow",
    "method_config.rollout_times": "random",
    "method_config.min_step": 0.0,
    "method_config.max_step": 1000.0,
    "method_config.guidance_scale": 5.0,
    "method_config.tangent_warmup": 1000,
    "method_config.update_ratio": 5,
    "method_config.logit_std": 1.6,
    "training.max_grad_norm": NO_CLIP,
    "training.steps": 100_000,
    "optimizer.betas": [0.0, 0.999],
    "optimizer.weight_decay": 0.01,
    "roles.student.optimizer.lr": 2e-6,
    "roles.critic.optimizer.lr": 4e-7,
    "lr_scheduler.warmup_steps": 100,
    "ema.decay": "power-law",
}
SPARSE = {
    "sparse_attention.sparsity": 0.9,
    "sparse_attention.schedule_rate": 0.03,
    "sparse_attention.schedule_interval": 50,
    "training.steps": 4000,
    "training.global_batch_size": 64,
    "training.max_grad_norm": 1.0,
    "optimizer.lr": 1e-6,
    "optimizer.weight_decay": 0.01,
    "method_config.cfg_dropout": 0.1,
    "method_config.target": "data",
    "method_config.timestep_distribution": "uniform",
    "pipeline_config.flow_shift": 1.0,
}
TI2V = {
    "pipeline_config.image_probability": 1.0,
    "pipeline_config.image_noise_mean": -math.inf,
    "method_config.guidance_scale": 6.0,
    "method_config.guidance_form": "offset",
    "method_config.critic_loss": "x0",
    "roles.student.optimizer.lr": 5e-7,
    "roles.critic.optimizer.lr": 1e-7,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "self_forcing_wan1.3b": SELF_FORCING,
    "self_forcing_wan14b": SELF_FORCING,
    "wan14b_dmd2_sparse": SELF_FORCING,
    **dict.fromkeys(DMD2, SELF_FORCING),
    "kd_wan14b_to_1.3b": PAIRS,
    "ode_init_wan1.3b": PAIRS,
    "rcm_wan14b_to_1.3b": RCM,
    "wan1.3b_sparse": SPARSE,
    "wan2.2_ti2v_5b_dmd2": TI2V,
}


def job(name: str) -> Config:
    return load_config(["--job.config_file", str(FOLDER / f"{name}.toml")])


def value(config: Config, key: str) -> Any:
    found: Any = to_dict(config)
    for part in key.split("."):
        found = found[part]
    return found


def comment(text: str, key: str) -> str:
    """Comment of a key's line, with the comment lines that continue it; "" for none."""
    table, name = key.rsplit(".", 1)
    lines = text.split(f"[{table}]\n", 1)[-1].split("\n[")[0].splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith(f"{name} =")), None)
    if start is None or "#" not in lines[start]:
        return ""
    continued = []
    for line in lines[start + 1 :]:
        if not re.match(r" +#", line):
            break
        continued.append(line)
    return " ".join(part.split("#", 1)[1].strip() for part in (lines[start], *continued))


def departures(name: str, text: str) -> list[str]:
    config = job(name)
    return [key for key, theirs in PUBLISHED[name].items() if value(config, key) != theirs and not comment(text, key)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_value_is_the_published_one_or_says_why_not(name: str) -> None:
    assert not departures(name, (FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def test_a_departure_without_a_reason_is_found() -> None:
    text = re.sub(r" *#.*", "", (FOLDER / "rcm_wan14b_to_1.3b.toml").read_text(encoding="utf-8"))
    assert departures("rcm_wan14b_to_1.3b", text) == ["training.max_grad_norm", "training.steps", "ema.decay"]


@pytest.mark.parametrize("name", ["wan14b_to_1.3b", "self_forcing_wan1.3b", "wan2.2_a14b_dmd2", "wan2.2_ti2v_5b_dmd2"])
def test_the_average_begins_after_forty_updates(name: str) -> None:
    """200 training steps, in which the student is updated at steps 0, 5, … 195."""
    config = job(name)
    first = next(n for n in count() if n * config.method_config.update_ratio >= config.ema.start_step)
    assert first == 40


@pytest.mark.parametrize("name", JOBS)
def test_the_average_begins_in_the_first_half_of_a_run_and_says_what_it_counts(name: str) -> None:
    config = job(name)
    assert config.ema.start_step <= config.training.steps / 2
    every_step = config.recipe.method in {"finetune", "consistency", "scm", "knowledge_distillation"}
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    assert every_step or config.recipe.method == "rcm" or "updates of the student" in comment(text, "ema.start_step")


@pytest.mark.parametrize("name", [name for name in JOBS if "rcm" in name])
def test_rcms_weight_goes_with_the_half_of_our_matching_loss(name: str) -> None:
    """50 for a sample of 480p. A normalised tangent has norm 1 in any sample, hence the root between sizes."""
    config = job(name)
    pipeline = config.pipeline_config
    elements = 16 * (1 + (pipeline.num_frames - 1) // 4) * (pipeline.height // 8) * (pipeline.width // 8)
    expected = 50 * math.sqrt(elements / (16 * 21 * 60 * 104))
    assert config.method_config.consistency_weight == pytest.approx(expected, rel=0.1)


def test_rcms_noise_levels_are_those_of_its_job() -> None:
    config = job("rcm_wan14b_to_1.3b")
    mean = config.method_config.logit_mean + math.log(config.pipeline_config.flow_shift)
    assert mean == pytest.approx(0.7, abs=0.005)


@pytest.mark.parametrize("name", REAL)
def test_real_jobs_compile(name: str) -> None:
    assert job(name).compile.enabled == (name != "rcm_wan14b_to_1.3b")


def test_the_sparsity_is_reached_in_the_first_half() -> None:
    config = job("wan1.3b_sparse")
    sparse = config.sparse_attention
    num_increases = round(sparse.sparsity / sparse.schedule_rate)
    assert num_increases * sparse.schedule_interval == 1500 <= config.training.steps / 2


def test_no_shift_is_called_wans() -> None:
    """Wan samples its 1.3B model at 8 to 12."""
    assert not [
        path for path in Path(FOLDER).glob("*.toml") if "Wan's value at 480p" in path.read_text(encoding="utf-8")
    ]
