"""The configuration of a small Wan run with one trained role, for tests that build parts of it by hand."""

from __future__ import annotations

from typing import Any

from titan_distill.config.config import Config
from titan_distill.config.role_sections import OptimizerConfig, ParallelismConfig, RoleConfig
from titan_distill.config.sections import DataConfig, JobConfig, RecipeConfig, TrainingConfig
from titan_distill.models.wan.pipeline_config import WanPipelineConfig


def wan_config(*, attention: Any = "dense", **sections: Any) -> Config:
    """`attention` is the student's; `sections` replace defaults."""
    return Config(
        job=JobConfig(name="test"),
        recipe=RecipeConfig(method="finetune"),
        roles={
            "student": RoleConfig(
                trainable=True,
                flavor="tiny",
                attention=attention,
                optimizer=OptimizerConfig(),
                parallelism=sections.get("parallelism", ParallelismConfig()),
            )
        },
        method_config=None,
        pipeline_config=WanPipelineConfig(),
        data=DataConfig(path="data"),
        training=TrainingConfig(steps=1, global_batch_size=1, local_batch_size=1),
        **sections,
    )
