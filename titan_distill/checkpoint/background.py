"""One piece of work at a time on a thread of its own, with its failure kept for whoever waits for it.

A daemon thread rather than an executor: Python waits for an executor's threads when it exits, and a save that hangs
(another rank is gone, a file system does not answer) must not keep a process from ending.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Background:
    """Runs work beside the calling thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether work was started that nobody has waited for yet, done or not."""
        return self._thread is not None

    @property
    def is_done(self) -> bool:
        """Whether ``join`` would return at once."""
        return self._thread is None or not self._thread.is_alive()

    def start(self, name: str, work: Callable[[], Any]) -> None:
        """Begins ``work``; there must be none."""
        assert not self.is_busy, "wait for the work before"
        self._failure = None
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def join(self, timeout_seconds: float | None = None) -> bool:
        """Waits. Raises what the work raised; returns whether it is done."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        if (failure := self._failure) is not None:
            self._failure = None
            raise failure
        return True

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as failure:
            self._failure = failure
