"""Shipped jobs against the published recipes, whose values are in `benchmarks/recipes.toml`: a value is theirs, or its
line says that it is not."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path

import pytest
from runs import REPOSITORY

from benchmarks import recipe_cards
from benchmarks.recipe_cards import comment
from titan_distill.config.config import Config
from titan_distill.config.loading import load_config

FOLDER = REPOSITORY / "train_configs"
JOBS = sorted(path.stem for path in FOLDER.glob("*.toml"))
REAL = [job for job in JOBS if not job.startswith("tiny_")]
PUBLISHED = {job.name: job for job in recipe_cards.jobs() if job.name in REAL and "published" in job.hand}


def job(name: str) -> Config:
    return load_config(["--job.config_file", str(FOLDER / f"{name}.toml")])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_value_is_the_published_one_or_its_line_says_that_it_is_not(name: str) -> None:
    """The reasons of all departures stand in the cards: see test_recipe_cards.py."""
    job = PUBLISHED[name]
    assert not [each.key for each in recipe_cards.departures(job) if not comment(job.source, each.key)]


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
