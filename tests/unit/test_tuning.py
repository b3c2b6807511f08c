"""The choice of a kernel's candidate: who may time them, and who is told; and the order of its programs."""

from __future__ import annotations

import threading

import pytest
import torch
from titan_kernels import reference, tuning
from titan_kernels.vsa_backward import _longest_first
from triton.runtime.errors import OutOfResources

KEPT = tuning.candidates("forward", 64, torch.bfloat16, tma=True)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Milliseconds that were measured, each less than the one before; torch says that it has a GPU."""
    noted: list[float] = []

    def bench(start, **options) -> float:  # type: ignore[no-untyped-def]
        start()
        noted.append(-len(noted))
        return noted[-1]

    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(tuning.triton.testing, "do_bench", bench)
    answers = {"is_available": True, "is_current_stream_capturing": False, "current_device": 0}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    return noted


def launch(start=lambda candidate: None) -> tuning.Candidate:  # type: ignore[no-untyped-def]
    """Launches on another thread, as autograd does in the backward of CUDA tensors. Returns what ran in the end."""
    started: list[tuning.Candidate] = []
    shape = tuning.Shape(128, torch.bfloat16, 64, 64, 1, 1, 12, 6)

    def run(candidate: tuning.Candidate) -> None:
        start(candidate)
        started.append(candidate)

    thread = threading.Thread(target=lambda: tuning.launch("forward", shape, run, tma=True))
    thread.start()
    thread.join()
    return started[-1]


def test_untimed_holds_on_every_thread(timed: list[float]) -> None:
    with tuning.untimed():
        assert launch() == KEPT[0]
        assert not timed
        with tuning.timing(True):
            assert launch() == KEPT[-1]
        assert len(timed) == len(KEPT)
        assert launch() == KEPT[0]
    assert launch() == KEPT[-1] and len(timed) == len(KEPT)


def test_observers_hear_of_every_candidate_and_of_those_that_fail(timed: list[float]) -> None:
    heard: list[tuple[str, tuning.Candidate, float | Exception]] = []

    def fails(candidate: tuning.Candidate) -> None:
        if candidate == KEPT[-1]:
            raise RuntimeError("no such instruction")

    launch()
    with tuning.observed(lambda *said: heard.append(said)):
        assert launch(fails) == KEPT[-2], "the fastest of those that work"
    assert [(kernel, candidate) for kernel, candidate, _ in heard] == [("forward", kept) for kept in KEPT]
    assert [type(result) for *_, result in heard] == [int] * (len(KEPT) - 1) + [RuntimeError]
    launch(fails)
    assert len(heard) == len(KEPT), "nobody listens any more"


def test_what_this_gpu_has_no_memory_for_is_passed_over(timed: list[float]) -> None:
    def only_last(candidate: tuning.Candidate) -> None:
        if candidate != KEPT[-1]:
            raise OutOfResources(640, 512, "tensor memory")

    with tuning.untimed():
        assert launch(only_last) == KEPT[-1]
    assert not timed


def test_longest_key_tiles_come_first() -> None:
    lists = torch.tensor([[0, 3], [1, 3], [1, 3], [4, 5]], dtype=torch.int32).view(1, 1, 4, 2)
    offset, _ = reference.transpose_lists(lists, 7)
    # Chosen by 1, 2, 0, 3, 1, 1 and 0 query blocks.
    assert _longest_first(offset).tolist() == [[[3, 1, 0, 4, 5, 2, 6]]]
