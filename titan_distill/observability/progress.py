"""Progress of a run: a bar on a terminal, a log line every few seconds anywhere else.

A bar redraws itself with control characters, which is noise in a log file or a CI transcript; there, plain lines at a
steady rate are kinder. The rate is in seconds rather than steps, because a step of a tiny model takes a tenth of a
second and one of a large model a minute.

The seconds per step are those of training alone: without validations and saves, and without the first step, which
compiles kernels and fills caches. The time left adds the validations and saves that are still due. Their seconds are
those of earlier ones; before the first, they are what the plan or the validation itself expects, or 0 if neither knows.
"""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from titan_distill.config.config import Config

log = logging.getLogger(__name__)

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0
AVERAGED_STEPS = 100
"""Number of latest steps whose mean is shown as seconds per step. It covers several rounds of a method's cadence."""
CHECKPOINT, VALIDATION, PAGE = "checkpoint", "validation", "page"
PAUSES = (CHECKPOINT, VALIDATION, PAGE)
"""Phases other than training. Their seconds do not count in rates."""


@dataclass(frozen=True)
class Pauses:
    """Steps of a run after which it saves or validates: every `interval` steps (0: never), and after its last."""

    num_steps: int
    intervals: Mapping[str, int]
    """Interval by pause; without an entry the run makes no such pause."""

    @classmethod
    def of(cls, config: Config) -> Pauses:
        intervals = {}
        if config.checkpoint.enabled:
            intervals[CHECKPOINT] = config.checkpoint.interval
        if config.validation.enabled or config.validation.data:  # samples, or a held-out loss
            intervals[VALIDATION] = config.validation.interval
        return cls(config.training.steps, intervals)

    def count(self, name: str, after: int, until: int) -> int:
        """Returns the number of pauses after the steps `after` + 1 to `until`."""
        if name not in self.intervals or until <= after:
            return 0
        interval = self.intervals[name]
        regular = until // interval - after // interval if interval else 0
        is_extra = until == self.num_steps and (not interval or until % interval != 0)
        return regular + is_extra


class Progress:
    """Shows steps done, losses, seconds per step, the time left and the end time. Create it on one rank only."""

    def __init__(self, pauses: Pauses, start_step: int) -> None:
        self._pauses, self._num_steps, self._start_step = pauses, pauses.num_steps, start_step
        self.expected: dict[str, float] = {}
        """Seconds of a pause by name, as far as they are known before the first one is measured."""
        self._last_update = self._last_line = time.perf_counter()
        self._paused: dict[str, float] = {}
        self._paused_at_start: float | None = None
        self._steps: deque[float] = deque(maxlen=AVERAGED_STEPS)
        self._first_step = 0.0
        self._shown: dict[str, float] = {}
        self._bar: tqdm | None = None

    def update(self, step: int, values: Mapping[str, float], paused: Mapping[str, float]) -> None:
        """Shows that `step` steps are done, and the losses and the MFU among `values`, each until a newer one comes.
        `paused` are the seconds of all pauses so far, by name."""
        now = time.perf_counter()
        is_first = self._paused_at_start is None
        self._count(now, paused)
        self._shown |= {
            name.removeprefix("loss/"): value
            for name, value in values.items()
            if name.startswith("loss/") or name == "mfu"
        }
        if sys.stderr.isatty():
            self._draw(step)
        elif is_first or step == self._num_steps or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            log.info("step %d/%d%s", step, self._num_steps, self._text(step))

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._redirect.__exit__(None, None, None)

    def _count(self, now: float, paused: Mapping[str, float]) -> None:
        """Counts the seconds of a step that has just ended."""
        between = sum(paused.get(name, 0.0) - self._paused.get(name, 0.0) for name in PAUSES)
        seconds, self._last_update = now - self._last_update - between, now
        self._paused = {name: paused.get(name, 0.0) for name in PAUSES}
        if self._paused_at_start is None:
            # A validation before the first step samples baselines, which later ones do not.
            self._paused_at_start, self._first_step = self._paused[VALIDATION], seconds
        else:
            self._steps.append(seconds)

    def _draw(self, step: int) -> None:
        if self._bar is None:
            shape = "{percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt}{desc}"
            self._bar = tqdm(total=self._num_steps, initial=self._start_step, dynamic_ncols=True, bar_format=shape)
            self._redirect = logging_redirect_tqdm()
            self._redirect.__enter__()
        # tqdm ends a description with a colon of its own, unless it is set so.
        self._bar.desc = self._text(step)
        self._bar.update(step - self._bar.n)

    def _text(self, step: int) -> str:
        parts = [f"{name} loss {value:.4g}" for name, value in self._shown.items() if name != "mfu"]
        if "mfu" in self._shown:
            parts.append(f"MFU {self._shown['mfu']:.0%}")
        if not self._steps:
            parts.append(f"{duration(self._first_step)} for the first step")
        else:
            seconds = sum(self._steps) / len(self._steps)
            left = seconds * (self._num_steps - step) + sum(self._due(name, step) for name in PAUSES)
            parts += [f"{seconds:.3g} s/step", f"{duration(left)} left", f"ends {_end(left)}"]
        return "".join(f" · {part}" for part in parts)

    def _due(self, name: str, step: int) -> float:
        """Returns the seconds of the pauses that are still due, that after this step included."""
        done = self._pauses.count(name, self._start_step, step - 1)
        seconds = self._paused[name] - (self._paused_at_start or 0.0) * (name == VALIDATION)
        each = seconds / done if done else self.expected.get(name, 0.0)
        return each * self._pauses.count(name, step - 1, self._num_steps)


class ProgressBar:
    """Shows how much of a job of known length is done: a bar on a terminal, else a log line every few seconds. Use it
    as a context manager."""

    def __init__(self, label: str, total: int, unit: str, *, is_shown: bool = True) -> None:
        """`unit` is a plural. One that is not shown, as on all ranks but one, costs nothing."""
        self.label, self.total, self.unit, self.is_shown = label, total, unit, is_shown
        self._done = 0
        self._bar: tqdm | None = None
        self._started = self._last_line = time.perf_counter()

    def __enter__(self) -> ProgressBar:
        if self.is_shown and sys.stderr.isatty():
            self._bar = tqdm(total=self.total, desc=self.label, unit=f" {self.unit}", leave=False, dynamic_ncols=True)
        elif self.is_shown:
            _tell(f"{self.label}: {self.total:,} {self.unit}")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, number: int = 1) -> None:
        """Adds `number` to what is done."""
        self._done += number
        self.total = max(self.total, self._done)
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(number)
        elif self.is_shown and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._started) / self._done * (self.total - self._done)
            _tell(f"{self.label}: {self._done:,} of {self.total:,} {self.unit} · {duration(left)} left")


def tracked(items: Iterable[T], label: str, total: int, unit: str, *, is_shown: bool = True) -> Iterator[T]:
    """Yields `items` and shows how many of them are done, see `ProgressBar`."""
    with ProgressBar(label, total, unit, is_shown=is_shown) as bar:
        for item in items:
            yield item
            bar.advance()


def _tell(line: str) -> None:
    """Logs a line; a command that logs nothing but warnings prints it to stderr, where its result is not."""
    if log.isEnabledFor(logging.INFO):
        log.info(line)
    else:
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`75.2` as `1m15s`, `7500` as `2h05m`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def _end(seconds_left: float) -> str:
    """The time of day of the end, with the date if that is not today's."""
    now = datetime.datetime.now()
    end = now + datetime.timedelta(seconds=seconds_left)
    return f"{end:%H:%M}" if end.date() == now.date() else f"{end:%Y-%m-%d %H:%M}"
