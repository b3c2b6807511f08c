"""The choice of a kernel's candidate: who may time them."""

from __future__ import annotations

import threading

import pytest
import torch
from titan_kernels import tuning


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuning.Candidate]:
    """Candidates that were timed, the last being the fastest; torch says that it has a GPU."""
    noted: list[tuning.Candidate] = []
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(tuning, "_milliseconds", lambda start, candidate: noted.append(candidate) or -len(noted))
    answers = {"is_available": True, "is_current_stream_capturing": False, "current_device": 0}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    return noted


def launch_on_another_thread() -> tuning.Candidate:
    """As autograd does in the backward of CUDA tensors. Returns what ran."""
    started: list[tuning.Candidate] = []
    shape = tuning.Shape(128, torch.bfloat16, 64, 64, 1, 1, 12, 6)
    thread = threading.Thread(target=lambda: tuning.launch("forward", shape, started.append, tma=True))
    thread.start()
    thread.join()
    return started[-1]


def test_untimed_holds_on_every_thread(timed: list[tuning.Candidate]) -> None:
    kept = tuning.candidates("forward", 64, torch.bfloat16, tma=True)
    with tuning.untimed():
        assert launch_on_another_thread() == kept[0]
        assert not timed
        with tuning.timing(True):
            assert launch_on_another_thread() == kept[-1]
        assert timed == kept
        assert launch_on_another_thread() == kept[0]
    assert launch_on_another_thread() == kept[-1] and len(timed) == len(kept)
