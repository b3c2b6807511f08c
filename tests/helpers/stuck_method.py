"""A method whose last rank stops taking part in step 3 while its process lives on: `recipe.method = "stuck"`."""

from __future__ import annotations

import os
import time
from typing import ClassVar

from titan_distill.data.loader import Batch
from titan_distill.methods.base import LossResult
from titan_distill.methods.finetune import Finetune
from titan_distill.registry import register_method


@register_method("stuck")
class StuckFinetune(Finetune):
    roles_required: ClassVar[dict[str, bool]] = {"student": True}

    def student_loss(self, batch: Batch, step: int) -> LossResult:
        if step == 2 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            wait_for_ever()
        return super().student_loss(batch, step)


def wait_for_ever() -> None:
    while True:
        time.sleep(0.1)
