"""Progress of a run: a bar on a terminal, a log line every few seconds anywhere else.

A bar redraws itself with control characters, which is noise in a log file or a CI transcript; there, plain lines at a
steady rate are kinder. The rate is in seconds rather than steps, because a step of a tiny model takes a tenth of a
second and one of a large model a minute.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows steps done, losses and the time left. Create it on one rank only."""

    def __init__(self, num_steps: int, start_step: int) -> None:
        self._num_steps, self._start_step = num_steps, start_step
        self._started = self._last_line = time.perf_counter()
        self._losses: dict[str, float] = {}
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=num_steps, initial=start_step, unit="step", dynamic_ncols=True)
            self._redirect = logging_redirect_tqdm()
            self._redirect.__enter__()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows that `step` steps are done; of `values` the losses are shown, each until a newer one comes."""
        self._losses |= {
            name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")
        }
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in self._losses.items()}, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.perf_counter()
        is_edge = step in (self._start_step + 1, self._num_steps)
        if is_edge or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            log.info(self._line(step, now))

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._redirect.__exit__(None, None, None)

    def _line(self, step: int, now: float) -> str:
        seconds_per_step = (now - self._started) / (step - self._start_step)
        losses = "".join(f" · {name} loss {value:.4g}" for name, value in self._losses.items())
        left = duration(seconds_per_step * (self._num_steps - step))
        return f"step {step}/{self._num_steps}{losses} · {seconds_per_step:.3g} s/step · {left} left"


def duration(seconds: float) -> str:
    """`75.2` as `1m15s`, `7500` as `2h05m`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
