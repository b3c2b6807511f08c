"""The process that runs cases: reads requests from standard input, sends rows through a pipe of its own.

A request is one JSON line: `{"function": "module:name", "context": {...}, "skip": N}`. The function returns the part's
cases, of which the first N are left out. Messages are JSON lines too:

    cases NAMES · begin CASE · row CASE ROW · failure CASE WHAT TEXT · end

Standard output and error are a log. SIGUSR1 writes all stacks there, which is how a hang says where it is.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Cases = Mapping[str, Callable[[], Iterable[Row]]]
"""By name, in the order in which they run: a function that yields rows."""

OUT_OF_MEMORY, ERROR = "out of memory", "error"
EXIT_DEVICE_LOST = 3


@dataclass(frozen=True)
class Context:
    """Facts that every part is told.

    Attributes:
        device: "cuda" or "cpu".
        rehearse: toy sizes, for a CPU.
        out: folder of the results, for the few files that are no rows.
        scratch: folder for anything else, removed at the end.
        cache: kernels packed by `benchmarks.compiled_cache`; None where there are none.
        seconds: what is left for the part.
    """

    device: str
    rehearse: bool
    out: Path
    scratch: Path
    cache: Path | None
    seconds: float


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent ends, so that nothing keeps the GPU after the suite."""
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def main() -> None:
    """Serves requests until standard input ends."""
    die_with_parent()
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    messages = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")

    def send(kind: str, **content: Any) -> None:
        messages.write(json.dumps({"kind": kind, **content}, default=str) + "\n")
        messages.flush()

    for line in sys.stdin:
        serve(json.loads(line), send)


def serve(request: dict[str, Any], send: Callable[..., None]) -> None:
    """Runs one part's cases; whatever a case raises becomes a message."""
    context = request["context"]
    paths = {name: context[name] and Path(context[name]) for name in ("out", "scratch", "cache")}
    context = Context(**context | paths)
    module, _, name = request["function"].partition(":")
    skip = request["skip"]
    try:
        cases = getattr(importlib.import_module(module), name)(context)
    except Exception as error:
        send("failure", case="start", what=failure_kind(error), text=traceback.format_exc()[-4000:])
        send("end")
        return
    send("cases", names=list(cases))
    for case, run in list(cases.items())[skip:]:
        send("begin", case=case)
        try:
            for row in run():
                send("row", case=case, row=row)
        except Exception as error:
            send("failure", case=case, what=failure_kind(error), text=traceback.format_exc()[-4000:])
            del error
        _release_memory()
    send("end")


def failure_kind(error: BaseException) -> str:
    """Return `out of memory` for the errors by which Python, PyTorch's CPU allocator and CUDA say so."""
    text = f"{type(error).__name__}: {error}"
    says_so = isinstance(error, MemoryError) or "OutOfMemoryError" in text or "can't allocate memory" in text
    return OUT_OF_MEMORY if says_so else ERROR


def _release_memory() -> None:
    """Releases what a case held. Ends the process if the device no longer answers."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(EXIT_DEVICE_LOST)


if __name__ == "__main__":
    main()
