"""Scorers rate decoded videos automatically. `validation.scorer` selects one by its name.

A scorer takes a video and its prompt and returns numbers by name, which are averaged over prompts. It is registered
with `@register_scorer`. For a scorer outside of this package, `job.imports` must name its module.

A scorer that cannot rate every prompt is registered with `check_prompt`, a function that raises ValueError for a prompt
that it cannot rate. All prompts are checked before anything is built or sampled.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from titan_distill.config.config import Config
from titan_distill.config.paths import of_key
from titan_distill.data.prompts import read_prompts, repeated
from titan_distill.registry import PROMPT_CHECKS, SCORERS, lookup, register_scorer

Scorer = Callable[[npt.NDArray[np.uint8], str], dict[str, float]]
"""Function (video uint8 [T, H, W, 3], prompt) -> scores by name."""


@register_scorer("none")
def no_scores(video_THW3: npt.NDArray[np.uint8], prompt: str) -> dict[str, float]:
    """Returns no scores, for prompts that cannot be checked by rules."""
    return {}


def scorer(name: str) -> Scorer:
    """Returns the scorer registered under `name`. Raises ValueError with the known scorers and the nearest name."""
    return lookup(SCORERS, name)


def prompts_path(config: Config) -> str:
    """Returns the file of the validation's prompts."""
    return config.validation.prompts or config.data.paths[0]


def validation_prompts(config: Config) -> list[str]:
    """Returns the prompts that validations sample and score. Raises ValueError for a file without usable prompts, or
    with one that the scorer cannot rate."""
    return repeated(_prompts_of_file(config), config.validation.num_prompts)


def check_prompts(config: Config) -> None:
    """Raises as `validation_prompts`, and warns of a file that has fewer prompts than a validation samples."""
    number, wanted = len(_prompts_of_file(config)), config.validation.num_prompts
    if number < wanted:
        print(
            f"warning: validation.num_prompts = {wanted}, but {prompts_path(config)} has {number}: they are repeated "
            "with other noise"
        )


def _prompts_of_file(config: Config) -> list[str]:
    path = prompts_path(config)
    with of_key("validation.prompts" if config.validation.prompts else next(iter(config.data.keys)), path):
        prompts = read_prompts(path, config.validation.num_prompts)
    check = PROMPT_CHECKS.get(config.validation.scorer, lambda prompt: None)
    for prompt in prompts:
        try:
            check(prompt)
        except ValueError as error:
            raise ValueError(
                f"validation.scorer = {config.validation.scorer!r} cannot rate the prompts of {path}: {error}; choose "
                "other validation.prompts or another scorer"
            ) from error
    return prompts
