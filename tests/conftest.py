"""Markers by folder, one thread a process, and GPU tests skipped with a reason where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
FOLDER_MARKERS = ("unit", "distributed", "integration", "gpu", "soak")
ON_REQUEST = {"nightly": "takes minutes", "soak": "takes many minutes"}

# The tests' tensors are tiny: more threads than one only make ranks on the same cores wait for one another.
# Through the environment as well, for the ranks and training runs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("markexpr")
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in FOLDER_MARKERS:
            item.add_marker(getattr(pytest.mark, folder))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA, and torch sees no GPU here"))
        for marker, why in ON_REQUEST.items():
            if item.get_closest_marker(marker) and marker not in wanted:
                item.add_marker(pytest.mark.skip(reason=f"{why}; run it with -m {marker}"))
