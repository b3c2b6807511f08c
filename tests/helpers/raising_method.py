"""A method whose second step fails with a traceback through its environment: `recipe.method = "raising"`. It fails on
all ranks, or on the rank that the variable RAISING_RANK names."""

from __future__ import annotations

import os
from typing import ClassVar

from titan_distill.data.loader import Batch
from titan_distill.methods.base import LossResult
from titan_distill.methods.finetune import Finetune
from titan_distill.registry import register_method


@register_method("raising")
class RaisingFinetune(Finetune):
    roles_required: ClassVar[dict[str, bool]] = {"student": True}

    def student_loss(self, batch: Batch, step: int) -> LossResult:
        rank = os.environ.get("RANK")
        if step == 1 and rank == os.environ.get("RAISING_RANK", rank):
            raise RuntimeError("a fault of the method")
        return super().student_loss(batch, step)
