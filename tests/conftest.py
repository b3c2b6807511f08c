"""Markers by folder, one thread per process, signal handlers that end with their test, and the GPU hidden from all
tests but those of `tests/gpu`.

A test that finds a GPU by itself would test another program than on the machines without one. The choice is made once,
when a session starts, because a process can't hide a GPU that it has begun to use: a session whose tests all lie in
`tests/gpu`, or which asks for `-m gpu`, sees the GPU; any other does not, and skips GPU tests with a reason.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from titan_distill.launch import SIGNALS

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


def shows_gpu(arguments: list[str], markers: str, folder: Path) -> bool:
    """True if a session with these paths, relative to `folder`, and this `-m` has GPU tests only."""
    paths = [(folder / argument.partition("::")[0]).resolve() for argument in arguments]
    return markers == "gpu" or (bool(paths) and all(path.is_relative_to(TESTS / "gpu") for path in paths))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-parity", action="store_true", help="write docs/parity.md from what the matrix measures")


def pytest_configure(config: pytest.Config) -> None:
    if not shows_gpu(config.args, config.getoption("markexpr"), config.invocation_params.dir):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for xdist's workers and for what tests start as well
        # Autograd's first backward decides whether the process has threads for devices, and with them no rank can be
        # forked. In a build for CUDA the fake tensors of torch.compile would by then have told it of a GPU.
        torch.ones(1, requires_grad=True).sum().backward()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("markexpr")
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in FOLDER_MARKERS:
            item.add_marker(getattr(pytest.mark, folder))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and none is here, or `pytest tests/gpu` must see it"))
        for marker, why in ON_REQUEST.items():
            if item.get_closest_marker(marker) and marker not in wanted:
                item.add_marker(pytest.mark.skip(reason=f"{why}; run it with -m {marker}"))
    # GPU tests in bf16 first: they have never run on a CPU, and a time limit may end the run.
    items.sort(key=lambda item: item.get_closest_marker("gpu") is not None and "bfloat16" not in item.name)


@pytest.fixture(autouse=True)
def _signal_handlers_end_with_their_test() -> Iterator[None]:
    """A run that has stopped ignores signals from then on, and what later tests start would inherit that."""
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    signal.alarm(0)
    for number, handler in kept.items():
        signal.signal(number, handler)
