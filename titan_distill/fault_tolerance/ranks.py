"""Agreement between ranks: a failure on one rank is raised on every rank.

A checkpoint is only as good as its worst shard, so every phase of a save or load ends in an agreement. It runs over a
gloo group of its own: checkpoint traffic then never waits for NCCL kernels, nor mixes with the collectives of the
training thread. Alone (no process group) the same calls run directly.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")


class RankFailure(RuntimeError):
    """A failure on some rank, raised on all of them; the message says which rank and why."""


class Ranks:
    """All ranks of the run, or this process alone. Constructing it is collective when there are several.

    `timeout_seconds` is how long ranks wait for each other; None takes torch's default for gloo, half an hour.
    """

    def __init__(self, timeout_seconds: float | None = None) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        timeout = None if timeout_seconds is None else datetime.timedelta(seconds=timeout_seconds)
        self.group: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=timeout) if distributed else None
        self.rank = dist.get_rank() if distributed else 0
        self.size = dist.get_world_size() if distributed else 1

    def together(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank and returns this rank's result. `work` itself must not communicate.

        Raises on every rank when it raised on any: user errors (ValueError) and what all ranks know already
        (RankFailure) as they are, others as RankFailure naming the rank.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        for reported in self._all_gather(failure and _portable(failure, self.rank)):
            if reported is failure and failure is not None:
                raise failure
            if reported is not None:
                raise reported from failure
        return cast(T, result)

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Runs `work` as `together` and returns the results of all ranks, by rank, on each."""
        return self._all_gather(self.together(work))

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0 alone and returns its result on every rank; its failure is everyone's."""
        return cast(T, self.gather(work if self.rank == 0 else lambda: None)[0])

    def all(self, is_so: bool) -> bool:
        """Returns whether it is so on every rank; one small message, for a question asked every step."""
        if self.group is None:
            return is_so
        votes = torch.tensor(int(is_so))
        dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=self.group)
        return bool(votes)

    def wait(self) -> None:
        """Returns when every rank has called it."""
        if self.group is not None:
            dist.barrier(self.group)

    def _all_gather(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def _portable(error: Exception, rank: int) -> Exception:
    """Returns an error that other ranks can unpickle."""
    if isinstance(error, ValueError | RankFailure):
        return error
    return RankFailure(f"rank {rank} failed with {type(error).__name__}: {error}")
