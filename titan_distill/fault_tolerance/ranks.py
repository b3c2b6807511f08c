"""Agreement between ranks: a failure on one rank is raised on every rank.

A checkpoint is usable only if every rank has written its part. Every phase of a save or load therefore ends with a
collective in which the ranks tell each other whether they succeeded. It uses a separate gloo group, so it does not wait
for NCCL kernels and does not mix with the collectives of the training thread. Without a process group the same calls
run on this process alone.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")


class RankFailure(RuntimeError):
    """A failure on one rank, raised on all ranks. The message names the rank and the cause."""


class Ranks:
    """All ranks of the run, or this process alone. With several ranks the constructor is collective.

    `timeout_seconds` limits the time that ranks wait for each other. None takes torch's default for gloo, half an hour.
    """

    def __init__(self, timeout_seconds: float | None = None) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        timeout = None if timeout_seconds is None else datetime.timedelta(seconds=timeout_seconds)
        self.group: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=timeout) if distributed else None
        self.rank = dist.get_rank() if distributed else 0
        self.size = dist.get_world_size() if distributed else 1

    def together(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank and returns this rank's result. `work` itself must not communicate.

        If `work` raises on one rank, every rank raises: a ValueError or RankFailure unchanged, any other error as a
        RankFailure that names the rank. Unless one fails, ranks exchange one small message, so it may be called every
        step.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        if self.all(failure is None):
            return cast(T, result)
        for reported in self._all_gather(failure and _portable(failure, self.rank)):
            if reported is failure and failure is not None:
                raise failure
            if reported is not None:
                raise reported from failure
        raise AssertionError("a rank that fails reports its failure")

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Runs `work` like `together`, and returns the list of all ranks' results on every rank."""
        return self._all_gather(self.together(work))

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0 only and returns its result on every rank. If it fails, every rank raises."""
        return cast(T, self.gather(work if self.rank == 0 else lambda: None)[0])

    def all(self, is_so: bool) -> bool:
        """Returns whether `is_so` is true on every rank. It sends one small message, so it may be called every step."""
        if self.group is None:
            return is_so
        votes = torch.tensor(int(is_so))
        dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=self.group)
        return bool(votes)

    def wait(self) -> None:
        """Waits until every rank has called it."""
        if self.group is not None:
            dist.barrier(self.group)

    def _all_gather(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def _portable(error: Exception, rank: int) -> Exception:
    """Returns an error that other ranks can unpickle in place of `error`."""
    if isinstance(error, ValueError | RankFailure):
        return error
    return RankFailure(f"rank {rank} failed with {type(error).__name__}: {error}")
